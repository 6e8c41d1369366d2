"""The Linformer stack and language model against upstream, sequential and reversible, with masks, dropout and GLU."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.func import jvp, vmap
from torch.nn import functional as F
from upstream import upstream

from fnattn import convert, random, taps, tree
from fnattn.models import linformer_lm as lm
from fnattn.testing.memory import peak_bytes

DIM, LONGEST, VOCABULARY = 6, 13, 11
OPTIONS = [dict(), dict(one_kv_head=True, share_kv=True), dict(dim_head=5)]
IDS = random.randint(random.key(7), (2, 7), 0, VOCABULARY)
X = random.normal(random.key(8), (2, 7, DIM), torch.float64)
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


def config(depth=3, **options):
    return lm.Config(dim=DIM, seq_len=LONGEST, depth=depth, k=4, heads=2, **options)


def made(**options):
    return lm.init(random.key(0), config(**options), dtype=torch.float64)


def step_by_step(params, x, mask=None, reversible=False):
    """The stack from torch's own layers, without dropout."""
    def attn(layer, x):
        return lm.linformer.apply(layer.attn, F.layer_norm(x, (DIM,), *layer.attn_norm), mask=mask)[0]

    def ff(layer, x):
        h = F.linear(F.layer_norm(x, (DIM,), *layer.ff_norm), layer.ff.w_in, layer.ff.b_in)
        a, v = h.chunk(2, -1) if params.cfg.ff_glu else (h, 1.0)
        return F.linear(getattr(F, params.cfg.ff_activation)(a) * v, layer.ff.w_out, layer.ff.b_out)

    if not reversible:
        for layer in params.layers:
            x = x + attn(layer, x)
            x = x + ff(layer, x)
        return x
    y1 = y2 = x
    for layer in params.layers:
        y1 = y1 + attn(layer, y2)
        y2 = y2 + ff(layer, y1)
    return y1 + y2


@pytest.mark.parametrize("reversible", [False, True], ids=["sequential", "reversible"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_gradients_equal_upstream(options, reversible):
    cls = upstream("linformer").LinformerLM
    module = cls(VOCABULARY, DIM, LONGEST, 3, k=4, heads=2, reversible=reversible, **options).double()
    cfg = config(num_tokens=VOCABULARY, reversible=reversible, **options)
    params = convert.load(cfg, {k: v.detach() for k, v in module.state_dict().items()})
    theirs = module(IDS)
    assert_close(lm.apply(params, IDS)[0], theirs.detach())
    theirs.square().sum().backward()
    ours = tree.grad(lambda p: lm.apply(p, IDS)[0].square().sum())(params)
    for name, leaf in convert.dump(ours).items():
        assert_close(leaf, module.get_parameter(name).grad)
    assert set(convert.dump(params)) == set(module.state_dict())


@pytest.mark.parametrize("reversible", [False, True], ids=["sequential", "reversible"])
def test_the_stack_alone_has_upstreams_layout_too(reversible):
    module = upstream("linformer").Linformer(DIM, LONGEST, 2, k=4, heads=2, reversible=reversible).double()
    params = made(depth=2, reversible=reversible)
    module.load_state_dict(convert.dump(params))
    with torch.no_grad():
        assert_close(lm.encode(params, X), module(X))


@pytest.mark.parametrize("ff", [dict(), dict(ff_glu=True), dict(ff_glu=True, ff_activation="relu"),
                                dict(ff_activation="silu", ff_mult=2)], ids=str)
@pytest.mark.parametrize("reversible", [False, True], ids=["sequential", "reversible"])
def test_it_is_the_recurrence_that_its_docstring_states(reversible, ff):
    params = made(reversible=reversible, **ff)
    assert_close(lm.encode(params, X, mask=MASK), step_by_step(params, X, MASK, reversible))


def test_upstreams_feed_forward_with_glu_is_this_one():
    module = upstream("linformer.linformer").FeedForward(DIM, glu=True).double()
    params = lm.FeedForward(module.w1.weight, module.w1.bias, module.w2.weight, module.w2.bias)
    assert_close(lm.feed_forward(params, X, glu=True), module(X))


def test_golden_numbers():
    for reversible, expected in ((False, GOLDEN_SEQUENTIAL), (True, GOLDEN_REVERSIBLE)):
        params = made(num_tokens=VOCABULARY, depth=2, reversible=reversible)
        params = tree.map(lambda t: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape), params)
        out = lm.apply(params, torch.arange(5)[None])[0]
        assert_close(out[0, ::2, 1], torch.tensor(expected, dtype=torch.float64))


# from linformer 0.2.3
GOLDEN_SEQUENTIAL = [44.34174251887448, 41.32474720649454, 38.30775189411462]
GOLDEN_REVERSIBLE = [75.6489821553841, 69.61499153062424, 63.58100090586437]


def test_dropout_gives_the_same_masks_on_recomputation_in_every_mode():
    """Same key, same function: the reversible gradient, which recomputes, equals the derivative of the forward pass."""
    params, key = made(reversible=True, dropout=0.4), random.key(9)
    loss = lambda p, x: lm.encode(p, x, mask=MASK, dropout_key=key).sin().sum()  # noqa: E731
    with_taps = lambda p, x: taps.harvest(loss)(p, x)[0]  # noqa: E731 - the plain recurrence, see models.reversible
    ours, theirs = (tree.grad(f, (0, 1))(params, X) for f in (loss, with_taps))
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs)):
        assert_close(a, b)
        assert b.abs().max() > 0
    t = random.normal(random.key(10), X.shape, X.dtype)
    assert_close(jvp(lambda x: loss(params, x), (X,), (t,))[1], (ours[1] * t).sum())
    assert not torch.equal(lm.encode(params, X, dropout_key=key), lm.encode(params, X))


