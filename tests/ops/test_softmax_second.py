"""Second derivatives of softmax_attention by the native kernel, in every mode, and the memory that it all takes."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import softmax as native
from softmax_cases import CASES, F32, F64, attending, brute, directions, make
from torch._subclasses import FakeTensorMode

from fnattn.ops import softmax
from fnattn.ops.softmax import softmax_attention
from fnattn.testing.memory import peak_bytes

MASKS = ["mask of pairs, causal", "mask of everything, causal", "queries before the first key", "one key head, wide values"]


def raw(case, dtype=F64):
    """The raw operators' arguments: q, k, v, mask; g; start and scale."""
    (q, k, v), options = make(case, dtype)
    shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    mask = softmax._check_mask(options.get("mask"), shape)
    start, mask = softmax._start(shape[2], shape[3], mask, options.get("causal", False), options.get("offset"), q.device)
    scale = options.get("scale", q.shape[3] ** -0.5)
    return (q, k, v, mask), directions([v.new_empty(*shape[:3], v.shape[3])], 3)[0], (start, scale)


def slopes(case):
    """The gradient of g . attention in q, k and v, as a function of g, q, k, v, by the average row by row."""
    _, options = make(case)
    fn = attending("reference", options) if case == "several tiles" else lambda *a: brute(*a, **options)
    return lambda g, q, k, v: torch.func.vjp(fn, q, k, v)[1](g)


def by_operator(case, moves, dtype=F64):
    given, g, rest = raw(case, dtype)
    outs = native.attend(*given, *rest)
    tangents = native.attend_tangent(*given, *outs, *moves[1:], *rest)
    return native.attend_second(g, *given, *outs, *tangents, *moves, *rest)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_the_tangent_of_the_gradient(case, dtype):
    (q, k, v, _), g, _ = raw(case)
    moves = directions((g, q, k, v))
    for given in ((True,) * 4, (False, True, True, True), (True, False, False, False), (False, False, True, False)):
        some = tuple(t if there else None for t, there in zip(moves, given))
        whole = tuple(torch.zeros_like(t) if m is None else t for t, m in zip(moves, some))
        _, expected = torch.func.jvp(slopes(case), (g, q, k, v), whole)
        found = by_operator(case, tuple(t if t is None else t.to(dtype) for t in some), dtype)
        for ours, theirs in zip(found, expected):
            assert ours.dtype == dtype and (theirs.abs().max() > 0 or given != (True,) * 4)
            assert_close(ours, theirs)


def products(fn, tensors, moves):
    """Hessian-vector products of a loss in four ways."""
    def loss(*a):
        return fn(*a).square().sum()

    slope = torch.func.grad(loss, (0, 1, 2))
    forward = torch.func.jvp(slope, tensors, moves)[1]
    reverse = torch.func.vjp(slope, *tensors)[1](moves)
    crossed = torch.func.grad(lambda *a: torch.func.jvp(loss, a, moves)[1], (0, 1, 2))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    tape = torch.autograd.grad(sum((g * m).sum() for g, m in zip(grads, moves)), leaves)
    return forward, reverse, crossed, tape


@pytest.mark.parametrize("case", CASES)
def test_hessian_vector_products_of_every_mode_equal_those_of_plain_torch(case):
    tensors, options = make(case)
    moves = directions(tensors)
    expected = products(attending("reference", options), tensors, moves)[0]
    for found in products(attending("native", options), tensors, moves):
        for ours, theirs in zip(found, expected):
            assert theirs.abs().max() > 0
            assert_close(ours, theirs)


@pytest.mark.parametrize("case", MASKS)
def test_without_a_compiler_or_in_poisoned_memory_second_derivatives_are_the_same(case, monkeypatch, poisoned_empty):
    tensors, options = make(case)
    moves = directions(tensors)
    expected = products(attending("native", options), tensors, moves)
    monkeypatch.setattr(native, "why_not", lambda source: "no compiler")
    monkeypatch.setattr(native.aten, "BLOCK", 1 << 6)
    for found, theirs in zip(products(attending("native", options), tensors, moves), expected):
        for a, b in zip(found, theirs):
            assert_close(a, b)


