"""Numbers below the least normal one: on x86 the C kernels make zeros of them, which costs nothing, and leave the machine as it was.

A state that decays, or a probability far below the largest, would else take a hundred cycles for each step through that range: the
gradient of a last position alone took twelve times as long, sharp scores of coordinate descent forty times.
"""

from __future__ import annotations

import pytest
import torch
from conftest import FLUSHES
from fnattn_kernels.native.build import why_not

from fnattn import ops, random

pytestmark = pytest.mark.skipif(why_not("gate_loop") is not None, reason="needs a C compiler")
N, C = 263, 67


def drawn(name, *shape):
    return random.normal(random.fold_in(random.key(0), name), shape)


def heads(t, width):
    return t.unflatten(-1, (-1, width)).transpose(1, 2)


def until(t, last=29):
    """Nothing behind the first positions: from there on a state only decays."""
    return torch.where(torch.arange(t.shape[1])[:, None] < last, t, 0.0)


def scan(impl):
    x, a = until(drawn("x", 2, N, C)), drawn("a", 2, N, C).sigmoid()
    return (ops.scan(a, x, impl=impl),)


def simple(impl):
    x = until(drawn("x", 2, N, C))
    return ops.simple_gate_loop(drawn("q", 2, N, C), x, drawn("a", 2, N, C), impl=impl)


def narrow(impl):
    x = heads(until(drawn("x", 2, N, C)), 1)
    return tuple(ops.gate_loop(heads(drawn("q", 2, N, C), 1), x, x, heads(drawn("a", 2, N, 2 * C) / 3, 2), impl=impl))


def wide(impl):
    x = heads(until(drawn("x", 2, N, 66)), 11)
    return tuple(ops.gate_loop(heads(drawn("q", 2, N, 66), 11), x, x, heads(drawn("a", 2, N, 12) / 3, 2), impl=impl))


def last_alone(loop):
    """The gradient of the last position's result: it decays on its way back."""
    def run(impl):
        x = drawn("x", 2, N, 66).requires_grad_()
        return torch.autograd.grad(loop(x, impl).sum(), x)
    return run


GRADIENTS = {
    "scan": lambda x, impl: ops.scan(drawn("a", 2, N, 66).sigmoid(), x, impl=impl)[:, -1],
    "simple": lambda x, impl: ops.simple_gate_loop(drawn("q", 2, N, 66), x, drawn("a", 2, N, 66), impl=impl)[0][:, -1],
    "narrow": lambda x, impl: ops.gate_loop(*(heads(t, 1) for t in (x.detach(), x, x.detach())),
                                            heads(drawn("a", 2, N, 132) / 3, 2), impl=impl)[0][:, :, -1],
    "wide": lambda x, impl: ops.gate_loop(*(heads(t, 11) for t in (x.detach(), x, x.detach())),
                                          heads(drawn("a", 2, N, 12) / 3, 2), impl=impl)[0][:, :, -1],
}


def descent(solver):
    return lambda impl: (ops.coor_descent(4 * drawn("s", 3, 5, N), k=3.0, eps=0.1, n_iters=11, solver=solver, impl=impl),)


CALLS = {"scan": scan, "simple": simple, "narrow": narrow, "wide": wide, "iterate": descent("iterate"), "exact": descent("exact"),
         **{f"{name}, gradient": last_alone(loop) for name, loop in GRADIENTS.items()}}


def leaves(results):
    return [t for t in torch.utils._pytree.tree_leaves(results) if t.is_floating_point()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_they_are_zeros_and_the_rest_is_what_it_is(name, threads):
    before, tiny = torch.get_num_threads(), torch.finfo(torch.float32).tiny
    torch.set_num_threads(threads)
    try:
        ours = leaves(CALLS[name]("native"))
        theirs = leaves(CALLS[name]("reference"))
        least = torch.full((1 << 19,), tiny)
        assert (least / 4 > 0).all()  # in this thread and in the others
    finally:
        torch.set_num_threads(before)
    assert any(((t.abs() > 0) & (t.abs() < tiny)).any() for t in theirs), "nothing is subnormal: this shows nothing"
    for a, b in zip(ours, theirs, strict=True):
        # Closer than the table of conftest asks: float32 on both sides, and the largest entry sets the size of what is rounded.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())
        if FLUSHES:
            assert not ((a.abs() > 0) & (a.abs() < tiny)).any()
