"""Steps of generation in one call: the numbers of the ordinary way, and that way itself wherever anything watches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fnattn_kernels.native import kept_steps, steps_rows
from fnattn_kernels.native import steps as native
from fnattn_kernels.native.build import why_not

import fnattn
from fnattn import random, taps, tree
from fnattn.attentions import (
    FAMILIES,
    _step,
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
from fnattn.models import _step as model_step
from fnattn.models import lm

pytestmark = pytest.mark.skipif(why_not("steps") is not None, reason="needs a C compiler")

WIDE = (
    taylor.Config(dim=24, heads=4, dim_head=16, causal=True),
    taylor.Config(dim=24, heads=2, dim_head=33, causal=True),
    taylor.Config(dim=24, heads=4, dim_head=15, causal=True, rotary_emb=False, prenorm=True, shift_tokens=True),
    full.Config(dim=24, seq_len=40, heads=6, dim_head=16, kv_heads=2, rotary_emb=True),
    gate_loop.Config(dim=24, heads=4, sub_ln=True),
    gate_loop.Config(dim=24, heads=3, dim_inner=9, add_swish_gating=False),
    gate_loop.Config(dim=24, add_swish_gating=False, sub_ln=True),
    gate_loop_full.Config(dim=24, heads=4, dim_head=16, rotary_emb=True, add_swish_gating=True),
    gate_loop_full.Config(dim=24, heads=2, dim_head=18, softmax_normalize=False),
    block_sparse.Config(dim=24, seq_len=32, heads=4, dim_head=16, block_size=4, text_seq_len=4, num_random_blocks=1),
    coor_descent.Config(dim=24, heads=4, dim_head=16, use_coor_descent=True, coor_descent_sparsity_k=3),
    coor_descent.Config(dim=24, heads=17, dim_head=4, use_coor_descent=True, coor_descent_sparsity_k=2, coor_descent_iters=3,
                        attn_null_kv=3, solver="exact", normalize=True, learned_sparsity_k=True),
    coor_descent.Config(dim=24, heads=4, dim_head=16),
)
STREAMING = [cfg for family in FAMILIES.values() if family.step for cfg in family.examples
             if getattr(cfg, "causal", True) and not getattr(cfg, "reverse", False)]
# What a step is not written for.
ORDINARY = [cfg for cfg in STREAMING if getattr(cfg, "static_mask", None) or getattr(cfg, "ablate_complex", False)
            or getattr(cfg, "ablate_state_transition", False) or getattr(cfg, "data_dependent_rel_pos", False)
            or getattr(cfg, "attn_null_kv", 0) and not cfg.use_coor_descent]
N, CAPACITY = 11, 13


@pytest.fixture
def taken(monkeypatch) -> list:
    """One entry for every step that was done in one call."""
    seen, run = [], native.carry_out
    for module in (native, kept_steps):
        monkeypatch.setattr(module, "carry_out", lambda *given: seen.append(given) or run(*given))
    return seen


def moved(params):
    """The parameters with norms that are not ones."""
    return tree.map(lambda t: t + 0.1 * random.normal(random.fold_in(random.key(5), t.numel()), tuple(t.shape), t.dtype)
                    if t.is_floating_point() else t, params)


def sequence(cfg, dtype=torch.float64, batch=3):
    params = moved(fnattn.init(random.key(1), cfg, dtype=dtype))
    return params, random.normal(random.key(2), (batch, N, cfg.dim), dtype), fnattn.init_state(params, batch, capacity=CAPACITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("cfg", [*WIDE, *(c for c in STREAMING if c not in ORDINARY)], ids=str)
def test_steps_are_those_of_the_reference(cfg, dtype, taken):
    params, x, state = sequence(cfg, dtype)
    truth, outs = state, []
    before = [t.clone() for t in tree.leaves((params, x, state))]
    first = state
    for t in range(N):
        out, state = fnattn.apply(params, x[:, t:t + 1], state)
        expected, truth = fnattn.apply(params, x[:, t:t + 1], truth, impl="reference")
        torch.testing.assert_close(out, expected)
        outs.append(out)
    assert len(taken) == N - getattr(cfg, "seq_len", 0) - 1 + cfg.image_size ** 2 if hasattr(cfg, "image_size") else len(taken) == N
    assert tree.structure(state) == tree.structure(truth)
    for ours, theirs in zip(tree.leaves(state), tree.leaves(truth), strict=True):
        torch.testing.assert_close(ours, theirs)
    whole, _ = fnattn.apply(params, x, impl="reference")
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert whole.abs().max() > 1e-2
    for kept, t in zip(before, tree.leaves((params, x, first)), strict=True):
        assert torch.equal(kept, t)


@pytest.mark.parametrize("cfg", ORDINARY, ids=str)
def test_what_no_step_is_written_for_goes_the_ordinary_way(cfg, taken):
    params, x, state = sequence(cfg)
    out, _ = fnattn.apply(params, x[:, :1], state)
    torch.testing.assert_close(out, fnattn.apply(params, x[:, :1], state, impl="reference")[0])
    assert not taken


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_of_large_layers_with_more_threads(threads, taken):
    cfg = full.Config(dim=384, seq_len=64, heads=6, dim_head=64)
    params, before = fnattn.init(random.key(0), cfg), torch.get_num_threads()
    x = random.normal(random.key(1), (2, 40, 384))
    _, state = fnattn.apply(params, x[:, :-1], fnattn.init_state(params, 2, capacity=64))
    expected = fnattn.apply(params, x[:, -1:], state, impl="reference")[0]
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(fnattn.apply(params, x[:, -1:], state)[0], expected)
    finally:
        torch.set_num_threads(before)
    assert len(taken) == 1


# ------------------------------------------------------------------------------------------------ whole models

MODELS = (
    lm.Config(attention=taylor.Config(dim=16, heads=2, dim_head=8, causal=True), depth=2, num_tokens=19),
    lm.Config(attention=full.Config(dim=16, seq_len=16, heads=2, dim_head=8, rotary_emb=True), depth=2, num_tokens=19, norm="layer",
              tied=True),
    lm.Config(attention=gate_loop.Config(dim=16, heads=2), depth=2, num_tokens=19, norm="layer", post_norm=True, logits_bias=True),
    lm.Config(attention=simple_gate_loop.Config(dim=16), depth=1, num_tokens=19, norm_attention=False),
)


@pytest.mark.parametrize("cfg", MODELS, ids=lambda cfg: type(cfg.attention).__module__.rpartition(".")[2])
def test_steps_of_models_are_those_of_the_reference(cfg, taken):
    params = moved(lm.init(random.key(0), cfg, dtype=torch.float64))
    ids = random.bits(random.key(1), (2, N)).remainder(19).long()
    state = truth = lm.init_state(params, 2, capacity=CAPACITY)
    for t in range(N):
        logits, state = lm.apply(params, ids[:, t:t + 1], state)
        expected, truth = lm.apply(params, ids[:, t:t + 1], truth, impl="reference")
        torch.testing.assert_close(logits, expected)
    assert len(taken) == N
    for ours, theirs in zip(tree.leaves(state), tree.leaves(truth), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_token_that_is_not_there_is_an_error(taken):
    params = lm.init(random.key(0), MODELS[0])
    state = lm.init_state(params, 1, capacity=4)
    for wrong in (19, -1):
        with pytest.raises(ValueError, match="ids must lie in"):
            lm.apply(params, torch.tensor([[wrong]]), state)
    lm.apply(params, torch.tensor([[18]], dtype=torch.int32), state)


def test_models_that_no_step_is_written_for(taken):
    for cfg, layers in ((lm.Config(attention=MODELS[0].attention, depth=2, seq_len=8), 2),
                        (lm.Config(attention=gate_loop_full.Config(dim=8, heads=2, dim_head=4, data_dependent_rel_pos=True,
                                                                   frac_gradient_data_dependent_rel_pos=1.0), depth=1), 0)):
        params = lm.init(random.key(0), cfg)
        lm.apply(params, torch.tensor([[3]]), lm.init_state(params, 1, capacity=4))
        assert len(taken) == layers
        taken.clear()


# ------------------------------------------------------------------------------------------------ whoever watches


def watched_gradient(f, x):
    return torch.func.grad(lambda x: f(x).square().sum())(x)


def watched_tangent(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def watched_map(f, x):
    return torch.func.vmap(f)(torch.stack((x, 2 * x)))


def watched_autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x)[0]


def watched_harvest(f, x):
    return taps.harvest(f)(x)[1]["heads"]


def watched_autocast(f, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return f(x)


def watched_profiler(f, x):
    with torch.profiler.profile(acc_events=True) as kept:
        f(x)
    return torch.tensor(float(any("taylor" in event.name for event in kept.events())))


WATCHERS = [watched_gradient, watched_tangent, watched_map, watched_autograd, watched_harvest, watched_autocast, watched_profiler]


@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_whoever_watches_gets_the_ordinary_way(watch, taken):
    params, x, state = sequence(WIDE[0], torch.float32)
    _, state = fnattn.apply(params, x[:, :5], state)
    assert watch(lambda x: fnattn.apply(params, x, state)[0], x[:, 5:6]).abs().max() > 0
    assert not taken


def test_options_get_the_ordinary_way(taken):
    params, x, state = sequence(WIDE[0])
    one = x[:, :1]
    fnattn.apply(params, one, state, mask=torch.ones(3, 1, dtype=torch.bool))
    fnattn.apply(params, one, state, dropout_key=random.key(0))
    fnattn.apply(params, one, state, impl="native")
    fnattn.apply(params, x[:, :2], state)
    assert not taken
    many = native.ROWS + 1
    fnattn.apply(params, one[:1].expand(many, -1, -1), fnattn.init_state(params, many, capacity=4))
    assert not taken
    fnattn.apply(params, one[:1].expand(native.ROWS, -1, -1), fnattn.init_state(params, native.ROWS, capacity=4))
    assert len(taken) == 1


def test_params_and_states_of_other_layouts_or_precisions_get_the_ordinary_way(taken):
    params, x, state = sequence(WIDE[0])
    expected = fnattn.apply(params, x[:, :1], state, impl="reference")[0]
    turned = params._replace(to_q=params.to_q.t().contiguous().t())
    torch.testing.assert_close(fnattn.apply(turned, x[:, :1], state)[0], expected)
    slices = state._replace(sums=torch.cat((state.sums, state.sums), 3)[..., :state.sums.shape[3]])
    torch.testing.assert_close(fnattn.apply(params, x[:, :1], slices)[0], expected)
    half = tree.map(lambda t: t.half(), params)
    fnattn.apply(half, x[:, :1].half(), fnattn.init_state(half, 3, capacity=CAPACITY))
    assert not taken


@pytest.mark.parametrize("cfg", [*WIDE, gate_loop_full.Config(dim=24, heads=4, dim_head=16, data_dependent_rel_pos=True)], ids=str)
def test_shapes_that_do_not_fit_are_the_ordinary_errors(cfg):
    """A step reads memory by address: whatever is too small must be found before."""
    params, x, state = sequence(cfg)
    one = x[:, :1]
    for name, t in params._asdict().items():
        if isinstance(t, torch.Tensor) and t.numel() and t.is_floating_point():
            with pytest.raises((ValueError, RuntimeError, TypeError)):
                fnattn.apply(params._replace(**{name: t[..., :-1].contiguous()}), one, state)
    for which, t in enumerate(tree.leaves(state)):
        if t.ndim > 1 and t.is_floating_point():
            for cut in (t[..., :-1], t[:-1], t[:, :-1]):
                parts = tree.leaves(state)
                parts[which] = cut.contiguous()
                with pytest.raises((ValueError, RuntimeError, TypeError, IndexError)):
                    fnattn.apply(params, one, tree.unflatten(parts, tree.structure(state)))


def test_a_full_cache_is_the_ordinary_error(taken):
    params, x, _ = sequence(WIDE[3])
    state = fnattn.init_state(params, 3, capacity=2)
    for t in range(2):
        _, state = fnattn.apply(params, x[:, t:t + 1], state)
    with pytest.raises(ValueError, match="init_state"):
        fnattn.apply(params, x[:, 2:3], state)
    assert len(taken) == 2


def test_without_the_kernel_the_ordinary_way_is_taken(monkeypatch, taken):
    params, x, state = sequence(WIDE[0])
    monkeypatch.setattr(native, "why_not", lambda source: "not here")
    fnattn.apply(params, x[:, :1], state)
    assert not taken


def test_the_step_of_a_family_is_found_by_models_only_through_its_record():
    assert {name for name, family in FAMILIES.items() if family.step} == {name for name, family in FAMILIES.items() if family.streams}
    assert model_step.in_one_call is _step.in_one_call


@pytest.mark.parametrize("kind", ["conv", "axial", "column", "full", "sparse"])
def test_steps_of_pictures_with_turned_heads(kind, taken):
    """What DALLE's transformer asks of a layer: a table of angles for queries, keys and values."""
    sizes = {"dim": 16, "seq_len": 14, "heads": 2, "dim_head": 8}
    module, cfg = {"conv": (sparse_conv, sparse_conv.Config(**sizes, image_size=3, kernel_size=3)),
                   "axial": (sparse_axial, sparse_axial.Config(**sizes, image_size=3)),
                   "column": (sparse_axial, sparse_axial.Config(**sizes, image_size=3, axis=1)),
                   "full": (full, full.Config(**sizes)),
                   "sparse": (block_sparse, block_sparse.Config(**sizes, block_size=5, text_seq_len=3))}[kind]
    params = moved(fnattn.init(random.key(0), cfg))
    angles = random.normal(random.key(1), (15, 3))
    x = random.normal(random.key(2), (2, 15, 16))
    whole, _ = module.attend(params, x, angles=angles, impl="reference")
    state, outs = fnattn.init_state(params, 2, capacity=15), []
    for t in range(15):
        out, state = module.attend(params, x[:, t:t + 1], state, angles=angles)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert len(taken) == (15 if kind in ("full", "sparse") else 9)


