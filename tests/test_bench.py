"""The benchmark itself, and a guard of what it measures by counts: the same numbers on any machine, however busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fnattn_kernels.contracts import register_flops
from fnattn_kernels.native import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fnattn
from fnattn import random
from fnattn.attentions import full, gate_loop, linformer, simple_gate_loop, sparse_conv, taylor
from fnattn.bench import (
    CASES,
    check,
    layers,
    memory,
    operators,
    precision,
    report,
    scaling,
    table,
    timing,
    training,
    transforms,
    upstream,
    work,
)
from fnattn.bench.case import Case, Contest, Opponent, Side, Work, normal
from fnattn.bench.peaks import Peaks
from fnattn.cli import bench, main
from fnattn.testing.memory import peak_bytes

CPU = torch.device("cpu")
OPTIONS = table.Options(CPU, 1, True, False)
REPO = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------ the harness refuses


def made(ours=None, theirs=None, **settings) -> Case:
    """A case that doubles a tensor, on both sides unless told otherwise."""
    def build(sizes, device):
        def double(x, impl="auto"):
            return 2 * x if impl == "reference" or ours is None else ours(x)

        return Contest((normal("x", sizes["n"], device=device),), double, theirs or (lambda: Opponent(lambda x: x + x)),
                       Work(3, 0, 8), Work(6, 0, 16))

    return Case("double", "operator", build, {"n": 7}, {"n": 5}, (1e-9, 1e9), "x + x", memory=False, **settings)


def rows_of(case: Case, options: table.Options = OPTIONS) -> list[dict]:
    return list(table.contest_rows(case, options, Peaks(1e9, 1e9, 1e9, "as said")))


class _WrongGradient(torch.autograd.Function):
    """The right value; a gradient one percent too large."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2.02 * g


@pytest.mark.parametrize("ours, said", [
    (lambda x: 2.02 * x, "the value is off"), (lambda x: 2 * x + float("nan"), "the value is off by nan"),
    (lambda x: 2 * x[:-1], "the value is [4], not [5]"), (_WrongGradient.apply, "gradient 1 is off")])
def test_a_wrong_case_has_no_times(ours, said):
    (row,) = rows_of(made(ours))
    assert table.failed(row) and said in row["wrong"]
    assert not {"ours_ms", "upstream_ms", "ratio"} & set(row)
    assert "WRONG" in report.line(row) and table.met(row) is None


def test_a_wrong_upstream_is_no_opponent():
    (row,) = rows_of(made(theirs=lambda: Opponent(lambda x: 2.5 * x)))
    assert row["wrong"].startswith("upstream: the value is off") and "ratio" not in row


