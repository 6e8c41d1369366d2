"""The FLOP formulas of the operators, against counts by hand on small shapes."""

from __future__ import annotations

import pytest
import torch
from fnattn_kernels import contracts
from torch.utils.flop_counter import FlopCounterMode

from fnattn import ops

contracts.register_flops()

# b = 2, h = 6, g = 3, n = 5, d = 4, e = 7, all sums written as a product and an addition
Q, K, V = (2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 7)
ROWS, PAIRS = 2 * 6 * 5, 2 * 6 * 5 * 5
KEYS, F = 2 * 3 * 5, 1 + 4 + 10
SOLVER = {"n_iters": 3, "eps": 0.3}
BY_HAND = {
    # Per query: k v^T added to a state of d e numbers, the state multiplied by q and summed.
    "causal_dot": (lambda *x: ops.causal_dot(*x, impl="native"), (Q, K, V), ROWS * (2 * 4 * 7 + 2 * 4 * 7)),
    "scan": (lambda a, x: ops.scan(a, x, impl="native"), ((2, 5, 3),) * 2, 2 * 5 * 3 * 2),
    # A product of complex numbers is four products and two sums; adding one, two sums.
    "scan, pairs": (lambda a, x: ops.scan(a, x, pairs=True, impl="native"), ((2, 5, 3, 2),) * 2, 2 * 5 * 3 * (4 + 2 + 2)),
    # Per key: its F features by [v, 1] into the sums; per query: the sums by its features.
    "taylor": (lambda *x: ops.taylor(*x, impl="native")[0], (Q, K, V), 2 * F * 8 * ROWS + 2 * F * 8 * KEYS),
    # Gate by state 6; k v 1, added to the real part 1; by q 1, summed 1.
    "gate_loop": (lambda *x: ops.gate_loop(*x, impl="native")[0], (Q, Q, (2, 6, 5, 7), (2, 6, 5, 2)), ROWS * 4 * 7 * 10),
    "gate_loop, width 1": (lambda *x: ops.gate_loop(*x, impl="native")[0], ((2, 6, 5, 1),) * 3 + ((2, 6, 5, 2),), ROWS * 10),
    "simple_gate_loop": (lambda *x: ops.simple_gate_loop(*x, impl="native")[0], ((2, 5, 3),) * 3, 2 * 5 * 3 * 3),
    "softmax_attention": (lambda *x: ops.softmax_attention(*x, impl="native"), (Q, K, V), PAIRS * (2 * 4 + 2 * 7)),
    # Two products with cosines and two with sines, two sums, per pair of channels.
    "rotary": (lambda x: ops.rotary(x, torch.arange(5), torch.ones(2), impl="native"), (Q,), ROWS * 2 * 6),
    # A square, a sum, two products.
    "rms_norm": (lambda *x: ops.rms_norm(*x, impl="native"), ((2, 3, 5), (5,)), 2 * 3 * 5 * 4),
    # Per entry and iteration six operations, and as many for the result.
    "coor_descent": (lambda s: ops.coor_descent(s, 2.0, **SOLVER, impl="native"), ((2, 3, 5),), 2 * 3 * 5 * 6 * 4),
    "coor_descent, exact": (lambda s: ops.coor_descent(s, 2.0, solver="exact", impl="native"), ((2, 3, 5),), 2 * 3 * 5 * 6 * 2),
    "coor_descent_attention": (lambda *x: ops.coor_descent_attention(*x, sparsity_k=2.0, **SOLVER, impl="native"), (Q, K, V),
                               PAIRS * (2 * 4 + 2 * 7 + 6 * 4)),
}


def counted(fn, *args):
    with FlopCounterMode(display=False) as count:
        fn(*args)
    own = {str(op): n for op, n in count.get_flop_counts()["Global"].items() if str(op).startswith(contracts.NAMESPACE)}
    assert own
    return sum(own.values())


@pytest.mark.parametrize("name", BY_HAND)
def test_a_forward_pass_counts_what_a_hand_counts(name):
    fn, shapes, expected = BY_HAND[name]
    assert counted(fn, *(torch.rand(shape) for shape in shapes)) == expected


@pytest.mark.parametrize("name, times", [("causal_dot", 3), ("softmax_attention", 2.5), ("gate_loop", 3), ("gate_loop, width 1", 3)])
def test_a_backward_pass_is_as_many_products(name, times):
    """Three products of the same kind for causal_dot, five instead of two for softmax, thirty operations instead of ten for gates."""
    fn, shapes, forward = BY_HAND[name]
    args = [torch.rand(shape, requires_grad=True) for shape in shapes]
    assert counted(lambda: fn(*args).sum().backward()) == forward * (1 + times)


def test_every_operator_has_a_formula():
    from torch.utils.flop_counter import flop_registry
    missing = [operator.name for operator in contracts.OPERATORS if operator.packet not in flop_registry
               and operator.qualified not in map(str, flop_registry)]
    assert not missing