@pytest.mark.parametrize("compat", [False, True])
def test_steps_of_pictures_remember_what_a_mask_hid(compat, taken):
    cfg = sparse_conv.Config(dim=16, seq_len=14, heads=2, dim_head=8, image_size=3, kernel_size=3, compat_mask=compat)
    params = moved(fnattn.init(random.key(0), cfg, dtype=torch.float64))
    x, mask = random.normal(random.key(2), (2, 15, 16), torch.float64), torch.ones(2, 15, dtype=torch.bool)
    mask[0, 2], mask[1, 7] = False, False
    whole, _ = fnattn.apply(params, x, mask=mask, impl="reference")
    _, state = fnattn.apply(params, x[:, :9], fnattn.init_state(params, 2, capacity=15), mask=mask[:, :9])
    for t in range(9, 15):
        out, state = fnattn.apply(params, x[:, t:t + 1], state)
        torch.testing.assert_close(out[:, 0], whole[:, t])
    assert len(taken) == 6


@pytest.mark.parametrize("cfg", [WIDE[9], WIDE[10], WIDE[11], coor_descent.Config(dim=8, heads=2, dim_head=4)], ids=str)
def test_steps_remember_what_a_mask_hid(cfg, taken):
    params = moved(fnattn.init(random.key(0), cfg, dtype=torch.float64))
    x, mask = random.normal(random.key(2), (2, N, cfg.dim), torch.float64), torch.ones(2, N, dtype=torch.bool)
    mask[0, :3], mask[1, 4] = False, False
    whole, _ = fnattn.apply(params, x, mask=mask, impl="reference")
    _, state = fnattn.apply(params, x[:, :6], fnattn.init_state(params, 2, capacity=CAPACITY), mask=mask[:, :6])
    for t in range(6, N):
        out, state = fnattn.apply(params, x[:, t:t + 1], state)
        torch.testing.assert_close(out[:, 0], whole[:, t])
    assert len(taken) == N - 6


