"""causal_dot by pytorch-fast-transformers: every transform, the traps of its raw functions, and what it says without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import assert_close
from fnattn_kernels import fast_transformers
from fnattn_kernels.contracts import KernelUnavailable

from fnattn.ops import causal_dot
from fnattn.testing import CHECKS, brute, check_operator
from fnattn.testing.cases import CASES

REASON = fast_transformers.missing("cpu")
needs_package = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def wrapped(*args, reverse=False):
    """In float32 by the package; in and out float64, as the checks want it."""
    return causal_dot(*(a.float() for a in args), reverse=reverse, impl="fast_transformers").double()


def wrapped_reverse(*args):
    return wrapped(*args, reverse=True)


def true(*args):
    return brute.causal_dot(*args)


def true_reverse(*args):
    return brute.causal_dot(*args, reverse=True)


# Finite differences are meaningless in float32, the package's only precision.
SERVED = [name for name in CHECKS if not name.startswith(("gradcheck", "gradgradcheck")) and name != "export, free sizes"]
FEW = ["f", "vmap(grad(f))", "autograd: double backward"]


@needs_package
@pytest.mark.parametrize("case, fn, reference, only", [(CASES[0], wrapped, true, SERVED), (CASES[1], wrapped_reverse, true_reverse, FEW)],
                         ids=lambda p: getattr(p, "name", ""))
def test_every_transform_is_right(case, fn, reference, only):
    assert case.operator == "causal_dot"
    report = check_operator(fn, case.args(), reference=reference, rtol=1e-4, only=only)
    report.require()
    assert {row.check for row in report.rows if row.status == "refused"} <= {"meta device"}


def draw(*shapes, seed=3):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for shape in shapes]


@needs_package
def test_compiled_derivatives_are_right():
    q, k, v = draw((1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2))

    def loss(impl):
        return lambda q: causal_dot(q, k, v, impl=impl).sin().sum()

    got = torch.compile(torch.func.grad(loss("fast_transformers")), fullgraph=True, backend="aot_eager")(q)
    assert_close(got, torch.func.grad(loss("reference"))(q))
    assert got.abs().max() > 0


@needs_package
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("h, g", [(2, 2), (6, 2), (3, 1)])
def test_the_gradient_of_a_sum_is_right_although_it_is_an_expanded_tensor(h, g, reverse):
    grads = []
    for impl in ("fast_transformers", "reference"):
        args = [a.requires_grad_() for a in draw((2, h, 13, 5), (2, g, 13, 5), (2, g, 13, 3))]
        causal_dot(*args, reverse=reverse, impl=impl).sum().backward()
        grads.append([a.grad for a in args])
    for ours, plain in zip(*grads):
        assert_close(ours, plain)
        assert ours.abs().max() > 0


@needs_package
def test_strides_do_not_matter():
    q, k, v = draw((2, 2, 7, 5), (2, 2, 7, 5), (2, 2, 7, 3))
    strided = [torch.stack((t, t + 1), -1)[..., 0] for t in (q, k, v)]  # steps of two in the last axis
    expected = causal_dot(q, k, v, impl="fast_transformers")
    assert torch.equal(causal_dot(*strided, impl="fast_transformers"), expected)
    assert_close(expected, causal_dot(q, k, v, impl="reference"))


@needs_package
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    args = [t.to(dtype) for t in draw((1, 2, 29, 5), (1, 2, 29, 5), (1, 2, 29, 3))]
    got = causal_dot(*args, impl="fast_transformers")
    assert got.dtype == dtype
    assert_close(got.double(), brute.causal_dot(*(a.double() for a in args)), dtype)


@needs_package
@pytest.mark.parametrize("shapes", [((0, 2, 3, 5), (0, 2, 3, 5), (0, 2, 3, 1)), ((1, 2, 0, 5), (1, 2, 0, 5), (1, 2, 0, 1)),
                                    ((1, 2, 3, 0), (1, 2, 3, 0), (1, 2, 3, 1)), ((1, 2, 1, 5), (1, 2, 1, 5), (1, 2, 1, 1))])
def test_empty_and_single_positions_work(shapes):
    args = draw(*shapes)
    assert_close(causal_dot(*args, impl="fast_transformers"), causal_dot(*args, impl="reference"))


@needs_package
def test_float64_is_refused_and_not_rounded():
    args = [t.double() for t in draw((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2))]
    with pytest.raises(KernelUnavailable, match="float32 only"):
        causal_dot(*args, impl="fast_transformers")


@needs_package
def test_the_raw_operator_checks_shapes_before_foreign_code_sees_them():
    q, k, v = draw((1, 2, 5, 3), (1, 2, 4, 3), (1, 2, 4, 2))
    with pytest.raises(ValueError, match="fast_transformers: expected"):
        fast_transformers.dot(q, k, v, False)


def test_what_its_cuda_code_cannot_count_is_refused():
    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float32

        def __init__(self, *shape):
            self.shape = shape

        def is_floating_point(self):
            return True

    q, v = OnCuda(16, 16, 131072, 16), OnCuda(16, 16, 131072, 64)
    assert "fewer than 2^31 numbers" in fast_transformers.why_not(q, q, v)
    assert "fewer than" not in (fast_transformers.why_not(q, q, q) or "")


def test_without_the_package_the_reason_says_how_to_get_it():
    program = """
import sys
sys.modules["fast_transformers"] = None
import torch, fnattn
q = torch.ones(1, 1, 3, 2)
fnattn.ops.causal_dot(q, q, q)
try:
    fnattn.ops.causal_dot(q, q, q, impl="fast_transformers")
except fnattn.ops.causal_dot.__globals__["choose"].__globals__["KernelUnavailable"] as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "cannot be imported" in done.stdout and "pip install" in done.stdout, done.stderr
