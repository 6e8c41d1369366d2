"""What a step of generation refuses, it refuses as the ordinary way does: before anything is read by its address."""

from __future__ import annotations

import pytest
import torch

import fnattn
from fnattn import random, tree
from fnattn.attentions import block_sparse, coor_descent, full, gate_loop, simple_gate_loop, taylor
from fnattn.models import lm

STREAMING = (
    taylor.Config(dim=24, heads=4, dim_head=16, causal=True),
    full.Config(dim=24, seq_len=40, heads=6, dim_head=16, kv_heads=2, rotary_emb=True),
    gate_loop.Config(dim=24, heads=4, sub_ln=True),
    block_sparse.Config(dim=24, seq_len=32, heads=4, dim_head=16, block_size=4, text_seq_len=4, num_random_blocks=1),
    coor_descent.Config(dim=24, heads=4, dim_head=16, use_coor_descent=True, coor_descent_sparsity_k=3),
)


@pytest.mark.parametrize("family", ["full", "block_sparse", "coor_descent"])
def test_a_cache_that_lacks_an_axis_is_refused_as_a_state_of_another_shape(family):
    cfg = {"full": full.Config(dim=8, seq_len=16, heads=2, dim_head=4),
           "block_sparse": block_sparse.Config(dim=8, seq_len=16, heads=2, dim_head=4, block_size=4),
           "coor_descent": coor_descent.Config(dim=8, heads=2, dim_head=4)}[family]
    params = fnattn.init(random.key(0), cfg)
    state = fnattn.init_state(params, 1, capacity=16)
    for part in ("main", "late"):
        flat = state.k._replace(**{part: getattr(state.k, part)[0, 0]})
        with pytest.raises(ValueError, match="must have .batch, key heads, capacity, width"):
            fnattn.apply(params, torch.zeros(1, 1, 8), state._replace(k=flat))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("cfg", STREAMING, ids=str)
def test_an_input_that_is_not_floating_is_the_ordinary_error(cfg, dtype):
    params = fnattn.init(random.key(1), cfg)
    x, state = random.normal(random.key(2), (3, 1, cfg.dim)), fnattn.init_state(params, 3, capacity=13)
    with pytest.raises(TypeError, match="floating point"):
        fnattn.apply(params, x.to(dtype), state)


def test_a_model_whose_attention_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match="attention must be causal"):
        lm.Config(attention=simple_gate_loop.Config(dim=8, reverse=True), depth=1)


def alike(call, reference):
    """A call gives what the plain one gives, or an error where that has one."""
    try:
        truth = reference()
    except (TypeError, ValueError, RuntimeError):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()
        return
    torch.testing.assert_close(call(), truth)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("cfg", [
    *STREAMING, taylor.Config(dim=24, heads=4, dim_head=16, causal=True, prenorm=True, gate_value_heads=True, shift_tokens=True),
    simple_gate_loop.Config(dim=24, post_ln=True),
    coor_descent.Config(dim=24, heads=4, dim_head=16, use_coor_descent=True, attn_null_kv=2, learned_sparsity_k=True),
], ids=str)
def test_a_weight_of_whole_numbers_or_bools_is_not_read_as_one_of_floats(cfg, dtype):
    params, x = fnattn.init(random.key(1), cfg), random.normal(random.key(2), (3, 1, cfg.dim))
    state = fnattn.init_state(params, 3, capacity=13)
    for name, t in params._asdict().items():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            wrong = params._replace(**{name: torch.ones(t.shape, dtype=dtype)})
            for _ in range(3):
                alike(lambda wrong=wrong: fnattn.apply(wrong, x, state)[0],
                      lambda wrong=wrong: fnattn.apply(wrong, x, state, impl="reference")[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_nor_is_such_a_weight_of_a_model(dtype):
    params = lm.init(random.key(1), lm.Config(attention=taylor.Config(dim=24, heads=4, dim_head=16, causal=True), depth=1, num_tokens=13))
    ids, state = torch.tensor([[3], [5]]), lm.init_state(params, 2, capacity=13)
    for which, t in enumerate(tree.leaves(params)):
        parts = tree.leaves(params)
        parts[which] = torch.ones(t.shape, dtype=dtype)
        wrong = tree.unflatten(parts, tree.structure(params))
        alike(lambda wrong=wrong: lm.apply(wrong, ids, state)[0], lambda wrong=wrong: lm.apply(wrong, ids, state, impl="reference")[0])