def test_a_row_of_a_layout_without_keys_is_the_ordinary_ways(taken):
    cfg = WIDE[9]
    params, x, state = sequence(cfg)
    params = params._replace(layout=torch.zeros_like(params.layout))
    out, _ = fnattn.apply(params, x[:, :1], state)
    assert torch.equal(out, fnattn.apply(params, x[:, :1], state, impl="reference")[0]) and out.abs().max() == 0
    model = lm.init(random.key(0), lm.Config(attention=cfg, depth=1))
    model = model._replace(blocks=tuple(b._replace(attn=b.attn._replace(layout=torch.zeros_like(b.attn.layout))) for b in model.blocks))
    state, ids = lm.init_state(model, 1, capacity=4), torch.tensor([[3]])
    torch.testing.assert_close(lm.apply(model, ids, state)[0], lm.apply(model, ids, state, impl="reference")[0])


def test_a_step_compiles_and_exports_with_any_number_of_positions(taken):
    params, x, state = sequence(WIDE[0], torch.float32)

    class Chunk(torch.nn.Module):
        def forward(self, x, state):
            return fnattn.apply(params, x, state)

    sizes = {"x": {1: torch.export.Dim("n", min=1, max=64)}, "state": tree.map(lambda t: {}, state)}
    program = torch.export.export(Chunk(), (x[:, :3].clone(), state), dynamic_shapes=sizes).module()
    for n in (1, 5):
        torch.testing.assert_close(program(x[:, :n], state)[0], fnattn.apply(params, x[:, :n], state, impl="reference")[0])
    compiled = torch.compile(lambda x, state: fnattn.apply(params, x, state)[0], backend="eager", fullgraph=True)
    taken.clear()
    torch.testing.assert_close(compiled(x[:, :1], state), fnattn.apply(params, x[:, :1], state, impl="reference")[0])
    assert not taken


