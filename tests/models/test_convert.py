"""Language models and Linformer with the weights of the real packages, both ways."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from upstream import upstream

from fnattn import convert, random, tree
from fnattn.attentions import block_sparse, coor_descent, full, gate_loop, gate_loop_full, taylor
from fnattn.models import dalle_transformer, feedforward_coor_descent, linformer_lm, lm
from fnattn.models.feedforward_coor_descent import CoorDescent


def ids(vocabulary=13, n=11):
    return random.bits(random.key(2), (2, n)) % vocabulary


GATE_LOOP = [
    (dict(), lambda: gate_loop.Config(dim=6), dict(norm="rms")),
    (dict(post_ln_norm=True, sub_ln=True), lambda: gate_loop.Config(dim=6, sub_ln=True), dict(norm="layer", post_norm=True)),
    (dict(gate_loop_heads=2, dim_gate_looped_attn=8), lambda: gate_loop.Config(dim=6, heads=2, dim_inner=8), dict()),
    (dict(attn_add_swish_gating=False, ablate_complex=True),
     lambda: gate_loop.Config(dim=6, add_swish_gating=False, ablate_complex=True), dict()),
    (dict(use_gate_looped_attn=False, heads=2, dim_head=4, rotary_emb=True),
     lambda: gate_loop_full.Config(dim=6, heads=2, dim_head=4, rotary_emb=True, add_swish_gating=True), dict()),
]


@pytest.mark.parametrize("theirs, attention, ours", GATE_LOOP, ids=[str(t[0]) for t in GATE_LOOP])
def test_the_gate_loop_transformer_equals_upstream(theirs, attention, ours):
    cls = upstream("gateloop_transformer").Transformer
    module = cls(6, num_tokens=13, depth=2, checkpoint_gate_looped_attn=False, **theirs).double()
    cfg = lm.Config(attention=attention(), depth=2, num_tokens=13, **ours)
    params = convert.load(cfg, module.state_dict())
    dtype = torch.float32 if theirs.get("rotary_emb") else torch.float64  # upstream's rotary table is float32
    loss = module(ids(), return_loss=True)
    assert_close(lm.apply(params, ids())[0], module(ids()), dtype)
    assert_close(lm.loss(params, ids()), loss, dtype)
    loss.backward()
    grads = convert.dump(tree.grad(lm.loss)(params, ids()))
    for name, p in module.named_parameters():
        if p.grad is not None:
            # frac_gradient: the full-attention mixer of upstream's Transformer has no gate projection a here
            assert_close(grads[name], p.grad, dtype)
    module.load_state_dict(convert.dump(params), strict=True)


def test_the_coordinate_descent_transformer_equals_upstream():
    cls = upstream("coordinate_descent_attention").Transformer
    module = cls(num_tokens=13, dim=6, seq_len=12, depth=2, dim_head=4, heads=2, attn_use_coor_descent=True,
                 attn_coor_descent_sparsity_k=2, coor_descent_iters=7, attn_null_kv=2).double()
    attention = coor_descent.Config(dim=6, dim_head=4, heads=2, use_coor_descent=True, coor_descent_sparsity_k=2,
                                    coor_descent_iters=7, attn_null_kv=2)
    cfg = lm.Config(attention=attention, depth=2, num_tokens=13, norm="layer", norm_attention=False, logits_bias=True, seq_len=12)
    params = convert.load(cfg, module.state_dict())
    with torch.no_grad():
        assert_close(lm.apply(params, ids())[0], module(ids()))
    module.load_state_dict(convert.dump(params), strict=True)


def test_a_feed_forward_by_coordinate_descent_runs_where_upstream_cannot():
    attention = coor_descent.Config(dim=6, dim_head=4, heads=2, use_coor_descent=True)
    cfg = lm.Config(attention=attention, depth=1, num_tokens=13, norm="layer", norm_attention=False, ff=CoorDescent(sparsity_k=5))
    params = lm.init(random.key(0), cfg)
    grads = tree.grad(lm.loss)(params, ids())
    assert grads.blocks[0].ff.w_in.abs().max() > 0
    ff = feedforward_coor_descent.init(random.key(0), feedforward_coor_descent.Config(dim=6))
    module = upstream("coordinate_descent_attention.coordinate_descent_attention").FeedForward(6)
    module.load_state_dict(convert.dump(ff), strict=True)
    x = random.normal(random.key(1), (2, 5, 6))
    assert_close(feedforward_coor_descent.apply(ff, x), module(x))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("tokens", [0, 13])
def test_linformer_goes_both_ways_in_both_layouts(reversible, tokens):
    package = upstream("linformer")
    fields = dict(dim=6, seq_len=12, depth=2, k=4, heads=2, reversible=reversible)
    cfg = linformer_lm.Config(num_tokens=tokens, **fields)
    module = package.LinformerLM(num_tokens=tokens, **fields).double() if tokens else package.Linformer(**fields).double()
    params = convert.load(cfg, module.state_dict())
    x = ids() if tokens else random.normal(random.key(1), (2, 11, 6), torch.float64)
    ours = linformer_lm.apply(params, x) if tokens else linformer_lm.encode(params, x)
    with torch.no_grad():
        assert_close(ours[0] if isinstance(ours, tuple) else ours, module(x))
    module.load_state_dict(convert.dump(params), strict=True)


@pytest.mark.parametrize("cfg", block_sparse.FAMILY.examples)
def test_layouts_are_deepspeeds_buffer(cfg):
    params = block_sparse.init(random.key(0), cfg)
    theirs = convert.dump(params)
    layout = theirs["attn_fn.master_layout"]
    assert layout.dtype == torch.int64 and layout.shape == (cfg.heads, cfg.blocks, cfg.blocks) and 0 < layout.sum() < layout.numel()
    for back in (convert.load(cfg, theirs), convert.load(cfg, theirs, dtype=torch.float64)):
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(tree.leaves(params), tree.leaves(back)))
        assert back.layout.dtype == torch.bool


def test_a_layout_that_is_not_there_is_drawn_from_a_key_and_a_wrong_one_is_named():
    cfg = next(cfg for cfg in block_sparse.FAMILY.examples if not cfg.layout.different_layout_per_head)
    params = block_sparse.init(random.key(0), cfg)
    theirs = convert.dump(params)
    without = {name: t for name, t in theirs.items() if name != "attn_fn.master_layout"}
    with pytest.raises(ValueError, match=r"params_key must be given, because state_dict does not hold \['layout'\]"):
        convert.load(cfg, without)
    back = convert.load(cfg, without, params_key=random.key(0))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(params)))
    layout = theirs["attn_fn.master_layout"]
    for wrong, text in ((layout[:, 1:, 1:], r"attn_fn.master_layout must be \[.*\]; got"), (layout[:1, 0], "attn_fn.master_layout must be"),
                        (torch.cat((layout[:1], 1 - layout[1:])), "must be the same for all heads")):
        with pytest.raises(ValueError, match=f"^convert.load: {text}" if "same" not in text else text):
            convert.load(cfg, {**theirs, "attn_fn.master_layout": wrong})


def test_dalle_with_sparse_layers_takes_upstreams_smaller_layout():
    cfg = dalle_transformer.Config(dim=8, depth=2, seq_len=288, heads=2, dim_head=4, image_fmap_size=16, attn_types=("sparse", "full"))
    params = dalle_transformer.init(random.key(0), cfg)
    theirs = convert.dump(params)
    back = convert.load(cfg, theirs)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(params)))
    name, = (key for key in theirs if key.endswith("master_layout"))
    smaller = convert.load(cfg, {**theirs, name: theirs[name][:, :18, :18]})
    x = random.normal(random.key(1), (1, 289, 8))
    ours, other = (dalle_transformer.apply(p, x)[0] for p in (params, smaller))
    assert torch.equal(ours[:, :288], other[:, :288]) and (ours - x).abs().max() > 1e-3
    assert 0 < theirs[name].sum() < theirs[name].numel() and smaller.attns[0].layout[:, 18].all()


def test_dump_names_what_it_cannot_take():
    for wrong in (3, full.Config(dim=6, seq_len=8)):
        with pytest.raises(TypeError, match=r"^convert.dump: params must come from an init of this library; got (int|full.Config)\.\n  "):
            convert.dump(wrong)


def test_a_model_that_upstream_does_not_have_is_refused():
    cfg = lm.Config(attention=taylor.Config(dim=6, causal=True), depth=1)
    with pytest.raises(TypeError, match=r"expected a language model that upstream has; got one over fnattn\.attentions\.taylor"):
        convert.dump(lm.init(random.key(0), cfg))
    with pytest.raises(TypeError, match=r"expected a Config that has an upstream class; got dict"):
        convert.load({}, {})


def test_loaded_tensors_are_copies():
    cfg = full.Config(dim=6, seq_len=8, heads=2, dim_head=3)
    sd = convert.dump(full.init(random.key(0), cfg))
    params = convert.load(cfg, sd)
    sd["to_qkv.weight"].zero_()
    assert params.to_qkv.abs().max() > 0
