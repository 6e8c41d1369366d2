"""What `fnattn report` says of every kernel: whether it runs, why not, and which version of what."""

from __future__ import annotations

import io
import re

import pytest
import torch
from fnattn_kernels import contracts

from fnattn import ops
from fnattn.core import KernelUnavailable
from fnattn.ops.report import CASES, _zeros, rows
from fnattn.ops.report import report as print_report

ANSWERS = [answer for answer in rows() if answer.device == "cpu"]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a.operator}-{a.impl}")
def test_the_answer_is_what_a_call_by_that_name_meets(answer):
    case = CASES[answer.operator]
    small = {"b": 1, "h": 2, "n": 5, "d": 4}
    args = case.call(lambda *shape: _zeros(torch.float32, "cpu", *shape), small)
    try:
        getattr(ops, answer.operator)(*args, **case.options(small), impl=answer.impl)
    except KernelUnavailable as error:
        assert answer.reason and answer.reason in str(error)
    else:
        assert answer.reason is None


OURS = [a for a in ANSWERS if a.impl in ("native", "triton", "bands") and not a.reason]


@pytest.mark.parametrize("answer", OURS, ids=lambda a: f"{a.operator}-{a.impl}")
def test_the_version_names_dispatcher_operators(answer):
    first = answer.version.split(", ")[0]
    assert re.fullmatch(r"\w+_v\d+", first) and first in {operator.name for operator in contracts.OPERATORS}
    assert answer.impl == "bands" or answer.impl in first


def test_the_text_shows_versions():
    out = io.StringIO()
    print_report(out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["causal_dot", "cpu", "*", "native", "causal_dot_native_v2"] in lines
    assert ["causal_dot", "cpu", "reference", "torch", torch.__version__] in lines
