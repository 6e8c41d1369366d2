"""A state that init_state does not give for these params and this batch is refused by name, in one pass and in a step alike.

Such a state often fits by broadcasting or by cutting, and then the numbers are wrong without an error.
"""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

import fnattn
from fnattn import EMPTY, random, tree
from fnattn.attentions import (
    FAMILIES,
    block_sparse,
    coor_descent,
    full,
    gate_loop,
    gate_loop_full,
    simple_gate_loop,
    sparse_axial,
    sparse_conv,
    taylor,
)

BATCH, CAPACITY = 3, 13
KEY = random.key(3)


def streams(cfg) -> bool:
    try:
        fnattn.init_state(fnattn.init(KEY, cfg), 1, capacity=1)
    except ValueError:
        return False
    return True


EXAMPLES = [(name, cfg) for name, family in FAMILIES.items() for cfg in family.examples]
STREAMING = [(name, cfg) for name, cfg in EXAMPLES if streams(cfg)]
lengths = pytest.mark.parametrize("n", [1, 2], ids=["step", "pass"])
each = pytest.mark.parametrize("name, cfg", STREAMING, ids=str)


def made(cfg, n, batch=BATCH, dtype=torch.float32):
    params = fnattn.init(KEY, cfg, dtype=dtype)
    return params, random.normal(KEY, (batch, n, cfg.dim)).to(dtype), fnattn.init_state(params, batch, capacity=CAPACITY)


def refused(name, params, x, state, error=(ValueError, TypeError)):
    with pytest.raises(error) as caught:
        fnattn.apply(params, x, state)
    first, _, remedy = str(caught.value).partition("\n  ")
    assert first.startswith(f"{name}.apply: ") and "state must " in first and "; got " in first and "init_state(params, batch" in remedy
    return first


def with_leaf(state, which, new):
    leaves = tree.leaves(state)
    leaves[which] = new
    return tree.unflatten(leaves, tree.structure(state))


@lengths
@each
def test_a_leaf_of_another_shape_is_named(name, cfg, n):
    params, x, state = made(cfg, n)
    for which, (path, t) in enumerate(tree.to_flat(state).items()):
        others = [t[None]] + ([t[:1], torch.cat((t, t)), t[..., :-1], t.expand(2, *t.shape).reshape(-1, *t.shape[1:])] if t.ndim else [])
        for other in others:
            if other.shape != t.shape:
                assert path in refused(name, params, x, with_leaf(state, which, other.contiguous()), ValueError)


@lengths
@each
def test_a_leaf_of_another_or_a_narrower_dtype_is_named(name, cfg, n):
    params, x, state = made(cfg, n)
    for which, (path, t) in enumerate(tree.to_flat(state).items()):
        for dtype in (torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.complex64):
            if dtype != t.dtype:
                text = refused(name, params, x, with_leaf(state, which, t.to(dtype)), TypeError)
                assert path in text and str(t.dtype) in text and str(dtype) in text


@lengths
@each
def test_a_leaf_that_is_no_tensor_is_named(name, cfg, n):
    params, x, state = made(cfg, n)
    for field in state._fields:
        for wrong in (None, 3, [1.0], "k"):
            text = refused(name, params, x, state._replace(**{field: wrong}), (TypeError, ValueError))
            assert field in text and type(wrong).__name__ in text
        if getattr(state, field) != EMPTY:
            assert f"got nothing in {field}" in refused(name, params, x, state._replace(**{field: EMPTY}), ValueError)
        else:
            assert "must have nothing" in refused(name, params, x, state._replace(**{field: torch.zeros(2)}), ValueError)


@lengths
@each
def test_another_kind_of_state_is_a_type_error(name, cfg, n):
    params, x, state = made(cfg, n)
    others = [made(other, n)[2] for _, other in STREAMING]
    for wrong in (None, x, [state], {"state": state}, (), (x,), tuple(state), *others):
        if type(wrong) is not type(state):
            text = refused(name, params, x, wrong, TypeError)
            assert type(wrong).__name__ in text


@pytest.mark.parametrize("name, cfg", [pair for pair in EXAMPLES if pair not in STREAMING], ids=str)
def test_whoever_has_no_state_takes_none_but_the_empty_one(name, cfg):
    params, x = fnattn.init(KEY, cfg), random.normal(KEY, (BATCH, 2, cfg.dim))
    fnattn.apply(params, x, EMPTY)
    for wrong in (None, x, (x,), made(*[STREAMING[0][1]], 1)[2]):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\.apply: .*\n  "):
            fnattn.apply(params, x, wrong)


@each
def test_a_wider_state_is_taken_and_comes_back_as_wide(name, cfg):
    params, x, state = made(cfg, 8)
    wide = tree.map(lambda t: t.double() if t.is_floating_point() else t, state)
    after, wide_after = state, wide
    for chunk in x.split((2, 5, 1), 1):
        expected, after = fnattn.apply(params, chunk, after)
        out, wide_after = fnattn.apply(params, chunk, wide_after)
        assert out.dtype == x.dtype
        assert_close(out, expected)
    assert [t.dtype for t in tree.leaves(wide_after)] == [t.dtype for t in tree.leaves(wide)]
    assert [t.shape for t in tree.leaves(wide_after)] == [t.shape for t in tree.leaves(after)]


