"""The derivative table: every cell is right or an error; and the command that prints it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import stranger
import torch
import torch._dynamo
from fnattn_kernels.contracts import KernelUnavailable

from fnattn import attentions, cli
from fnattn.testing import Cell, Table, derivative_table
from fnattn.testing.table import APART, TRANSFORMS, what

NAMES = ("grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "grad(grad)", "vjp(grad)", "grad(vjp(grad))", "jvp(grad)",
         "vmap", "vmap(grad)", "vmap(vjp(grad))", "grad(vmap)",
         "per-sample gradients", "ensembles", "compile", "compile(grad)", "compile(vmap(grad))", "compile(jvp)", "export")


def silent_tangent(params, x, state=stranger.EMPTY, **options):
    """Right values and gradients, no tangent."""
    return _NoTangent.apply(params.weight, x), state


class _NoTangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight, x):
        return stranger.apply(stranger.Params(stranger.Config(dim=3), weight), x)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        weight, x = ctx.saved_tensors
        _, pull = torch.func.vjp(lambda w, x: stranger.apply(stranger.Params(stranger.Config(dim=3), w), x)[0], weight, x)
        return pull(g)

    @staticmethod
    def jvp(ctx, weight_t, x_t):
        return torch.zeros_like(x_t)


def test_the_table_has_every_transform_of_the_contract():
    assert set(NAMES) <= set(TRANSFORMS)


@pytest.mark.parametrize("name", attentions.FAMILIES)
def test_no_number_in_the_table_is_wrong(name):
    table = derivative_table([name], compile=False)
    assert not table.wrong
    assert {cell.transform for cell in table.cells} == set(TRANSFORMS) - set(APART)
    # "gather" refuses where it cannot look into the layout; every other kernel serves every transform.
    assert not [cell for cell in table.cells if cell.status != "ok" and cell.impl != "gather"]


def test_compiled_cells_are_filled_in_too():
    found = []
    table = derivative_table([stranger.FAMILY], progress=found.append)
    assert tuple(found) == table.cells
    assert [cell.transform for cell in table.cells] == list(TRANSFORMS)
    assert all(cell.status == "ok" for cell in table.cells)


def test_a_wrong_tangent_is_called_wrong():
    table = derivative_table([stranger.FAMILY._replace(apply=silent_tangent)], compile=False)
    statuses = {cell.transform: cell.status for cell in table.cells if cell.impl == "reference"}
    assert statuses["jvp"] == statuses["jacfwd"] == "wrong" and statuses["grad"] == statuses["vmap(grad)"] == "ok"


CELLS = tuple(Cell(family, impl, transform, *rest) for family, impl, transform, *rest in (
    ("one", "reference", "grad", "ok"), ("one", "native", "grad", "ok"), ("one", "reference", "jvp", "ok"),
    ("one", "native", "jvp", "error", "RuntimeError: no"), ("two", "reference", "grad", "ok"),
    ("two", "reference", "jvp", "wrong", "zero")))


def test_plain_and_markdown_tables_say_the_same():
    plain, markdown = Table(CELLS).text().splitlines(), Table(CELLS).text(markdown=True).splitlines()
    assert plain[:3] == ["      one                               two",
                         "grad  ok                                ok",
                         "jvp   reference: ok, native: error [1]  wrong [2]"]
    assert plain[3] == 'Implementations: one: reference, native; two: reference. "ok" alone: all of them.'
    assert plain[4:] == ["[1] error: RuntimeError: no", "[2] wrong: zero"]
    assert markdown[:4] == ["| transform | one | two |", "|---|---|---|", "| `grad` | ok | ok |",
                            "| `jvp` | reference: ok, native: error [1] | wrong [2] |"]


def test_what_a_compiler_met_is_named_by_the_code_that_raised_it():
    def refuses(x):
        raise KernelUnavailable("it's:\n  one: \"no\"")

    with pytest.raises(torch._dynamo.exc.Unsupported) as met:
        torch.compile(refuses, backend="eager", fullgraph=True)(torch.ones(2))
    assert what(met.value) == 'KernelUnavailable: it\'s: one: "no"'
    assert what(ValueError("no\n  never")) == "ValueError: no never" and len(what(ValueError("no " * 200))) <= 240


def test_a_narrow_terminal_gets_the_families_in_blocks():
    lines = Table(CELLS).text(width=40).splitlines()
    assert sum(line.startswith("grad") for line in lines) == 2


def test_the_command_prints_the_table_and_nothing_else_on_stdout(capsys):
    assert cli.main(["check", "--family", "taylor", "--no-compile", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| transform | taylor |\n") and "| `jvp(grad)` | ok |" in out


def test_the_command_exits_1_on_a_wrong_number(monkeypatch, capsys):
    monkeypatch.setitem(attentions.FAMILIES, "stranger", stranger.FAMILY._replace(apply=silent_tangent))
    assert cli.main(["check", "--family", "stranger", "--no-compile"]) == 1
    assert "fnattn check: wrong number: stranger, reference, jvp" in capsys.readouterr().err


def test_the_command_names_the_families_when_asked_for_an_unknown_one(capsys):
    assert cli.main(["check", "--family", "tailor"]) == 2
    assert "got 'tailor'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the error is about")
def test_the_command_says_that_there_is_no_gpu(capsys):
    assert cli.main(["check", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA GPU" in capsys.readouterr().err


def test_importing_the_package_does_not_import_the_checks():
    code = "import sys, fnattn; sys.exit('fnattn.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
