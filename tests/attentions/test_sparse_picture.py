"""sparse_conv and sparse_axial against upstream and against dense masks; their states, cut anywhere; their errors."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.func import grad, hessian, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from upstream import upstream

import fnattn
from fnattn import convert, random, tree
from fnattn.attentions import sparse_axial, sparse_conv
from fnattn.testing import brute

CONFIGS = [
    sparse_conv.Config(dim=7, seq_len=19, image_size=4, kernel_size=3, heads=2, dim_head=6),
    sparse_conv.Config(dim=7, seq_len=31, image_size=5, kernel_size=3, dilation=2, heads=3, dim_head=4),
    sparse_conv.Config(dim=7, seq_len=13, image_size=3, kernel_size=5, heads=2, dim_head=4, stable=True),
    sparse_axial.Config(dim=7, seq_len=19, image_size=4, heads=2, dim_head=6),
    sparse_axial.Config(dim=7, seq_len=19, image_size=4, axis=1, heads=2, dim_head=6, stable=True),
]
each_config = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{type(c).__module__.split('.')[-1]}-{CONFIGS.index(c)}")


def family(cfg):
    return sparse_conv if isinstance(cfg, sparse_conv.Config) else sparse_axial


def text_len(cfg):
    return cfg.seq_len + 1 - cfg.image_size ** 2


def made(cfg, n=None, batch=2):
    """params, x, a table of angles, a mask."""
    n = cfg.seq_len + 1 if n is None else n
    params = fnattn.attentions.init(random.key(0), cfg, dtype=torch.float64)
    x = random.normal(random.key(1), (batch, n, cfg.dim), torch.float64)
    angles = random.normal(random.key(2), (cfg.seq_len + 1, 2), torch.float64) * 3
    return params, x, angles, random.bernoulli(random.key(3), 0.7, (batch, n))


def dense(params, x, angles=None, mask=None):
    """The definition: one table of what sees what."""
    cfg = params.cfg
    q, k, v = (t.unflatten(-1, (cfg.heads, -1)).transpose(1, 2) for t in (x @ params.to_qkv.T).chunk(3, -1))
    if angles is not None:
        q, k, v = (fnattn.ops.rotate(t, angles[:x.shape[1]], impl="reference") for t in (q, k, v))
    options = dict(mask=mask, text_len=text_len(cfg), image_size=cfg.image_size)
    if isinstance(cfg, sparse_conv.Config):
        out = brute.conv_attention(q, k, v, kernel_size=cfg.kernel_size, dilation=cfg.dilation, **options)
    else:
        out = brute.axial_attention(q, k, v, axis=cfg.axis, **options)
    return out.transpose(1, 2).flatten(2) @ params.to_out.T + params.to_out_bias


def module_for(cfg):
    module = upstream("dalle_pytorch.attention")
    fields = {n: getattr(cfg, n) for n in cfg.__dataclass_fields__ if n != "compat_mask"}
    cls = module.SparseConvCausalAttention if isinstance(cfg, sparse_conv.Config) else module.SparseAxialCausalAttention
    return cls(fields.pop("dim"), **fields).double()


@each_config
def test_it_equals_upstream_in_value_and_gradient_at_every_length(cfg):
    module = module_for(cfg)
    params = convert.load(cfg, {k: v.detach() for k, v in module.state_dict().items()})
    t = text_len(cfg)
    for n in sorted({1, 3, t, t + 1, cfg.seq_len - 3, cfg.seq_len, cfg.seq_len + 1}):
        _, x, angles, _ = made(cfg, n)
        for table in (None, angles):
            module.zero_grad()
            freqs = None if table is None else table.repeat_interleave(2, -1)[None]
            theirs = module(x, rotary_pos_emb=freqs)
            ours, state = family(cfg).attend(params, x, angles=table)
            assert state == fnattn.EMPTY
            assert_close(ours, theirs.detach())
            theirs.square().sum().backward()
            gradient = tree.grad(lambda p, x, a: family(cfg).attend(p, x, angles=a)[0].square().sum())(params, x, table)
            for name, leaf in convert.dump(gradient).items():
                assert_close(leaf, module.get_parameter(name).grad)


@each_config
def test_compat_mask_means_what_upstreams_mask_means(cfg):
    module = module_for(cfg)
    cfg = type(cfg)(**{**vars(cfg), "compat_mask": True})
    params = convert.load(cfg, {k: v.detach() for k, v in module.state_dict().items()})
    _, x, _, mask = made(cfg, cfg.seq_len)
    with torch.no_grad():
        assert_close(family(cfg).apply(params, x, mask=mask)[0], module(x, mask=mask))
        hidden = torch.zeros_like(mask)
        assert_close(family(cfg).apply(params, x, mask=hidden)[0], module(x, mask=hidden))
    pieces = in_chunks(params, x, [2, 3, 1, cfg.seq_len - 6], mask=mask)[0]
    assert_close(pieces, family(cfg).apply(params, x, mask=mask)[0])


GOLDEN = [  # from dalle-pytorch 1.6.6
    [-13.479685775846962, -1.0912162652828525, -3.3192499830007733],
    [-14.54315254779687, -2.2721165428641474, -2.4597487777795224],
    [-7.884015667082106, 0.28470891567102674, -0.7189807363348895],
    [-13.479685775846962, -1.0912162652828545, -8.094228042717369],
    [-13.479685775846962, -1.0737686025501558, -0.7707915207405124],
]


@each_config
def test_golden_numbers(cfg):
    params, *_ = made(cfg)
    params = tree.map(lambda t: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape), params)
    x = torch.linspace(0, 1, cfg.seq_len * cfg.dim, dtype=torch.float64).sin().mul(9).cos().view(1, cfg.seq_len, cfg.dim)
    out, _ = family(cfg).apply(params, x)
    assert_close(out[0, (1, text_len(cfg) + 1, cfg.seq_len - 1), 2], torch.tensor(GOLDEN[CONFIGS.index(cfg)], dtype=torch.float64))


@each_config
def test_it_equals_dense_attention_also_under_masks_and_rotation(cfg):
    params, x, angles, mask = made(cfg)
    mask[:, 0] = True  # every row sees a key; empty ones have their own test
    for table in (None, angles):
        for given in (None, mask):
            assert_close(family(cfg).attend(params, x, angles=table, mask=given)[0], dense(params, x, table, given))


# ------------------------------------------------------------------------------------------------ states


def in_chunks(params, x, cuts, angles=None, mask=None, impl="auto"):
    """The outputs of successive chunks, and the final state."""
    fam = family(params.cfg)
    state, outs, start = fam.init_state(params, x.shape[0], capacity=sum(cuts)), [], 0
    for cut in cuts:
        piece = slice(start, start + cut)
        out, state = fam.attend(params, x[:, piece], state, angles=angles, mask=None if mask is None else mask[:, piece],
                                impl=impl)
        outs.append(out)
        start += cut
    return torch.cat(outs, 1), state


@each_config
def test_chunks_of_any_length_equal_the_whole(cfg):
    params, x, angles, mask = made(cfg)
    n, t, side = cfg.seq_len + 1, text_len(cfg), cfg.image_size
    cuttings = ([n], [1] * n, [t, n - t], [t - 1, 2, n - t - 1], [t + side + 1, side + 1, n - t - 2 * side - 2],
                [0, 2, 0, n - 2], [t] + [1] * (n - t), [n - 2, 2])
    for table, given in ((None, None), (angles, mask)):
        whole = family(cfg).attend(params, x, angles=table, mask=given)[0]
        states = []
        for cuts in cuttings:
            out, state = in_chunks(params, x, cuts, table, given)
            assert_close(out, whole)
            assert_close(in_chunks(params, x, cuts, table, given, "bands")[0], whole)
            states.append(state)
        for state in states[1:]:
            for a, b in zip(tree.leaves(state), tree.leaves(states[0])):
                assert_close(a.double(), b.double())


@each_config
def test_sequences_at_different_positions_continue_together_under_vmap(cfg):
    params, x, angles, _ = made(cfg, batch=3)
    fam, starts = family(cfg), (2, text_len(cfg) + 1, cfg.seq_len - 3)
    whole = fam.attend(params, x, angles=angles)[0]
    states = [fam.attend(params, x[i:i + 1, :start], fam.init_state(params, 1, capacity=cfg.seq_len + 1), angles=angles)[1]
              for i, start in enumerate(starts)]
    chunk = torch.stack([x[i:i + 1, start:start + 3] for i, start in enumerate(starts)])
    outs, after = tree.vmap(lambda x, s: fam.attend(params, x, s, angles=angles))(chunk, tree.stack(states))
    for i, start in enumerate(starts):
        assert_close(outs[i, 0], whole[i, start:start + 3])
    assert after.pos.tolist() == [s + 3 for s in starts]


@each_config
def test_gradients_flow_through_the_state_and_equal_those_of_the_whole(cfg):
    params, x, angles, mask = made(cfg)
    n = cfg.seq_len + 1
    weight = random.normal(random.key(4), x.shape, x.dtype)
    whole = tree.grad(lambda p, x: (family(cfg).attend(p, x, angles=angles, mask=mask)[0] * weight).sum(), (0, 1))(params, x)
    pieces = tree.grad(lambda p, x: (in_chunks(p, x, [3, n - 8, 4, 1], angles, mask)[0] * weight).sum(), (0, 1))(params, x)
    for a, b in zip(tree.leaves(pieces), tree.leaves(whole)):
        assert_close(a, b)
        assert b.abs().max() > 0


@each_config
def test_a_token_costs_text_and_window_wherever_it_stands(cfg):
    params, x, _, _ = made(cfg, batch=1)
    cfg, fam = params.cfg, family(params.cfg)
    window = {True: cfg.image_size, False: None}[isinstance(cfg, sparse_axial.Config)]
    if window is None:
        window = min((cfg.kernel_size - 1) * cfg.dilation, cfg.image_size - 1) * (cfg.image_size + 1) + 1
    projections = 2 * (4 * cfg.heads * cfg.dim_head * cfg.dim)
    for start in (text_len(cfg), text_len(cfg) + cfg.image_size + 1, cfg.seq_len - 1):
        _, state = fam.apply(params, x[:, :start], fam.init_state(params, 1, capacity=cfg.seq_len + 1))
        with FlopCounterMode(display=False) as count:
            fam.apply(params, x[:, start:start + 1], state)
        assert count.get_total_flops() <= projections + 4 * cfg.heads * cfg.dim_head * (text_len(cfg) + window)


@each_config
def test_a_state_keeps_text_and_window_only_and_is_not_written_to(cfg):
    params, x, _, _ = made(cfg)
    small, large = (fnattn.attentions.init_state(params, 2, capacity=c) for c in (1, cfg.seq_len + 1))
    assert tree.structure(small) == tree.structure(large)
    assert all(a.shape == b.shape for a, b in zip(tree.leaves(small), tree.leaves(large)))
    if isinstance(cfg, sparse_axial.Config):
        assert large.k_image.shape[2] == (cfg.image_size ** 2 if cfg.axis else cfg.image_size - 1)
    copies = [t.clone() for t in tree.leaves(small)]
    fnattn.attentions.apply(params, x[:, :3], small)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(small), copies))


def test_a_step_compiles_once_for_all_positions():
    cfg = CONFIGS[0]
    params, x, _, _ = made(cfg)
    step = torch.compile(lambda x, s: sparse_conv.apply(params, x, s), fullgraph=True, backend="aot_eager")
    whole = sparse_conv.apply(params, x)[0]
    state = sparse_conv.init_state(params, 2, capacity=20)
    torch._dynamo.utils.counters.clear()
    for i in range(6):
        out, state = step(x[:, i:i + 1], state)
        assert_close(out, whole[:, i:i + 1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------ masks, derivatives


@each_config
def test_a_row_without_visible_keys_gives_zero_in_one_pass_and_in_chunks(cfg):
    params, x, _, _ = made(cfg)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, :2] = False
    mask[1] = False
    out = family(cfg).apply(params, x, mask=mask)[0]
    assert not out[0, :2].any() and not out[1].any()
    assert out[0, 2:].abs().amin(-1).gt(0).all()
    assert_close(in_chunks(params, x, [1, 4, cfg.seq_len - 4], mask=mask)[0], out)
    grads = tree.grad(lambda p, x: family(cfg).apply(p, x, mask=mask)[0].sum(), (0, 1))(params, x)
    assert all(t.isfinite().all() for t in tree.leaves(grads))


@each_config
def test_derivatives_in_every_mode_agree_with_dense_attention_and_are_not_zero(cfg):
    params, x, angles, _ = made(cfg, text_len(cfg) + cfg.image_size + 2, batch=1)
    n = x.shape[1]
    spread = random.normal(random.key(5), x.shape, x.dtype)

    def losses(run):
        return lambda s: run(params, x + s * spread, angles).sin().sum()

    ours = losses(lambda p, x, a: family(cfg).attend(p, x, angles=a)[0])
    carried = losses(lambda p, x, a: in_chunks(p, x, [n - 4, 3, 1], a)[0])
    true = losses(dense)
    s = x.new_zeros(n, 1)
    step = random.normal(random.key(6), s.shape, s.dtype)
    for take in (lambda f: grad(f)(s), lambda f: jvp(f, (s,), (step,))[1], lambda f: hessian(f)(s[:1]),
                 lambda f: jvp(grad(f), (s,), (step,))[1], lambda f: grad(lambda s: (grad(f)(s) * step).sum())(s),
                 lambda f: vmap(grad(f))(torch.stack([s, s + 0.1]))):
        expected = take(true)
        assert expected.abs().max() > 1e-4
        for f in (ours, carried):
            assert_close(take(f), expected)


# ------------------------------------------------------------------------------------------------ errors


@each_config
def test_mistakes_are_named(cfg):
    params, x, _, mask = made(cfg)
    name, fam, limit = family(cfg).FAMILY.name, family(cfg), cfg.seq_len + 1
    longer = torch.cat((x, x[:, :1]), 1)
    with pytest.raises(ValueError, match=rf"{name}.apply: x has {limit + 1} positions, but cfg allows {limit} = text_len "
                                         rf"{text_len(cfg)} \+ image_size\^2 {cfg.image_size ** 2}.\n  Shorten x"):
        fam.apply(params, longer)
    state = fam.apply(params, x[:, :5], fam.init_state(params, 2, capacity=limit))[1]
    with pytest.raises(ValueError, match=rf"{name}.apply: x has {limit - 4} positions after 5, but cfg allows {limit}"):
        fam.apply(params, x[:, 4:], state)
    with pytest.raises(ValueError, match=rf"{name}.init_state: capacity must be at most cfg.seq_len \+ 1 = {limit}; got"):
        fam.init_state(params, 2, capacity=limit + 1)
    with pytest.raises(ValueError, match=rf"{name}.apply: cannot take context.*\n  Use attentions.full"):
        fam.apply(params, x, context=x)
    with pytest.raises(ValueError, match=r"mask must be \[batch, keys\]"):
        fam.apply(params, x, mask=mask[:, 1:])
    with pytest.raises(ValueError, match=rf"{name}.apply: the state must have .batch, heads, text, width. = .3, "):
        fam.apply(params, torch.cat((x, x[:1]))[:, 5:6], state)
    with pytest.raises(TypeError, match=rf"{name}.apply: state must come from {name}.init_state; got tuple"):
        fam.apply(params, x, (x,))
    with pytest.raises(ValueError, match="impl must be one of .*; got 'cuda'"):
        fam.apply(params, x[:, 5:6], state, impl="cuda")


@pytest.mark.parametrize(("build", "text"), [
    (lambda: sparse_conv.Config(dim=4, seq_len=20, image_size=4, kernel_size=4), "kernel_size must be odd; got 4"),
    (lambda: sparse_conv.Config(dim=4, seq_len=20, image_size=4, dilation=0), "dilation must be at least 1; got 0"),
    (lambda: sparse_conv.Config(dim=4, seq_len=15, image_size=4), r"seq_len must be at least image_size\^2 = 16; got 15"),
    (lambda: sparse_axial.Config(dim=4, seq_len=20, image_size=4, axis=2), r"axis must be 0 \(along a row\) or 1 .*; got 2"),
    (lambda: sparse_axial.Config(dim=0, seq_len=20, image_size=4), "sparse_axial.Config: dim must be at least 1; got 0"),
    (lambda: sparse_axial.Config(dim=4, seq_len=20, image_size=4, dropout=-1), r"dropout must lie in \[0, 1\]; got -1"),
])
def test_wrong_configs_are_named(build, text):
    with pytest.raises(ValueError, match=text):
        build()
