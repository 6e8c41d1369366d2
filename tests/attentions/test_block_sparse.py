"""Block-sparse attention against dense attention under the spread-out layout."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

import fnattn
from fnattn import ops, random, tree
from fnattn.attentions import block_sparse
from fnattn.ops import layouts


def dense(q, k, v, layout, block, causal, keep=None):
    n = q.shape[2]
    mask = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n][None].clone()
    if causal:
        mask = mask.tril()
    if keep is not None:
        mask = mask & keep[:, None, None, :]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


PATTERNS = [layouts.Dense(num_heads=3, block=4), layouts.Fixed(num_heads=3, block=4, num_local_blocks=2),
            layouts.Variable(num_heads=3, block=4, num_random_blocks=2, attention="unidirectional"),
            layouts.BigBird(num_heads=3, block=4, different_layout_per_head=True), layouts.LocalSlidingWindow(num_heads=3, block=4)]


def operands(n, seed=0, dtype=torch.float64):
    return [random.normal(key, (2, 3, n, width), dtype) for key, width in zip(random.split(random.key(seed), 3), (5, 5, 7))]


@pytest.mark.parametrize("impl", ["reference", "gather", "auto"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("n", [1, 29, 44])
def test_value_and_gradients_equal_dense_attention(pattern, causal, n, impl, poisoned_empty):
    layout = layouts.make(pattern, 44, key=random.key(1))
    q, k, v = operands(n)
    keep = torch.arange(n) % 5 != 2
    keep = torch.stack((keep, torch.zeros_like(keep)))
    weight = random.normal(random.key(2), (2, 3, n, 7), torch.float64)
    for given in (None, keep):
        ours = lambda q, k, v: ops.block_sparse_attention(q, k, v, layout, block=4, causal=causal, keep=given, impl=impl)  # noqa: B023,E731
        theirs = lambda q, k, v: dense(q, k, v, layout, 4, causal, given)  # noqa: B023,E731
        assert_close(ours(q, k, v), theirs(q, k, v))
        if given is not None:
            continue  # the dense formula has 0/0 gradients where a row is empty
        a, b = (torch.func.grad(lambda *x: (f(*x) * weight).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, theirs))  # noqa: B023
        for x, y in zip(a, b):
            assert_close(x, y)
        assert b[2].abs().max() > 0


def test_forward_mode_and_second_order_agree_between_the_forms():
    layout = layouts.make(PATTERNS[2], 44, key=random.key(1))
    q, k, v = operands(29)
    t = random.normal(random.key(5), tuple(q.shape), torch.float64)
    hvps = []
    for impl in ("reference", "gather"):
        f = lambda q: ops.block_sparse_attention(q, k, v, layout, block=4, causal=True, impl=impl).pow(2).sum()  # noqa: B023,E731
        hvps.append(torch.func.jvp(torch.func.grad(f), (q,), (t,))[1])
    assert_close(*hvps)
    assert hvps[0].abs().max() > 0


def test_a_mapped_layout_takes_the_reference():
    q, k, v = operands(29)
    many = torch.stack([layouts.make(PATTERNS[2], 44, key=random.key(s)) for s in (1, 2)])
    f = lambda layout: ops.block_sparse_attention(q, k, v, layout, block=4, causal=True)  # noqa: E731
    assert_close(torch.vmap(f)(many), torch.stack([f(m) for m in many]))
    with pytest.raises(fnattn.KernelUnavailable, match="mapped or traced here"):
        torch.vmap(lambda m: ops.block_sparse_attention(q, k, v, m, block=4, impl="gather"))(many)


@pytest.mark.parametrize("cfg", block_sparse.FAMILY.examples[:2], ids=["variable", "bigbird"])
def test_any_cuts_give_the_whole(cfg):
    params, x = block_sparse.init(random.key(0), cfg, dtype=torch.float64), random.normal(random.key(3), (2, 23, 7), torch.float64)
    mask = torch.arange(23) % 6 != 1
    mask = mask.expand(2, 23)
    whole, _ = block_sparse.apply(params, x, mask=mask)
    state, outs = block_sparse.init_state(params, 2, capacity=24), []
    for at, chunk in zip((0, 1, 8, 9), x.split((1, 7, 1, 14), 1)):
        out, state = block_sparse.apply(params, chunk, state, mask=mask[:, at:at + chunk.shape[1]])
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole)


def test_it_can_be_trained_and_the_layout_stays():
    cfg = block_sparse.FAMILY.examples[0]
    params, x = block_sparse.init(random.key(0), cfg), random.normal(random.key(3), (2, 23, 7))
    value, grads = tree.value_and_grad(lambda p: block_sparse.apply(p, x)[0].pow(2).mean())(params)
    assert grads.layout is None and grads.to_qkv.abs().max() > 0


def test_members_of_an_ensemble_have_their_own_layouts():
    cfg = block_sparse.FAMILY.examples[0]
    keys = random.split(random.key(0), 3)
    many = torch.vmap(lambda key: block_sparse.init(key, cfg))(keys)
    x = random.normal(random.key(3), (2, 23, 7))
    out = torch.vmap(lambda p: block_sparse.apply(p, x)[0])(many)
    assert_close(out, torch.stack([block_sparse.apply(block_sparse.init(key, cfg), x)[0] for key in keys]))


P = block_sparse.init(random.key(0), block_sparse.FAMILY.examples[0])
X = random.normal(random.key(3), (2, 23, 7))


@pytest.mark.parametrize("wrong, error, text", [
    (lambda: block_sparse.apply(P, random.normal(random.key(0), (1, 27, 7))), ValueError, r"x has 27 positions, but the layout covers 26"),
    (lambda: block_sparse.apply(P, X, context=X), ValueError, r"block_sparse\.apply: cannot take context"),
    (lambda: block_sparse.apply(P, X, block_sparse.init_state(P, 2, capacity=20)), ValueError, r"holds 0 of 20 positions and 23 more"),
    (lambda: block_sparse.init_state(P, 2, capacity=27), ValueError, r"capacity must lie in \[1, 26\]"),
    (lambda: block_sparse.Config(dim=4, seq_len=8, pattern=layouts.Dense(num_heads=2)), ValueError, r"must have num_heads=8 and block=16"),
    (lambda: ops.block_sparse_attention(*operands(8), torch.ones(1, 2, 2), block=4), TypeError, r"layout must be a bool tensor"),
    (lambda: ops.block_sparse_attention(*operands(9), torch.ones(1, 2, 2).bool(), block=4), ValueError, r"nb at least 3"),
])
def test_bad_input_is_named(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()
