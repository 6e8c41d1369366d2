"""Kernels that read bfloat16 themselves give what they give for the same numbers in float32, rounded once."""

from __future__ import annotations

import pytest
import torch
from conftest import FLUSHES, assert_close
from fnattn_kernels.native import build

from fnattn import ops

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(any(build.why_not(source) for source in ("scan", "rotary", "gate_loop", "causal_dot")),
                                reason="no C kernel here")


def heads_of_one(t):
    """[b, n, c] or [b, n, c, 2] as heads of width 1, where they lie."""
    return t.transpose(1, 2) if t.ndim == 4 else t.transpose(1, 2).unsqueeze(-1)


def gate_loop(q, k, v, a, h, product):
    out, (last, whole) = ops.gate_loop(*map(heads_of_one, (q, k, v, a)), state=(h[:, :, None, None], product), impl="native")
    return out, last, whole


# name: the call, the shapes of its rows after [b, n, c], those of its states after [b, c]
CASES = {
    "scan": (lambda a, x, h: ops.scan(a, x, h, impl="native"), ((), ()), ((),)),
    "scan, reverse": (lambda a, x, h: ops.scan(a, x, h, reverse=True, impl="native"), ((), ()), ((),)),
    "scan, pairs": (lambda a, x, h: ops.scan(a, x, h, pairs=True, impl="native"), ((2,), (2,)), ((2,),)),
    "scan, pairs, reverse": (lambda a, x, h: ops.scan(a, x, h, pairs=True, reverse=True, impl="native"), ((2,), (2,)), ((2,),)),
    "simple_gate_loop": (lambda *x: ops.simple_gate_loop(*x, impl="native"), ((),) * 3, ((),)),
    "simple_gate_loop, reverse": (lambda *x: ops.simple_gate_loop(*x, reverse=True, impl="native"), ((),) * 3, ((),)),
    "gate_loop": (gate_loop, ((), (), (), (2,)), ((2,), (2,))),
    "causal_dot": (lambda q, k, v: ops.causal_dot(q[:, None], k[:, None], v[:, None], impl="native"), ((),) * 3, ()),
    "causal_dot, reverse": (lambda q, k, v: ops.causal_dot(q[:, None], k[:, None], v[:, None], reverse=True, impl="native"), ((),) * 3, ()),
    "rotary": (lambda x, h: ops.rotary(x, torch.arange(x.shape[1]), h[0, :x.shape[2] // 3], impl="native"), ((),), ((),)),
}
every_case = pytest.mark.parametrize("name", CASES)


def inputs(name, b, n, c, sliced=False):
    """Rows in bfloat16, states in float32; `sliced`: rows that are parts of wider ones, not at a word's beginning."""
    source = torch.Generator().manual_seed(n + c)
    _, rows, states = CASES[name]
    rows = [torch.randn(b, n, c + 3 * sliced, *tail, generator=source).mul(0.6).to(BF16)[:, :, sliced:c + sliced] for tail in rows]
    return [*rows, *(torch.randn(b, c, *tail, generator=source) for tail in states)]


def results(name, args):
    out = CASES[name][0](*args)
    return list(out) if isinstance(out, tuple) else [out]


def with_gradients(name, args, **options):
    args = [a.detach().requires_grad_() for a in args]
    outs = results(name, args)
    source = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=source).to(BF16).to(o.dtype) for o in outs]
    return outs, torch.autograd.grad(outs, args, weights, **options), args


@every_case
@pytest.mark.parametrize("b, n, c", [(2, 67, 37), (1, 33, 64), (2, 3, 530), (1, 1, 5)])
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
def test_values_and_gradients_are_those_of_float32_rounded_once(name, b, n, c, sliced):
    low = inputs(name, b, n, c, sliced)
    outs, grads, _ = with_gradients(name, low)
    wide, wide_grads, _ = with_gradients(name, [t.float() for t in low])
    assert outs[0].dtype == BF16 and all(t.dtype == torch.float32 for t in outs[1:])
    assert [t.dtype for t in grads] == [t.dtype for t in low]
    for ours, theirs in zip((*outs, *grads), (*wide, *wide_grads)):
        assert theirs.any() or n == 1
        # A compiler may merge other products and sums here than there, which then and when shows in the last place.
        alike = torch.isclose(ours.float(), theirs.to(ours.dtype).float(), rtol=1e-4, atol=1e-5)
        assert alike.float().mean() > 0.98
        assert_close(ours, theirs.to(ours.dtype), ours.dtype)


@every_case
def test_second_derivatives_and_tangents_are_those_of_float64(name):
    low = inputs(name, 2, 35, 7)
    for moment in ("twice", "along"):
        found = []
        for args in (low, [t.double() for t in low]):
            if moment == "twice":
                _, grads, args = with_gradients(name, args, create_graph=True)
                total = sum(g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in grads)
                found.append(torch.autograd.grad(total, args))
            else:
                run = lambda *x: results(name, x)  # noqa: E731
                found.append(torch.func.jvp(run, tuple(args), tuple(a.cos() for a in args))[1])
        for ours, exact in zip(*found):
            assert exact.any()
            assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(BF16).eps * exact.abs().max()


@every_case
def test_vmap_is_a_loop(name):
    stacked = [torch.stack([t, -t, t / 2]) for t in inputs(name, 2, 9, 5)]
    for i, out in enumerate(zip(*torch.func.vmap(lambda *x: tuple(results(name, x)))(*stacked))):
        for ours, alone in zip(out, results(name, [t[i] for t in stacked])):
            assert torch.equal(ours, alone)


def test_a_wider_gate_or_state_widens_all():
    q, x, a, h = inputs("simple_gate_loop", 2, 9, 5)
    exact = ops.simple_gate_loop(q.double(), x.double(), a.double(), h.double())
    for args in ((q, x, a.float(), h), (q, x, a, h.double()), (q, x, a, h.to(BF16).double())):
        out, last = ops.simple_gate_loop(*args, impl="native")
        assert out.dtype == BF16 and last.dtype == (torch.float64 if args[3].dtype == torch.float64 else torch.float32)
    assert_close(last, ops.simple_gate_loop(q.double(), x.double(), a.double(), h.to(BF16).double())[1])
    assert_close(ops.simple_gate_loop(q, x, a, h.double())[1], exact[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_causal_dot_takes_the_rows_of_all_heads_apart(instructions, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for h, g, n, d, e in ((4, 2, 37, 19, 33), (3, 3, 16, 16, 67), (6, 1, 9, 5, 3)):
            low = [inputs("scan", 2, heads * n, width)[0].unflatten(1, (heads, n)) for heads, width in ((h, d), (g, d), (g, e))]
            found = []
            for args in (low, [t.float() for t in low]):
                leaves = [a.detach().requires_grad_() for a in args]
                out = ops.causal_dot(*leaves, impl="native")
                found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
            for ours, wide in zip(*found):
                assert wide.any() and ours.dtype == BF16
                assert_close(ours, wide.to(BF16), BF16)
    finally:
        torch.set_num_threads(before)


def settled(t):
    """t without subnormal numbers, of which a sum in the C kernels makes zeros, or not."""
    return t.where(~(t.abs() < torch.finfo(torch.float32).tiny), 0) if FLUSHES else t


def test_every_number_is_read_and_rounded_as_torch_does(instructions):
    """All of bfloat16, and float32 of every kind: halfway, subnormal, overflowing, infinite, not a number.

    Subnormal results of sums may be zeros on x86: see tests/kernels/test_subnormals.py.
    """
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(BF16)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    wide = (every.view(torch.int16).to(torch.int32)[:, None] * 65536 + low).flatten().view(torch.float32)
    for count in (len(wide), len(wide) - 5):  # whole vectors, and a rest
        state, zero, one = wide[None, :count], torch.zeros(1, 1, count, dtype=BF16), torch.ones(1, 1, count, dtype=BF16)
        for h in (ops.scan(one, zero, state, impl="native")[0, 0],
                  ops.scan(torch.stack((one, zero), -1)[:, :, ::2], torch.stack((zero, zero), -1)[:, :, ::2],
                           torch.stack((state, state), -1)[:, ::2], pairs=True, impl="native")[0, 0, :, 1]):
            expected = settled(state[0, ::1 if len(h) == count else 2])
            usual = expected.isfinite() if len(h) != count else ~expected.isnan()  # complex: infinity times 0
            assert torch.equal(settled(h)[usual], expected.to(BF16)[usual])
            assert h[expected.isnan()].isnan().all()
    held = ops.scan(zero[..., :1].expand(1, 1, len(every)), every[None, None], impl="native")[0, 0]
    turned = ops.rotate(every.view(1, -1, 2), torch.zeros(2**15, 1), impl="native").flatten()
    known = every.isfinite()
    both = known.view(-1, 2).all(-1).repeat_interleave(2)
    assert torch.equal(settled(held)[known], settled(every)[known]) and held[every.isnan()].isnan().all()
    assert torch.equal(turned[both], every[both]) and turned[every.isnan()].isnan().all()


def test_sums_are_rounded_once_to_the_nearest_and_from_the_middle_to_the_even():
    """Of 1 <= x < 2 and multiples of a quarter of its last bit, every fourth sum lies in the middle between two numbers."""
    x = 1 + torch.arange(128) / 128
    pairs = torch.cartesian_prod(x, torch.arange(-8, 9) / 512)  # both exact in bfloat16, and their sums in float32
    pairs = torch.cat((pairs, -pairs, torch.tensor([[torch.inf, 1.0], [1.0, -torch.inf], [torch.nan, 1.0], [torch.inf, -torch.inf]])))
    low = pairs.T.reshape(1, 2, -1).bfloat16()
    assert torch.equal(low[..., :-4].float(), pairs.T.reshape(1, 2, -1)[..., :-4])
    found, expected = ops.scan(torch.ones_like(low), low, impl="native")[0, 1], pairs.sum(1).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