@pytest.mark.parametrize("case", ["mask of everything, causal", "one key head, wide values"])
def test_third_derivatives_and_tangents_of_tangents_equal_those_of_the_reference(case):
    tensors, options = make(case)
    moves, others = directions(tensors), directions(tensors, 11)

    def every(impl):
        def loss(*a):
            return attending(impl, options)(*a).pow(3).sum()

        def along(*a):
            return torch.func.jvp(loss, a, moves)[1]

        def hessian(*a):
            return torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), a, moves)[1]

        return (*torch.func.jvp(hessian, tensors, others)[1], *torch.func.vjp(hessian, *tensors)[1](others),
                torch.func.jvp(along, tensors, others)[1])

    for ours, theirs in zip(every("native"), every("reference")):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs)


def test_products_of_whole_sequences_are_batched_by_vmap():
    tensors, options = make("mask of pairs, causal")
    moves = [directions(tensors, seed) for seed in range(3)]
    slope = torch.func.grad(lambda *a: attending("native", options)(*a).square().sum(), (0, 1, 2))
    mapped = torch.vmap(lambda *m: torch.func.jvp(slope, tensors, m)[1])(*map(torch.stack, zip(*moves)))
    looped = zip(*(torch.func.jvp(slope, tensors, m)[1] for m in moves))
    for ours, theirs in zip(mapped, looped):
        assert_close(ours, torch.stack(theirs))


def test_the_operator_gives_the_same_bits_for_any_number_of_threads():
    (q, k, v, mask), g, rest = raw("several tiles", F32)
    q, k, v, g = (t.repeat(3, 1, 1, 4) for t in (q, k, v, g))
    moves = directions((g, q, k, v))
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs = native.attend(q, k, v, mask, *rest)
            tangents = native.attend_tangent(q, k, v, mask, *outs, *moves[1:], *rest)
            found.append(native.attend_second(g, q, k, v, mask, *outs, *tangents, *moves, *rest))
    finally:
        torch.set_num_threads(1)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0]))


# ------------------------------------------------------------------------------------------------ memory and layout


def test_no_mode_holds_a_table():
    n = 521
    tensors = tuple(t.float() for t in directions([torch.empty(1, 2, n, 8)] * 3))
    moves = directions(tensors)

    def loss(*a):
        return softmax_attention(*a, causal=True, impl="native").square().sum()

    slope = torch.func.grad(loss, (0, 1, 2))
    modes = {"forward over reverse": lambda *a: torch.func.jvp(slope, a, moves)[1],
             "reverse over reverse": lambda *a: torch.func.vjp(slope, *a)[1](moves),
             "reverse over forward": lambda *a: torch.func.grad(lambda *x: torch.func.jvp(loss, x, moves)[1], (0, 1, 2))(*a)}
    assert 2 * n * n * 4 > 30 * tensors[0].nbytes  # one table
    for name, fn in modes.items():
        assert peak_bytes(fn, *tensors) < 30 * tensors[0].nbytes, name


def split(qkv, heads):
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]


def test_heads_of_one_projection_are_neither_copied_before_nor_after():
    qkv = directions([torch.empty(2, 131, 3 * 2 * 5)])[0].float()

    def attention(qkv):
        return softmax_attention(*split(qkv, 2), causal=True, impl="native").transpose(1, 2).flatten(2)

    out = attention(qkv)
    assert peak_bytes(attention, qkv) == out.nbytes + 2 * out.nbytes // 5  # and the logarithms of the sums, in float64
    assert_close(out, softmax_attention(*split(qkv.double(), 2), causal=True).transpose(1, 2).flatten(2), F32)


def test_traced_results_lie_in_memory_as_the_real_ones():
    given, g, rest = raw("mask of everything, causal")
    moves = directions((g, *given[:3]))

    def run(q, k, v, mask, g, tg, tq, tk, tv):
        outs = native.attend(q, k, v, mask, *rest)
        tangents = native.attend_tangent(q, k, v, mask, *outs, tq, tk, tv, *rest)
        return (*outs, *tangents, *native.attend_backward(g, q, k, v, mask, *outs, *rest),
                *native.attend_second(g, q, k, v, mask, *outs, *tangents, tg, tq, tk, tv, *rest))

    real = run(*given, g, *moves)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(t) for t in (*given, g, *moves)))
    for a, b in zip(real, fake):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
