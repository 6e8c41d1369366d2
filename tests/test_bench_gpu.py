"""The GPU's benchmark, as far as a machine without one can run it: other sides, verdicts, rows, budget, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close

from fnattn import ops, random
from fnattn.bench import fla, gpu, gpu_run, meter, numbers, upstream
from fnattn.bench.case import Work
from fnattn.bench.peaks import Peaks
from fnattn.cli import main
from fnattn.ops.report import CASES

CPU = torch.device("cpu")
PEAKS = dict.fromkeys((torch.bfloat16, torch.float32), Peaks(1e9, 1e9, 1e9, "as said"))
REPO = Path(__file__).resolve().parent.parent


def draw(*shapes):
    return [random.normal(random.fold_in(random.key(7), i), shape) for i, shape in enumerate(shapes)]


# ------------------------------------------------------------------------------------------------ flash-linear-attention


def test_taylor_by_their_oracle_is_ours():
    naive = pytest.importorskip("fla.ops.based.naive").naive_parallel_based
    q, k, v = draw((2, 3, 17, 5), (2, 3, 17, 5), (2, 3, 17, 7))
    # The oracle has heads before positions, unlike the kernels.
    theirs = fla.taylor(lambda *a: naive(*(t.transpose(1, 2) for t in a)).transpose(1, 2), q, k, v)
    assert_close(theirs, ops.taylor(q, k, v, impl="reference")[0])


@pytest.mark.parametrize("which", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_gate_loop_with_real_gates_by_their_oracle_is_ours(which):
    naive = getattr(pytest.importorskip("fla.ops.simple_gla.naive"), which)
    args = gpu._real_gates({"b": 2, "h": 3, "n": 17, "d": 5}, CPU)
    args = (*args[:3], args[3] * torch.tensor([0.2, 1.0]))  # gates that forget sooner
    assert_close(fla.gate_loop(naive, *args), ops.gate_loop(*args, impl="reference")[0])
    complex_gates = (*args[:3], draw((2, 3, 17, 2))[0])
    assert (fla.gate_loop(naive, *complex_gates) - ops.gate_loop(*complex_gates, impl="reference")[0]).abs().max() > 0.1


def test_scan_and_simple_gate_loop_by_their_oracle_are_ours():
    naive = pytest.importorskip("fla.ops.hgrn.naive").naive_recurrent_hgrn
    q, x, a = draw((2, 17, 5), (2, 17, 5), (2, 17, 5))
    assert_close(fla.scan(naive, a.sigmoid(), x), ops.scan(a.sigmoid(), x, impl="reference"))
    assert_close(fla.simple_gate_loop(naive, q, x, a), ops.simple_gate_loop(q, x, a, impl="reference")[0])


@pytest.mark.parametrize("operator, name", [(operator, name) for operator, peers in fla.PEERS.items() for name in peers])
def test_every_other_side_is_found_where_the_package_is(operator, name):
    pytest.importorskip("fla")
    assert callable(fla.peer(operator, name).args[0])


def test_without_the_package_the_other_side_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.based", None)
    with pytest.raises(upstream.Missing, match="fla-core: "):
        fla.peer("taylor", "fla parallel_based")


# ------------------------------------------------------------------------------------------------ verdicts and rows


def race(ours=None, **settings) -> gpu.Race:
    """Doubles a tensor."""
    def double(sizes, x, impl):
        return ours(x) if ours and impl == "fast" else 2 * x

    return gpu.Race("double", lambda s, device: (gpu.normal("x", s["n"], device=device),), double,
                    lambda s: (Work(3, 0, 8), Work(6, 0, 16)), ({"n": 7}, {"n": 4096}), {"n": 5}, {},
                    impls=("fast", "reference"), **settings)


def test_a_wrong_side_is_not_timed():
    made = race(lambda x: 2.1 * x, peers={"theirs": lambda s: lambda x: x + x}, yards={"yard": lambda s: lambda x: 3 * x})
    found = list(gpu_run.verdicts(made, CPU))
    assert {(row["side"], row["dtype"]) for row in found if "wrong" in row} == {("fast", "bfloat16"), ("fast", "float32")}
    rows = list(gpu_run.rows(made, gpu_run.refused(found), meter.Meter(CPU, 100), PEAKS))
    assert not [row for row in rows if row["side"] == "fast" and "ms" in row] and "the value is off" in gpu_run.line(rows[0])
    assert {row["side"] for row in rows if "ms" in row} == {"reference", "theirs", "yard"}
    assert {row["pass"] for row in rows if row["side"] == "theirs"} == {"forward", "forward+backward"}


def test_a_side_that_was_not_checked_is_not_timed_and_a_long_one_is_left_out():
    rows = list(gpu_run.rows(race(most={"reference": 7}), {("double", "reference", "float32"): None}, meter.Meter(CPU, 100), PEAKS))
    texts = [gpu_run.line(row) for row in rows if "ms" not in row]
    assert sum("was not checked in time" in text for text in texts) == 3 and sum("left out above 7 positions" in t for t in texts) == 1
    timed = [row for row in rows if "ms" in row]
    assert [row["pass"] for row in timed] == ["forward", "forward+backward", "jvp"]
    assert timed[0]["floor_ms"] == pytest.approx(8e-6) and timed[2]["units"] == timed[2]["ms"] / timed[0]["ms"]


def test_work_in_bfloat16_moves_half_the_bytes():
    rows = gpu_run.rows(race(), {("double", "reference", "bfloat16"): None}, meter.Meter(CPU, 100), PEAKS, True)
    assert next(row for row in rows if "ms" in row)["floor_ms"] == pytest.approx(4e-6)


def test_when_the_time_is_up_nothing_more_is_measured():
    watch = meter.Meter(CPU, -1.0)
    rows = list(gpu_run.rows(race(), dict.fromkeys([("double", "reference", "float32")]), watch, PEAKS))
    assert not [row for row in rows if "ms" in row] and "the time is up" in gpu_run.line(rows[-1])


def test_the_median_of_at_most_thirty_calls_counts():
    ticks, calls = iter(range(10 ** 6)), []
    watch = meter.Meter(CPU, 1e9, lambda: float(next(ticks)))
    assert watch.time(lambda: calls.append(1)) == 1e3 and len(calls) == 2 + 3


@pytest.mark.parametrize("name", gpu.RACES)
def test_every_race_builds_and_plain_torch_is_right_in_it(name):
    found = list(gpu_run.verdicts(gpu.RACES[name], CPU, True))
    assert not [row for row in found if "wrong" in row]
    assert {row["dtype"] for row in found if row["side"] == "reference" and "unavailable" not in row} == \
        {str(dtype).removeprefix("torch.") for dtype in gpu.RACES[name].dtypes}
    assert all(work.bytes + work.flops > 0 for size in gpu.RACES[name].sizes for work in gpu.RACES[name].work(size))


def test_the_sizes_are_those_asked_for():
    assert [s["n"] for s in gpu.RACES["taylor"].sizes] == [2048, 8192, 32768, 131072]
    assert gpu.RACES["gate_loop d1"].sizes == ({"b": 8, "h": 2048, "n": 8192, "d": 1},)
    assert gpu.RACES["decode KV"].passes == ("forward",)


# ------------------------------------------------------------------------------------------------ numbers, and the command


def test_a_wrong_kernel_is_found_in_value_gradient_and_tangent(monkeypatch):
    def spoiled(q, k, v, *rest):
        return 1.01 * ops.causal_dot(q, k, v, impl="reference")

    module = sys.modules["fnattn.ops.causal_dot"]
    monkeypatch.setattr(module, "KERNELS", (module.KERNELS[0]._replace(name="bad", run=spoiled, why_not=lambda *a: None),))
    rows = list(numbers.rows("causal_dot", "cpu", True))
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float16"]
    assert all(what in rows[0]["wrong"] for what in ("value", "gradient 0", "tangent")) and "WRONG" in numbers.line(rows[0])


def test_every_operator_with_a_kernel_is_asked():
    assert {"taylor", "gate_loop", "simple_gate_loop", "scan", "softmax_attention", "coor_descent", "conv_attention"} <= set(CASES)
    (row, *_) = numbers.rows("scan", "cpu", True)
    assert "needs CUDA tensors, got cpu" in row["unavailable"] or row["errors"]["tangent"] < 1e-5


def test_a_process_that_fails_or_takes_too_long_is_a_row():
    assert "ended with 1" in numbers.apart("numbers", "no such operator", "cpu", True, 100)[-1]["wrong"]
    assert "not done after" in numbers.apart("numbers", "scan", "cpu", True, 0.01)[-1]["wrong"]


def test_the_command_writes_every_row(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "fnattn", "bench", "--suite", "gpu", "--quick", "--case", "decode", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found["verdicts"]) == 6 and found["machine"]["peaks"]["float32"]["bytes"] > 1e6
    assert sum("ms" in row for row in found["results"]) == 4 and "not checked to the end: 0" in done.stdout


def test_a_case_that_is_not_there_is_refused(capsys):
    assert main(["bench", "--suite", "gpu", "--case", "no such case"]) != 0
    assert "expected a case of the GPU's suite" in capsys.readouterr().err


def test_check_prints_the_errors_of_kernels(monkeypatch, capsys):
    monkeypatch.setattr(numbers, "everywhere", lambda *a: [("numbers", [{"operator": "scan", "impl": "x", "wrong": "all of it"}])])
    assert main(["check", "--kernels", "--family", "simple_gate_loop", "--no-compile"]) == 1
    assert "WRONG: all of it" in capsys.readouterr().out
