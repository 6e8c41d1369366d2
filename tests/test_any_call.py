"""Operators called with any sizes and options on tensors in any order of memory: every implementation gives the reference's numbers.

In value, gradient, tangent and second order. What a table of cases cannot foresee is found here: a kernel that reads what another
order of memory put there, an option that only matters together with another.
"""

from __future__ import annotations

import pytest
import torch
from any_calls import CALLS
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native.build import why_not
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp
from torch.utils._pytree import tree_leaves

from fnattn.testing.cases import CASES, REFERENCE, kernels

# Made smaller, a failing call would hardly say more, and take minutes.
MANY = settings(max_examples=50, deadline=None, derandomize=True, phases=(Phase.generate,))


def laid_out(draw, t):
    """The same numbers in another order of memory."""
    order = draw(st.sampled_from(("as it is", "moved", "spread", "turned")))
    if t.ndim < 2 or order == "as it is":
        return t
    axis = draw(st.integers(0, t.ndim - 1))
    return {"moved": lambda: t.movedim(axis, -1).contiguous().movedim(-1, axis), "spread": lambda: torch.stack((t, t), -1)[..., 0],
            "turned": lambda: t.mT.contiguous().mT}[order]()


def derivatives(fn, args, tangents):
    """Value, gradient, tangent, and tangent of the gradient."""
    every = tuple(range(len(args)))

    def outs(*args):
        return tuple(tree_leaves(fn(*args)))

    def loss(*args):
        return sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)).sin().sum() for o in outs(*args))

    return {"value": outs(*args), "gradient": grad(loss, every)(*args), "tangent": jvp(outs, args, tangents)[1],
            "tangent of the gradient": jvp(grad(loss, every), args, tangents)[1]}


@pytest.mark.parametrize("name", CALLS)
def test_every_implementation_gives_the_numbers_of_the_reference(name):
    impls = {"auto", *(impl for case in CASES if case.operator == name for impl in kernels(case.module))}
    served = set()

    @MANY
    @given(st.data())
    def check(data):
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        call, args = CALLS[name](data.draw)
        args = tuple(laid_out(data.draw, t) for t in args)
        tangents = tuple(laid_out(data.draw, torch.randn_like(t)) for t in args)
        expected = derivatives(lambda *args: call(REFERENCE, *args), args, tangents)
        for impl in sorted(impls):
            try:
                answers = derivatives(lambda *args, impl=impl: call(impl, *args), args, tangents)
            except KernelUnavailable:
                continue
            served.add(impl)
            for what, found in answers.items():
                for ours, theirs in zip(found, expected[what], strict=True):
                    # Two correct orders of summation over up to 129 terms, in float64; entries of a tensor that cancels to nothing are
                    # rounding only, hence the floor.
                    size = max(theirs.abs().max().item() if theirs.numel() else 0.0, 1e-2)
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * size, msg=lambda m, at=(impl, what): f"{at}: {m}")

    check()
    assert served >= impls & {"auto", *(["native"] if why_not("causal_dot") is None else [])}


def test_no_operator_is_left_out():
    assert set(CALLS) == {case.operator for case in CASES} - {"masked_softmax"}  # whose only kernel computes in float32