def test_the_command_refuses_a_wrong_case_and_fails(monkeypatch, capsys):
    for name, value in bench.KEEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(CASES, "double", made(lambda x: 3 * x))
    assert main(["bench", "--quick", "--case", "double"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: the value is off" in out and "WRONG: 1 case(s), not timed" in out


def test_a_right_case_has_a_ratio_a_floor_and_a_verdict():
    forward, both = rows_of(made(), OPTIONS._replace(quick=False))
    assert forward["ratio"] > 0 and forward["ours_ms"] > 0 and forward["shape"] == "n7" and table.met(forward) is True
    assert forward["floor_ms"] == pytest.approx(8e-6) and both["floor_ms"] == pytest.approx(16e-6)
    assert table.met(both) is False and "MISS" in report.line(both) and "ok" in report.line(forward)
    assert table.met(rows_of(made())[0]) is None, "small shapes have no goals"
    assert report.tail([forward, both]) == "goals reached: 1 of 2"


def test_a_missing_upstream_leaves_its_column_empty_and_says_so():
    def gone():
        raise upstream.Missing("upstream==1.0 is not installed")

    forward, both = rows_of(made(theirs=gone))
    assert forward["ours_ms"] > 0 and forward["ratio"] is None and forward["upstream_ms"] is None
    assert "upstream==1.0 is not installed" in report.line(forward) and table.met(both) is None


def test_a_package_that_is_not_there_is_missing(monkeypatch):
    monkeypatch.setitem(upstream.PINNED, "no_such_package", ("no-such-package", "1.0"))
    with pytest.raises(upstream.Missing, match="no-such-package==1.0 is not installed"):
        upstream.module("no_such_package.attention")
    assert upstream.versions()["no-such-package"] == "missing"


def test_a_derivative_that_is_wrong_has_no_multiple():
    wrong = transforms.Multiple(int, int, lambda: ([torch.ones(2)], [torch.zeros(2)]))
    case = transforms.Transform("d", lambda sizes, device: wrong, {"n": 1}, {"n": 1}, 3.0, "forward")
    row = table.multiple_row(case, OPTIONS)
    assert "wrong" in row and "multiple" not in row


# ------------------------------------------------------------------------------------------------ the harness measures


def test_the_sides_take_turns_and_the_median_of_the_ratios_counts(monkeypatch):
    time, order, costs = [0.0], [], iter([1, 2, 1, 2, 1, 9, 1, 3])  # two first calls, then three rounds

    def side(name):
        def run():
            order.append(name)
            time[0] += next(costs)
        return run

    monkeypatch.setattr(timing, "clock", lambda device: lambda: time[0])
    found = timing.alternate(side("ours"), side("theirs"), 3, CPU)
    assert "".join(name[0] for name in order) == "ot" + 3 * "ot"
    assert (found.ours, found.theirs, found.ratio) == (1e3, 3e3, 3.0)
    costs = iter([1, 2, 4, 5, 3, 6])  # a first round and two more
    order.clear()
    assert timing.least((side("short"), side("long")), 2, CPU) == [3e3, 5e3] and "".join(name[0] for name in order) == 3 * "sl"


def test_one_thread_is_measured_in_processor_time_and_two_on_the_wall(monkeypatch):
    assert timing.clock(CPU) is timing.time.process_time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.clock(CPU) is timing.time.perf_counter


def test_gradients_of_a_side_are_autograds():
    side = Side(lambda x, y: x * y.sin(), (normal("x", 5, device=CPU), normal("y", 5, device=CPU)))
    out, again = side.both(), side.both()
    x, y = side.leaves
    g = side.cotangent
    assert torch.equal(out, again) and g.is_contiguous() and g.unique().numel() == 5
    torch.testing.assert_close(x.grad, g * y.sin())
    torch.testing.assert_close(y.grad, g * x * y.cos())


def test_pairs_are_counted_right():
    t, side = 3, 7
    mask = layers._conv_mask(t, side, t + side * side, CPU)
    assert work.conv_pairs(t, side, 5) == mask.sum()
    at = torch.arange(side * side)
    row = (at[:, None] // side == at // side) & (at[:, None] >= at)
    assert work.axial_pairs(t, side) == t * (t + 1) / 2 + side * side * t + row.sum()
    # eps is 4, 2.8 ... 0.11 in eleven steps; down to 0.96 thresholds, eps log(512 / 8), lie above what 512 normal scores reach.
    assert [work.coor(100, 512, k, 20, 0.1, 4.0, 0.7)[0].exps for k in (1.0, 8.0, 512.0)] == [200, 800, 1300]
    assert work.coor(100, 512, 8.0, 5)[0] == work.Work(4 * 5 * 100, 200, 800)
    assert work.linear((2, 3, 5))[0].flops == 60 and work.linear((2, 3, 5))[1].flops == 180


def test_names_are_unique_and_every_goal_of_the_table_has_a_case():
    names = [case.name for case in (*operators.CASES, *layers.CASES)]
    names += [*training.CASES, *transforms.CASES, *precision.CASES, *scaling.CASES]
    assert len(set(names)) == len(names) == len(table.names())
    assert sum(goal is not None for case in CASES.values() for goal in case.goal) >= 50


@pytest.mark.parametrize("name", ["taylor d16", "gate_loop d64", "simple_gate_loop", "coor_descent T20", "dalle conv",
                                  "dalle block-sparse", "linformer layer", "decode conv", "decode full"])
def test_small_cases_agree_with_float64(name):
    case = CASES[name]
    assert check.wrong(case.build(case.quick, CPU), len(case.passes) > 1, case.tolerance, None) == (None, None)


@pytest.mark.parametrize("name", ["bfloat16 taylor", "bfloat16 coor_descent_attention, gradient"])
def test_bfloat16_is_compared_with_float32_after_a_look_at_its_numbers(name, monkeypatch):
    row = table.multiple_row(precision.CASES[name], OPTIONS)
    assert "wrong" not in row and row["multiple"] > 0 and "times as fast" in report.line(row)
    monkeypatch.setattr(precision, "_results", lambda side, gradient: [side.forward() + (side.args[0].dtype == torch.bfloat16)])
    assert "wrong" in table.multiple_row(precision.CASES[name], OPTIONS)


def test_a_scaling_case_gives_a_cost_per_length(monkeypatch):
    monkeypatch.setattr(scaling, "QUICK", (300, 350))
    row = table.scaling_row(scaling.CASES["scaling conv"], OPTIONS)
    assert row["n"] == [257 + 36, 257 + 81] and len(row["ns_per_token"]) == 2 and "ns per token" in report.line(row)
    row = table.scaling_row(scaling.CASES["scaling axial"], OPTIONS)
    keys = [work.axial_pairs(257, side) / n for side, n in zip((6, 9), row["n"])]
    costs = [cost / count for cost, count in zip(row["ns_per_token"], keys)]
    assert row["growth"] == pytest.approx(costs[1] / costs[0]) and "growth per key" in report.line(row)


# ------------------------------------------------------------------------------------------------ the command


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fnattn", "bench", *flags], capture_output=True, text=True, check=False,
                          cwd=REPO, env={**os.environ, "COLUMNS": "200"})


def test_the_command_prints_the_table_and_writes_json_and_a_plot(tmp_path):
    out = tmp_path / "new" / "table.json"
    done = run("--quick", "--rounds", "1", "--case", "coor_descent T20", "scaling taylor", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "peaks: " in done.stdout and "coor_descent T20" in done.stdout and "goals reached" in done.stdout
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["results"]] == ["coor_descent T20", "coor_descent T20", "scaling taylor"]
    assert found["machine"]["threads"] == 1 and found["machine"]["peaks"]["flops"] > 1e8 and len(found["machine"]["date"]) == 10
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, message", [
    (["--case", "magic"], "bench: expected a case; got 'magic'."), (["--rounds", "0"], "bench: --rounds must be at least 1"),
    (["--threads", "0"], "bench: --threads must be at least 1"), (["--n", "8"], "bench: --n is for --op alone; got --n [8]."),
    (["--crossovers", "--op", "scan", "--d", "4"], "bench: --d is for --op alone; got --d 4.")])