def test_a_gradient_that_only_one_of_many_tensors_wants(taken):
    params, x, state = sequence(WIDE[2])
    for which in range(len(tree.leaves(params))):
        leaves = [t.clone() for t in tree.leaves(params)]
        leaves[which].requires_grad_()
        out, _ = fnattn.apply(tree.unflatten(leaves, tree.structure(params)), x[:, :1], state)
        assert torch.autograd.grad(out.square().sum(), leaves[which])[0].abs().max() > 0
    assert not taken
    wanted = state._replace(sums=state.sums.clone().requires_grad_())
    assert fnattn.apply(params, x[:, :1], wanted)[0].requires_grad
    torch.func.vmap(lambda sums: fnattn.apply(params, x[:, :1], state._replace(sums=sums))[0])(torch.stack((state.sums, state.sums)))
    assert not taken


def test_the_instructions_have_the_same_numbers_in_c_and_in_python():
    source = (Path(native.__file__).parent.parent / "csrc" / "steps.c").read_text()
    lists = [re.split(r",\s*", found.strip()) for found in re.findall(r"enum \{([^}]*)\}", source)]
    assert len(lists[0]) == 30 and lists[1:] == [["IDENTITY", "GELU", "SILU"], ["DONE", "NO_MEMORY", "OUT_OF_RANGE"]]
    for names in lists:
        assert [getattr(steps_rows, name, getattr(native.Steps, name, None)) for name in names] == list(range(len(names)))