@pytest.mark.parametrize("reversible", [False, True], ids=["sequential", "reversible"])
def test_per_sample_gradients_equal_a_loop(reversible):
    params = made(num_tokens=VOCABULARY, reversible=reversible)
    loss = lambda p, ids, mask: lm.apply(p, ids[None], mask=mask[None])[0].sin().sum()  # noqa: E731
    each = tree.vmap(tree.grad(loss), (None, 0, 0))(params, IDS, MASK)
    for i in range(2):
        for a, b in zip(tree.leaves(each), tree.leaves(tree.grad(loss)(params, IDS[i], MASK[i]))):
            assert_close(a[i], b)


def test_an_ensemble_of_reversible_models_trains_under_vmap():
    cfg = config(num_tokens=VOCABULARY, reversible=True)
    members = [lm.init(random.key(i), cfg, dtype=torch.float64) for i in range(3)]
    loss = lambda p: F.cross_entropy(lm.apply(p, IDS)[0].flatten(0, 1), IDS.flatten())  # noqa: E731
    values, grads = tree.vmap(tree.value_and_grad(loss))(tree.stack(members))
    for i, member in enumerate(members):
        value, gradient = tree.value_and_grad(loss)(member)
        assert_close(values[i], value)
        for a, b in zip(tree.leaves(grads), tree.leaves(gradient)):
            assert_close(a[i], b)


def test_padding_at_the_end_changes_nothing_before_it():
    for reversible in (False, True):
        params = made(num_tokens=VOCABULARY, reversible=reversible)
        assert_close(lm.apply(params, IDS, mask=MASK)[0][1, :4], lm.apply(params, IDS[1:, :4])[0][0])


def test_only_the_sequential_stack_needs_more_memory_when_it_is_deeper():
    x = torch.ones(1, LONGEST, DIM, dtype=torch.float64)

    def peak(depth, reversible):
        cfg = config(depth=depth, reversible=reversible)
        layer = made(depth=1).layers[0]  # one set of weights for all layers: what differs is activations only
        params = lm.Params(cfg, (layer,) * depth)
        def run():
            value, pull = torch.func.vjp(lambda x: lm.encode(params, x).square().sum(), x)
            return pull(torch.ones_like(value))
        return peak_bytes(run)

    assert peak(12, True) - peak(3, True) < x.nbytes
    assert peak(12, False) - peak(3, False) > 9 * 4 * x.nbytes


def test_values_inside_are_named_by_layer():
    names = set(taps.harvest(lambda: lm.encode(made(depth=2, reversible=True), X))()[1])
    assert {"layers.0.attn.q", "layers.1.attn.heads"} <= names


def test_mapping_over_sequences_equals_a_batch():
    params = made(reversible=True)
    each = vmap(lambda x, m: lm.encode(params, x[None], mask=m[None])[0])(X, MASK)
    assert_close(each, lm.encode(params, X, mask=MASK))


@pytest.mark.parametrize(("call", "text"), [
    (lambda: lm.apply(made(), IDS), "has no vocabulary; got num_tokens=0.\n  Call encode on vectors."),
    (lambda: lm.apply(made(num_tokens=11), torch.zeros(1, 14, dtype=torch.int64)),
     "at most cfg.seq_len=13 positions; got 14"),
    (lambda: lm.apply(made(num_tokens=11), IDS, (IDS,)), "cannot stream. Its projection mixes all positions"),
    (lambda: lm.apply(made(num_tokens=11), X), r"ids must be integers \[batch, seq\]; got torch.float64 \[2, 7, 6\]"),
    (lambda: lm.encode(made(), X[0]), r"x must be \[batch, seq, 6\]"),
    (lambda: config(ff_activation="swish"), "ff_activation must be one of 'gelu', 'relu', 'silu', 'tanh'; got 'swish'"),
    (lambda: config(depth=0), "depth and ff_mult at least 1; got 0, 0 and 4"),
    (lambda: config(dropout=2.0), r"dropout must lie in \[0, 1\]"),
])
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
