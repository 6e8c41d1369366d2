"""torch.compile and export of every operator that has a Triton kernel, by the kernels' source over `torch_triton`."""

from __future__ import annotations

from small_cases import SMALL

from fnattn.testing.apart import run_apart

# All of testing.operators.APART take a minute for each operator.
COMPILED = ["compile: grad(f)", "compile: jvp(f)", "compile: vmap(grad(f))", "export"]


def test_every_operator_is_right_compiled_and_exported():
    names = [f"{case}: {check}" for case in SMALL for check in COMPILED]
    answers = dict(run_apart("small_cases:apart", None, names))  # all in one process: starting one takes as long as two checks
    assert list(answers) == names and not {name: answer for name, answer in answers.items() if answer is not None}


def test_a_wrong_answer_is_one():
    (answer,) = dict(run_apart("small_cases:apart", None, ["scan: no such check"])).values()
    assert answer is not None