PICTURE = {"dim": 7, "heads": 2, "dim_head": 5}
CONV = sparse_conv.Config(**PICTURE, seq_len=18, image_size=4, kernel_size=3)
AXIAL = sparse_axial.Config(**PICTURE, seq_len=18, image_size=4)
ANOTHER = {
    "sparse_conv, a longer text": (CONV, sparse_conv.Config(**PICTURE, seq_len=20, image_size=4, kernel_size=3)),
    "sparse_conv, a larger picture": (CONV, sparse_conv.Config(**PICTURE, seq_len=27, image_size=5, kernel_size=3)),
    "sparse_conv, a larger window": (CONV, sparse_conv.Config(**PICTURE, seq_len=18, image_size=4, kernel_size=5)),
    "sparse_conv, of sparse_axial": (CONV, AXIAL),
    "sparse_axial, of sparse_conv": (AXIAL, CONV),
    "sparse_axial, the other axis": (AXIAL, sparse_axial.Config(**PICTURE, seq_len=18, image_size=4, axis=1)),
    "taylor, heads of another width": (taylor.Config(dim=7, causal=True, heads=3, dim_head=2),
                                       taylor.Config(dim=7, causal=True, heads=2, dim_head=3)),
    "taylor, one key head": (taylor.Config(dim=7, causal=True, heads=3, dim_head=2),
                             taylor.Config(dim=7, causal=True, heads=3, dim_head=2, one_headed_kv=True)),
    "taylor, without the last token": (taylor.Config(dim=7, causal=True, heads=3, dim_head=2, shift_tokens=True),
                                       taylor.Config(dim=7, causal=True, heads=3, dim_head=2)),
    "gate_loop, other heads": (gate_loop.Config(dim=6, heads=2), gate_loop.Config(dim=6, heads=3)),
    "gate_loop without decay, other heads": (gate_loop.Config(dim=6, heads=2, ablate_state_transition=True), gate_loop.Config(dim=6)),
    "gate_loop_full, which decays": (gate_loop_full.Config(dim=7, heads=3, dim_head=2),
                                     gate_loop_full.Config(dim=7, heads=3, dim_head=2, data_dependent_rel_pos=True)),
    "simple_gate_loop, another width": (simple_gate_loop.Config(dim=7), simple_gate_loop.Config(dim=5)),
    # So many channels in all, split otherwise: rows of the same length, in which every number stands elsewhere.
    "full, heads of another width": (full.Config(dim=7, seq_len=13, heads=4, dim_head=2),
                                     full.Config(dim=7, seq_len=13, heads=2, dim_head=4)),
    "coor_descent, heads of another width": (coor_descent.Config(dim=7, heads=4, dim_head=2),
                                             coor_descent.Config(dim=7, heads=2, dim_head=4)),
    "block_sparse, heads of another width": (block_sparse.Config(dim=7, seq_len=13, heads=4, dim_head=2, block_size=3),
                                             block_sparse.Config(dim=7, seq_len=13, heads=2, dim_head=4, block_size=3)),
}


@lengths
@pytest.mark.parametrize("which", ANOTHER)
def test_the_state_of_another_config_is_refused(which, n):
    ours, theirs = ANOTHER[which]
    params, x, _ = made(ours, n)
    refused(which.partition(",")[0].partition(" ")[0], params, x, made(theirs, n)[2], ValueError)


@lengths
@each
def test_the_state_of_another_batch_is_refused(name, cfg, n):
    params, x, _ = made(cfg, n)
    for batch in (1, 2, 6):
        refused(name, params, x, fnattn.init_state(params, batch, capacity=CAPACITY), ValueError)
    refused(name, params, x[:1], fnattn.init_state(params, BATCH, capacity=CAPACITY), ValueError)


@lengths
@each
def test_a_wrong_state_after_right_ones_is_refused_too(name, cfg, n):
    """Instructions of a step that were kept for the right states serve no other."""
    params, x, state = made(cfg, n)
    for _ in range(3):
        _, state = fnattn.apply(params, x, state)
    for which, t in enumerate(tree.leaves(state)):
        other = t[None] if not t.ndim else t[..., :-1]
        if other.shape != t.shape:
            refused(name, params, x, with_leaf(state, which, other.contiguous()), ValueError)


@each
def test_what_maps_and_what_has_no_numbers_is_looked_at_too(name, cfg):
    params, x, _ = made(cfg, 2)
    wrong = fnattn.init_state(params, BATCH + 1, capacity=CAPACITY)
    pairs = tree.map(lambda t: torch.stack((t, t)), wrong)
    with pytest.raises(ValueError, match=rf"^{name}\.apply: the state must have "):
        torch.vmap(lambda state: fnattn.apply(params, x, state)[0])(pairs)
    there = tree.map(lambda t: t.to("meta"), (params, x, wrong))
    refused(name, *there, ValueError)