def test_a_mistake_is_one_message_and_exit_code_two(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_operator_is_timed_at_one_position_where_gradients_are_empty_or_cancel(capsys):
    assert main(["bench", "--op", "cached_attention", "taylor", "gate_loop", "--n", "1", "--h", "1", "--repeats", "1"]) == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "this machine has cpu; got --device cuda" in capsys.readouterr().err.replace("cpu, mps", "cpu")


def test_the_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == table.names()


# ------------------------------------------------------------------------------------------------ the guard: counts


class Count(TorchDispatchMode):
    """How many operators of torch are dispatched, views aside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def step_operators(cfg, before: int) -> list[str]:
    """What one decode step after `before` tokens dispatches."""
    params = fnattn.init(random.key(0), cfg)
    x = random.normal(random.key(1), (2, before + 1, cfg.dim))
    with torch.no_grad():
        _, state = fnattn.apply(params, x[:, :-1], fnattn.init_state(params, 2, capacity=before + 3))
        with Count() as count:
            fnattn.apply(params, x[:, -1:], state)
    return count.names


# Operators per step as they are, plus a few. Each costs some microseconds of a step's 100 to 300.
STEPS = {"taylor": (taylor.Config(dim=14, heads=2, dim_head=7, causal=True), 12), "simple": (simple_gate_loop.Config(dim=7), 14),
         "gate_loop": (gate_loop.Config(dim=6, heads=2), 28), "full": (full.Config(dim=7, seq_len=61, heads=2, dim_head=3), 24),
         "conv": (sparse_conv.Config(dim=7, seq_len=60, image_size=7, heads=2, dim_head=3), 85)}


@pytest.fixture
def compiled():
    for source in ("taylor", "gate_loop", "softmax"):
        reason = build.why_not(source)
        if reason:
            pytest.skip(f"plain torch does more: {reason}")


@pytest.mark.parametrize("family", STEPS)
def test_a_decode_step_dispatches_few_operators_and_no_more_later(family, compiled):
    cfg, most = STEPS[family]
    early, late = step_operators(cfg, 23), step_operators(cfg, 47)
    assert len(early) == len(late), f"more work later: {sorted(set(late) - set(early))}"
    assert len(late) <= most, f"{len(late)} operators: {late}"


def test_linformer_mixes_before_it_projects_where_that_is_cheaper():
    register_flops()
    n, dim, k = 256, 32, 16
    params = linformer.init(random.key(0), linformer.Config(dim=dim, seq_len=n, k=k, heads=2))
    with FlopCounterMode(display=False) as count, torch.no_grad():
        linformer.apply(params, random.normal(random.key(1), (1, n, dim)))
    attention, to_q_and_out, mixing = 4 * n * k * dim, 2 * n * dim * dim * 2, 4 * n * k * dim
    assert count.get_total_flops() == attention + to_q_and_out + mixing + 2 * (2 * k * dim * dim)
    upstream_order = attention + to_q_and_out + mixing + 2 * (2 * n * dim * dim)
    assert count.get_total_flops() < 0.7 * upstream_order


@pytest.mark.parametrize("name, most", [("taylor d16 long", 4.0), ("gate_loop d64", 4.0)])
def test_a_kernel_needs_no_room_that_torch_does_not_see(name, most, compiled):
    """Resident memory at the peak, in megabytes: the C code allocates too."""
    held = memory.extra(CASES[name], quick=True)
    if held is None:
        pytest.skip("the system does not count memory by process")
    assert 0 <= held["forward ours"] <= most and 0 <= held["forward+backward ours"] <= most


def operator_memory(name: str, factor: int) -> tuple[int, int]:
    """Peak bytes of tensors beside the arguments of a forward with gradients, and the bytes of results and gradients."""
    case = CASES[name]
    sizes = {**case.quick, "n": case.quick["n"] * factor}
    side = Side((contest := case.build(sizes, CPU)).ours, contest.args)
    held = peak_bytes(lambda *_: side.both(), side.leaves)
    return held, 4 * (side.forward().numel() + sum(t.numel() for t in side.leaves))


@pytest.mark.parametrize("name", ["taylor d16", "gate_loop d1", "gate_loop d64", "simple_gate_loop"])
def test_memory_of_linear_operators_grows_as_their_results_do(name, compiled):
    (one, kept), (four, kept4) = operator_memory(name, 1), operator_memory(name, 4)
    assert kept4 == 4 * kept
    assert four <= 4.2 * one, "memory grows faster than the length"
    assert four <= 2.5 * kept4, f"{four} bytes for {kept4} of results and gradients"


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")  # upstream's
@pytest.mark.parametrize("name", training.CASES)
def test_a_step_of_training_agrees_with_the_same_model_elsewhere(name):
    case = training.CASES[name]
    try:
        sides = training.build(case, case.quick, torch.device("cpu"))
    except upstream.Missing as reason:
        pytest.skip(str(reason))
    assert training.wrong(sides) is None
    before = [p.detach().clone() for p in sides.our_params()]
    sides.ours()
    assert all((new != old).any() for new, old in zip(sides.our_params(), before))


def test_a_step_of_training_that_differs_is_not_timed(monkeypatch):
    case, params = training.CASES["training full"], torch.zeros(3)

    def one(moves, loss=1.0):
        params.add_(moves)
        return torch.tensor(loss)

    def sides(**other):
        return training.Sides(lambda: one(1.0), lambda: one(0.0, **other), lambda: [params], lambda: [params - 0.5])

    monkeypatch.setattr(training, "build", lambda *args: sides(loss=2.0))
    row = table.training_row(case, OPTIONS)
    assert "the loss is" in row["wrong"] and "ours_ms" not in row
    monkeypatch.setattr(training, "build", lambda *args: sides())
    assert "parameters' change" in table.training_row(case, OPTIONS)["wrong"]


def test_a_row_of_training_has_a_ratio(monkeypatch):
    row = table.training_row(training.CASES["training taylor"], OPTIONS)
    assert row["ratio"] > 0 and "step" in report.line(row)

    def missing(*args):
        raise upstream.Missing("not here")

    monkeypatch.setattr(training, "build", missing)
    row = table.training_row(training.CASES["training transformer"], OPTIONS)
    assert row["ratio"] is None and "not here" in report.line(row) and table.met(row) is None
