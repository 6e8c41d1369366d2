"""The cache in two parts: what it holds, that nothing is written to, and that both ways of extending it agree."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.fx.experimental.proxy_tensor import make_fx

import fnattn
from fnattn import ops, random, tree
from fnattn.attentions import _cache, block_sparse, coor_descent, full, gate_loop_full, sparse_axial, sparse_conv

ROWS = torch.arange(1, 2 * 3 * 11 * 5 + 1, dtype=torch.float64).reshape(2, 3, 11, 5)


def fresh(capacity=13):
    return _cache.fresh(ROWS, 2, 3, capacity, 5)


def filled(cuts, capacity=13, length=11):
    rows = fresh(capacity)
    for first, last in zip((0, *cuts), (*cuts, length)):
        rows = _cache.append(rows, ROWS[:, :, first:last], torch.tensor(first), first)
    return rows


@pytest.mark.parametrize("capacity, width", [(1, 1), (3, 1), (4, 2), (13, 2), (16, 4), (1280, 32), (4096, 64)])
def test_the_window_is_a_power_of_two_near_the_square_root(capacity, width):
    assert _cache.window(capacity) == width
    assert _cache.fresh(ROWS, 1, 1, capacity, 1).late.shape[2] == width


@pytest.mark.parametrize("capacity", [11, 13, 40, 70])
@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 8), (4, 4, 9), tuple(range(1, 11))], ids=str)
def test_the_contents_depend_on_the_positions_alone(capacity, cuts):
    rows, whole, w = filled(cuts, capacity), filled((), capacity), _cache.window(capacity)
    assert torch.equal(rows.main, whole.main) and torch.equal(rows.late, whole.late)
    first = 11 - 11 % w
    assert torch.equal(rows.main[:, :, :first], ROWS[:, :, :first]) and not rows.main[:, :, first:].any()
    assert torch.equal(rows.late[:, :, :11 - first], ROWS[:, :, first:]) and not rows.late[:, :, 11 - first:].any()
    assert rows.main.is_contiguous() and rows.late.is_contiguous()
    assert torch.equal(_cache.read(rows, torch.tensor(11), 11), ROWS)


def test_a_token_shares_the_large_part_and_writes_to_nothing():
    before = filled((), length=8, capacity=70)
    copies = tree.map(torch.clone, before)
    one = _cache.append(before, ROWS[:, :, 8:9], torch.tensor(8), 8)
    other = _cache.append(before, -ROWS[:, :, 8:9], torch.tensor(8), 8)
    assert one.main is before.main and other.main is before.main
    assert torch.equal(one.late, -other.late) and one.late[:, :, 0].all()
    assert all(torch.equal(a, b) for a, b in zip(before, copies))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_positions_that_python_may_not_see_give_the_same(n):
    starts = [0, 1, 3, 6]
    states = [filled((), length=first) if first else fresh() for first in starts]
    pos, new = torch.tensor(starts), torch.stack([ROWS[:, :, first:first + n] for first in starts])
    made = torch.vmap(lambda rows, new, pos: _cache.append(rows, new, pos, None))(tree.stack(states), new, pos)
    seen = torch.vmap(lambda rows, pos: _cache.read(rows, pos, None))(made, pos + n)
    for i, first in enumerate(starts):
        known = _cache.append(states[i], ROWS[:, :, first:first + n], torch.tensor(first), first)
        assert torch.equal(made.main[i], known.main) and torch.equal(made.late[i], known.late)
        assert torch.equal(seen[i][:, :, :first + n], ROWS[:, :, :first + n]) and not seen[i][:, :, first + n:].any()


def test_attention_over_the_parts_equals_attention_over_all():
    rows, values, q = filled(()), filled((3, 4)), torch.sin(ROWS[:, :, :2])
    allowed = torch.tensor([True, False] * 5 + [True])
    out = _cache.attend(q, rows, values, torch.tensor(9), 9, mask=allowed, scale=1e-3)
    assert_close(out, ops.softmax_attention(q, ROWS, ROWS, mask=allowed, causal=True, scale=1e-3))
    allowed = torch.cat((allowed, torch.ones(2, dtype=torch.bool)))
    assert_close(_cache.attend(q, rows, values, torch.tensor(9), None, mask=allowed, scale=1e-3), out)


@pytest.mark.parametrize("first, length", [(8, 9), (0, 1), (5, 20), (-1, 3)])
def test_parts_that_do_not_fit_are_refused(first, length):
    rows = fresh()
    with pytest.raises(ValueError, match="cached_attention: expected first"):
        ops.cached_attention(ROWS[:, :, :2], *(rows.main[:, :, :7],) * 2, *(rows.late,) * 2, first=first, length=length)


def test_low_precision_and_many_queries_take_the_same_door():
    q, rows = torch.sin(ROWS), filled(())
    whole = ops.cached_attention(q, rows.main, rows.main, rows.late, rows.late, first=10, length=11, scale=1e-3)
    assert_close(whole, ops.softmax_attention(q, ROWS, ROWS, causal=True, scale=1e-3))
    low = [t.bfloat16() for t in (q[:, :, -1:], rows.main, rows.main, rows.late, rows.late)]
    out = ops.cached_attention(*low, first=10, length=11, scale=1e-3)
    wide = ops.cached_attention(*(t.double() for t in low), first=10, length=11, scale=1e-3)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - wide).abs() <= wide.abs() / 128).all()


FULL = {
    "full": full.Config(dim=8, seq_len=16, heads=2, dim_head=4),
    "coor_descent": coor_descent.Config(dim=8, heads=2, dim_head=4, use_coor_descent=True),
    "gate_loop_full": gate_loop_full.Config(dim=8, heads=2, dim_head=4),
    "block_sparse": block_sparse.Config(dim=8, seq_len=32, heads=2, dim_head=4, text_seq_len=16),
    "sparse_conv": sparse_conv.Config(dim=8, seq_len=4, image_size=1, heads=2, dim_head=4, kernel_size=1),
    "sparse_axial": sparse_axial.Config(dim=8, seq_len=4, image_size=1, heads=2, dim_head=4)}


@pytest.mark.parametrize("cfg", FULL.values(), ids=FULL)
def test_more_positions_than_there_is_room_for_are_never_silent(cfg):
    params, x = fnattn.init(random.key(0), cfg), random.normal(random.key(1), (2, 8, 8))
    state = fnattn.init_state(params, 1, capacity=5)
    whole = fnattn.apply(params, x[:, :5])[0]

    def run(x, state, n):
        first, state = fnattn.apply(params, x[None, :4], state)
        return torch.cat((first, fnattn.apply(params, x[None, 4:n], state)[0]), 1)[0]

    both = tree.map(lambda t: torch.stack((t, t)), state)
    assert_close(torch.vmap(lambda x, state: run(x, state, 5))(x, both), whole)
    with pytest.raises(ValueError, match="apply: (the state holds 4 of 5 positions|x has 4 positions after 4, but cfg allows 5)"):
        torch.vmap(lambda x, state: run(x, state, 8))(x, both)

    def traced(x, state):  # where no value can be read
        return run(x, state, 8)

    out = make_fx(traced)(x[0], state)(x[0], state)
    assert_close(out[:4], whole[0, :4])
    assert out[5:].isnan().all()
