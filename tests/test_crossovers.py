"""The table of what impl="auto" takes: complete, and the only place that decides."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from fnattn_kernels import crossovers

from fnattn import ops
from fnattn.__main__ import main
from fnattn.bench import crossovers as measured
from fnattn.ops._door import choose, worthwhile
from fnattn.ops.report import CASES

ROWS = {(row.operator, row.kernel): row for row in crossovers.TABLE}
KERNELS = [(name, kernel) for name, case in CASES.items() for kernel in importlib.import_module(f"fnattn.ops.{case.module}").KERNELS]


@pytest.mark.parametrize("operator, kernel", KERNELS, ids=lambda x: getattr(x, "name", x))
def test_every_kernel_has_a_row_and_no_threshold_elsewhere(operator, kernel):
    row = ROWS[operator, kernel.name]
    assert row.measured and "{" not in row.rule
    conditional = row.takes not in (crossovers.ALWAYS, crossovers.NEVER)
    assert conditional == (kernel.worth is not None)
    if not conditional:
        assert worthwhile(operator, kernel) == (row.takes == crossovers.ALWAYS)
    elif row.limits:
        assert not any(c.isdigit() for line in inspect.getsource(kernel.worth).splitlines() for c in line.replace("shape[2]", ""))


def test_no_two_rows_say_different_things():
    assert len(ROWS) == len(crossovers.TABLE)
    assert {operator for operator, _ in ROWS} == set(CASES)


def test_a_threshold_decides(monkeypatch):
    q = torch.zeros(1, 1, 1024, 2)
    layout = torch.eye(64, dtype=torch.bool)[None]
    kernels = [k for name, k in KERNELS if name == "block_sparse_attention" and k.name != "native"]
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, layout).name == "gather"
    assert choose("block_sparse_attention", "auto", kernels, q[:, :, :1023], q, q, layout) is None
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, torch.ones_like(layout)) is None
    monkeypatch.setitem(crossovers.limits("block_sparse_attention", "gather"), "length", 2048)
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, layout) is None


def test_what_the_table_forbids_is_still_there_by_name():
    x = torch.ones(1, 1, 3, 2)
    freqs = torch.ones(1)
    pytest.importorskip("rotary_embedding_torch")
    out = ops.rotary(x, torch.arange(3), freqs, impl="rotary_embedding_torch")
    torch.testing.assert_close(out, ops.rotary(x, torch.arange(3), freqs))


def test_the_command_measures_and_prints_the_table(capsys):
    assert main(["bench", "--crossovers", "--quick", "--rounds", "1", "--op", "scan"]) == 0
    text = capsys.readouterr().out
    assert text.count("scan  ") >= 3 and all(row.rule in text and row.measured in text for row in crossovers.TABLE)


def test_rows_name_what_auto_takes_and_what_is_fastest(monkeypatch):
    monkeypatch.setattr(measured, "FEW", (1, 40))
    before = dict(crossovers.limits("softmax_attention", "native, torch's"))
    softmax, one, forty = measured.rows(["softmax_attention"], (16,), "cpu", 1)
    assert softmax["auto"] == "native" and set(softmax["ms"]) == {"native", "sdpa", "reference"} == set(softmax["value_ms"])
    assert (one["auto"], forty["auto"]) == ("torch's", "ours")
    assert crossovers.limits("softmax_attention", "native, torch's") == before
    (taylor,) = measured.rows(["taylor"], (16,), "cpu", 1)
    assert set(taylor["ms"]) >= {"native", "reference", "reference, quadratic"}
    slow = {**taylor, "ms": {"native": 2.0, "reference": 1.0}, "behind": 2.0, "fastest": "reference"}
    assert "16< native" in measured.line(slow) and "16  native" in measured.line({**slow, "behind": 1.05})


def test_what_was_never_measured_is_taken_only_when_it_is_asked_for():
    unmeasured = [row for row in crossovers.TABLE if row.measured == crossovers.UNMEASURED]
    assert len(unmeasured) >= 10 and all(row.takes == crossovers.NEVER for row in unmeasured)


def test_a_build_for_sse2_leaves_wide_axial_attention_to_a_torch_with_wider_vectors(monkeypatch):
    kernels = [k for name, k in KERNELS if name == "axial_attention"]
    narrow, wide = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 64)
    for capability, taken in (("AVX512", None), ("DEFAULT", "native")):
        monkeypatch.setenv("FNATTN_ISA", "baseline")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=capability: said)
        assert choose("axial_attention", "auto", kernels, narrow, narrow, narrow).name == "native"
        found = choose("axial_attention", "auto", kernels, wide, wide, wide)
        assert (found and found.name) == taken
