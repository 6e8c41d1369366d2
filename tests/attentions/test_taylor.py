"""Taylor-series linear attention against upstream, against the dense formula, and its documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from upstream import upstream

import fnattn
from fnattn import convert, random
from fnattn.attentions import taylor

FLAGS = ("one_headed_kv", "rotary_emb", "combine_heads", "gate_value_heads", "prenorm", "shift_tokens", "remove_even_power_dups")
GRID = [dict(zip(FLAGS, bits)) for bits in itertools.product((False, True), repeat=len(FLAGS))][::5]


def inputs(cfg, n=11, batch=2, dtype=torch.float64, seed=3):
    return random.normal(random.key(seed), (batch, n, cfg.dim), dtype)


def module_for(cfg, dtype=torch.float64):
    cls = upstream("taylor_series_linear_attention").TaylorSeriesLinearAttn
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    return cls(fields.pop("dim"), **fields).to(dtype).eval()


def dense(params, x, mask=None, context=None):
    """The formula with an [n, m] table of weights, for configs without shift, norm, rotary and gates."""
    cfg = params.cfg
    g = 1 if cfg.one_headed_kv else cfg.heads
    q = (x @ params.to_q.T).unflatten(-1, (cfg.heads, -1)).transpose(1, 2)
    k, v = (t.unflatten(-1, (g, -1)).transpose(1, 2) for t in
            ((x if context is None else context) @ params.to_kv.T).chunk(2, -1))
    s = q @ k.mT * cfg.dim_head ** -0.5
    p = 1 + s + s ** 2 / 2
    if cfg.causal:
        p = p.tril()
    if mask is not None:
        p = p * mask[:, None, None, :]
    out = (p @ v) / p.sum(-1, keepdim=True).clamp(min=1e-5)
    return out.transpose(1, 2).flatten(2) @ params.to_out.T


@pytest.mark.parametrize("options", GRID, ids=lambda o: "+".join(k for k, on in o.items() if on) or "none")
def test_not_causal_it_equals_upstream_in_float64(options):
    cfg = taylor.Config(dim=11, dim_head=4, heads=3, **options)
    module = module_for(cfg)
    module = module.float() if cfg.rotary_emb else module  # upstream's rotary table is float32 whatever its input
    dtype = torch.float32 if cfg.rotary_emb else torch.float64
    params, x = convert.load(cfg, module.state_dict()), inputs(cfg, dtype=dtype)
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    for given in (None, mask):
        with torch.no_grad():
            theirs = module(x, mask=given)
        ours, _ = taylor.apply(params, x, mask=given)
        assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("options", GRID, ids=lambda o: "+".join(k for k, on in o.items() if on) or "none")
def test_causal_it_equals_upstream_and_so_does_the_cached_decode(options):
    upstream("fast_transformers")
    cfg = taylor.Config(dim=11, dim_head=4, heads=3, causal=True, **options)
    module = module_for(cfg, torch.float32)
    params, x = convert.load(cfg, module.state_dict()), inputs(cfg, dtype=torch.float32)
    with torch.no_grad():
        theirs = module(x)
        _, cache = module(x[:, :7], return_cache=True)
        step, _ = module(x[:, 7:8], cache=cache, return_cache=True)
    ours, _ = taylor.apply(params, x)
    assert_close(ours, theirs, torch.float32)
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max().clamp(min=1)
    _, state = taylor.apply(params, x[:, :7], taylor.init_state(params, 2, capacity=0))
    assert_close(taylor.apply(params, x[:, 7:8], state)[0], step, torch.float32)


def test_cross_attention_equals_upstream_with_a_mask_of_the_context():
    cfg = taylor.Config(dim=11, dim_head=4, heads=3, prenorm=True)
    module = module_for(cfg)
    params, x, context = convert.load(cfg, module.state_dict()), inputs(cfg), inputs(cfg, n=5, seed=4)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    with torch.no_grad():
        theirs = module(x, context=context, mask=mask)
    assert_close(taylor.apply(params, x, context=context, mask=mask)[0], theirs)


@pytest.mark.parametrize("one_headed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_the_dense_formula(one_headed, causal):
    cfg = taylor.Config(dim=7, dim_head=5, heads=3, causal=causal, one_headed_kv=one_headed)
    params, x = taylor.init(random.key(0), cfg, dtype=torch.float64), inputs(cfg, n=67)
    mask = torch.arange(67) % 5 != 0
    mask = mask.expand(2, 67)
    assert_close(taylor.apply(params, x, mask=mask)[0], dense(params, x, mask))
    context = inputs(cfg, n=13, seed=9)
    if not causal:
        assert_close(taylor.apply(params, x, context=context)[0], dense(params, x, context=context))


def test_golden_numbers():
    cfg = taylor.Config(dim=5, dim_head=2, heads=3, causal=True, gate_value_heads=True, prenorm=True, shift_tokens=True)
    params = taylor.init(random.key(1), cfg, dtype=torch.float64)
    out, _ = taylor.apply(params, inputs(cfg, n=4, batch=1))
    # From a float64 run whose float32 counterpart in upstream's module agreed to 5e-8.
    expected = torch.tensor(GOLDEN, dtype=torch.float64)
    assert_close(out[0, :, 0], expected)


GOLDEN = [-0.15003721306775136, -0.021999571616306286, -0.048807197105669047, 0.04859895912093197]


def test_the_state_does_not_grow_and_is_one_headed_for_one_headed_kv():
    cfg = taylor.Config(dim=7, dim_head=4, heads=3, causal=True, one_headed_kv=True)
    params = taylor.init(random.key(0), cfg)
    state = taylor.init_state(params, 2, capacity=9)
    assert state.sums.shape == (2, 1, 1 + 4 + 10, 5)
    _, after = taylor.apply(params, inputs(cfg, dtype=torch.float32), state)
    assert after.sums.shape == state.sums.shape and int(after.pos) == 11


def test_both_storage_options_give_the_same_values():
    cfg = taylor.Config(dim=7, dim_head=4, heads=3)
    params, x = taylor.init(random.key(0), cfg), inputs(cfg, dtype=torch.float32)
    other = params._replace(cfg=taylor.Config(dim=7, dim_head=4, heads=3, remove_even_power_dups=True))
    assert torch.equal(taylor.apply(params, x)[0], taylor.apply(other, x)[0])


def test_a_transposed_loss_gives_the_right_gradient_without_an_output_projection():
    cfg = taylor.Config(dim=7, dim_head=4, heads=3, causal=True, combine_heads=False)
    params, x = taylor.init(random.key(0), cfg, dtype=torch.float64), inputs(cfg)
    weight = random.normal(random.key(5), (12, 11, 2), torch.float64)

    def loss(params, impl):
        return (taylor.apply(params, x, impl=impl)[0].transpose(0, 2) * weight).sum()

    ours, reference = (fnattn.tree.grad(loss)(params, impl) for impl in ("auto", "reference"))
    for a, b in zip(fnattn.tree.leaves(ours), fnattn.tree.leaves(reference)):
        assert_close(a, b)
        assert b.abs().max() > 0


ERRORS = [
    (lambda p, x: taylor.apply(p, x[0]), ValueError,
     r"taylor\.apply: x must be \[batch, seq, 7\] \(cfg\.dim=7\); got \[11, 7\]\.\n  A single sequence needs a batch axis: x\[None\]\."),
    (lambda p, x: taylor.apply(p, x[..., :5]), ValueError, r"taylor\.apply: x must be \[batch, seq, 7\].*got \[2, 11, 5\]"),
    (lambda p, x: taylor.apply(p, x.long()), TypeError, r"taylor\.apply: x must be floating point; got torch\.int64"),
    (lambda p, x: taylor.apply(p, x, mask=torch.ones(2, 11)), TypeError, r"taylor\.apply: mask must be bool"),
    (lambda p, x: taylor.apply(p, x, mask=torch.ones(2, 5, dtype=torch.bool)), ValueError, r"mask must be .*= \[2, 11\].*got \[2, 5\]"),
    (lambda p, x: taylor.apply(p, x, context=x), ValueError, r"taylor\.apply: cannot take context\. With causal=True"),
    (lambda p, x: taylor.apply(p._replace(cfg=NOT_CAUSAL), x, taylor.init_state(p, 2, capacity=0)), ValueError,
     r"taylor\.apply: cannot take state\. A non-causal query"),
    (lambda p, x: taylor.init_state(p._replace(cfg=NOT_CAUSAL), 2, capacity=3), ValueError, r"taylor\.init_state: cannot stream"),
    (lambda p, x: taylor.apply(p, x, impl="nativ"), ValueError, r"taylor: impl must be one of 'auto', 'reference', 'native'.*got 'nativ'"),
    (lambda p, x: taylor.Config(dim=0), ValueError, r"taylor\.Config: dim must be at least 1; got 0"),
    (lambda p, x: taylor.Config(dim=4, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\]; got 1\.5"),
    (lambda p, x: taylor.Config(dim=4, dim_head=3, rotary_emb=True), ValueError, r"rotary_emb needs an even dim_head; got 3"),
    (lambda p, x: taylor.Config(dim=4, head=3), TypeError, r"unexpected keyword argument 'head'"),
]
NOT_CAUSAL = taylor.Config(dim=7, dim_head=4, heads=3)


@pytest.mark.parametrize("wrong, error, text", ERRORS)
def test_bad_input_is_named(wrong, error, text):
    cfg = taylor.Config(dim=7, dim_head=4, heads=3, causal=True)
    with pytest.raises(error, match=text):
        wrong(taylor.init(random.key(0), cfg), inputs(cfg, dtype=torch.float32))


def test_the_remedies_work():
    cfg = taylor.Config(dim=7, dim_head=4, heads=3, causal=True)
    params, x = taylor.init(random.key(0), cfg), inputs(cfg, dtype=torch.float32)
    assert taylor.apply(params, x[0][None])[0].shape == (1, 11, 7)
    taylor.apply(params, x, mask=torch.ones(2, 11).bool())
    taylor.apply(params._replace(cfg=NOT_CAUSAL), x, context=x)


@pytest.mark.parametrize("change, text", [
    (lambda sd: sd.pop("to_q.0.weight"), r"missing keys \['to_q\.0\.weight'\], unknown keys \[\]"),
    (lambda sd: sd.update(extra=torch.ones(1)), r"missing keys \[\], unknown keys \['extra'\]"),
    (lambda sd: sd.update({"to_q.0.weight": torch.ones(3, 7)}), r"to_q\.0\.weight must be \[12, 7\]; got \[3, 7\]"),
])
def test_a_state_dict_that_does_not_fit_is_named(change, text):
    cfg = taylor.Config(dim=7, dim_head=4, heads=3)
    sd = convert.dump(taylor.init(random.key(0), cfg))
    change(sd)
    with pytest.raises(ValueError, match=text):
        convert.load(cfg, sd)


@pytest.mark.parametrize("options", GRID[:7], ids=lambda o: "+".join(k for k, on in o.items() if on) or "none")
def test_dump_is_what_the_upstream_module_loads(options):
    cfg = taylor.Config(dim=11, dim_head=4, heads=3, **options)
    params = taylor.init(random.key(0), cfg)
    module = module_for(cfg, torch.float32)
    module.load_state_dict(convert.dump(params), strict=True)
    back = convert.load(cfg, module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fnattn.tree.leaves(back), fnattn.tree.leaves(params)))
