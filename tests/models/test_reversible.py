"""The reversible stack: equal to the plain recurrence in every derivative, and its memory does not grow with depth."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from upstream import upstream

from fnattn import random, taps, tree
from fnattn.models.reversible import plain, reversible
from fnattn.testing.memory import peak_bytes

B, N, D = 2, 5, 3


def f(params, x, factor):
    return random.dropout(params["key"], torch.tanh(x @ params["w"] + params["b"]) * factor, 0.3)


def g(params, x, factor):
    return torch.sin(x @ params["w"]) * params["b"] * params["both"]


def drawn(key, *shape):
    return random.normal(key, shape, torch.float64)


def make(depth, seed=5):
    """Blocks and their params; one tensor is shared by all second halves."""
    root = random.key(seed)
    both = drawn(random.fold_in(root, "both"), D)
    params = []
    for i in range(depth):
        k = random.split(random.fold_in(root, i), 6)
        params.append(({"w": drawn(k[0], D, D) / 2, "b": drawn(k[1], D), "key": k[2]},
                       {"w": drawn(k[3], D, D) / 2, "b": drawn(k[4], D), "both": both}))
    return [(f, g)] * depth, params


BLOCKS, PARAMS = make(3)
X = drawn(random.key(1), B, N, D)
FACTOR = random.uniform(random.key(2), (N, 1), torch.float64)


def loss(run, merge="sum"):
    return lambda params, x, factor=FACTOR: run(BLOCKS, params, x, factor, merge=merge).cos().sum()


def by_tensors(run):
    """The loss as a function of some tensors: the first weight, a middle bias, the shared vector, x."""
    def fn(w, b, both, x):
        params = [({**p}, {**q, "both": both}) for p, q in PARAMS]
        params[0][0]["w"] = w
        params[1][1]["b"] = b
        return loss(run)(params, x)
    return fn


ARGS = (PARAMS[0][0]["w"], PARAMS[1][1]["b"], PARAMS[0][1]["both"], X)
TWICE = tuple(torch.stack([t, t * 1.5]) for t in ARGS)


def pulled(fn):
    """vjp of grad, pulled back when the level of vjp is over."""
    def along(*args):
        slopes, pull = vjp(lambda *a: grad(fn, (0, 1, 2, 3))(*a), *args)
        return pull(tuple(s.cos() for s in slopes))
    return along


TRANSFORMS = {
    "value": lambda fn: fn(*ARGS),
    "grad": lambda fn: grad(fn, (0, 1, 2, 3))(*ARGS),
    "vjp": lambda fn: vjp(fn, *ARGS)[1](X.new_tensor(2.0)),
    "jvp": lambda fn: jvp(fn, ARGS, tuple(t.cos() for t in ARGS)),
    "hessian": lambda fn: hessian(fn, (1, 2))(*ARGS),
    "jacrev of jacrev": lambda fn: jacrev(jacrev(fn, 1), 2)(*ARGS),
    "jacfwd of jacfwd": lambda fn: jacfwd(jacfwd(fn, 1), 2)(*ARGS),
    "jacrev of jacfwd": lambda fn: jacrev(jacfwd(fn, 1), 2)(*ARGS),
    "grad of grad": lambda fn: grad(lambda *a: grad(fn)(*a).sin().sum(), 3)(*ARGS),
    "grad of grad of grad": lambda fn: grad(
        lambda *a: grad(lambda *a: grad(fn)(*a).sin().sum(), 3)(*a).sum(), 1)(*ARGS),
    "vmap of vjp of grad": lambda fn: vmap(pulled(fn))(*TWICE),
    "grad of vjp of grad": lambda fn: grad(lambda *a: sum(p.sin().sum() for p in pulled(fn)(*a)), (0, 3))(*ARGS),
    "vmap": lambda fn: vmap(fn)(*TWICE),
    "vmap over x only": lambda fn: vmap(fn, (None, None, None, 2))(*ARGS[:3], TWICE[3].movedim(0, 2)),
    "vmap of grad": lambda fn: vmap(grad(fn, (0, 3)))(*TWICE),
    "vmap of vjp": lambda fn: vmap(lambda *a: vjp(fn, *a)[1](X.new_tensor(2.0)))(*TWICE),
    "vmap over params of vjp": lambda fn: vmap(lambda w: vjp(fn, w, *ARGS[1:])[1](X.new_tensor(2.0)))(TWICE[0]),
    "grad of vmap": lambda fn: grad(lambda *a: vmap(fn)(*a).sin().sum(), (0, 1, 2, 3))(*TWICE),
    "vmap of hessian": lambda fn: vmap(hessian(fn, 1))(*TWICE),
    "jvp of vmap": lambda fn: jvp(vmap(fn), TWICE, TWICE),
    "vmap of jvp": lambda fn: vmap(lambda *a: jvp(fn, a, a)[1])(*TWICE),
}


def assert_trees_close(ours, theirs):
    ours, theirs = ([t for t in tree.leaves(part) if t is not None] for part in (ours, theirs))  # keys get no gradient
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert_close(a, b)
        assert b.abs().max() > 1e-6, "a comparison with zero shows nothing"


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_equals_the_plain_recurrence_under(name):
    assert_trees_close(TRANSFORMS[name](by_tensors(reversible)), TRANSFORMS[name](by_tensors(plain)))


def test_every_gradient_equals_that_of_the_plain_recurrence_for_both_merges():
    for merge in ("sum", "mean"):
        ours, theirs = (tree.grad(loss(run, merge), (0, 1, 2))(PARAMS, X, FACTOR) for run in (reversible, plain))
        assert_trees_close(ours, theirs)


def test_per_member_dropout_keys_map_too():
    members = tree.stack([PARAMS, make(3, seed=6)[1]])
    ours = tree.vmap(lambda p: tree.grad(loss(reversible))(p, X))(members)
    for i, member in enumerate(tree.unstack(members)):
        one = tree.grad(loss(plain))(member, X)
        assert_trees_close(tree.map(lambda t, i=i: t if t is None else t[i], ours), one)


def test_ordinary_autograd_gives_first_and_second_derivatives():
    tensors = [t.clone().requires_grad_() for t in ARGS]
    assert torch.autograd.gradcheck(by_tensors(reversible), tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(by_tensors(reversible), tensors, check_fwd_over_rev=True)


def test_two_forwards_before_a_backward_keep_their_own_dropout_masks():
    other = make(3, seed=6)[1]
    w = PARAMS[0][0]["w"].clone().requires_grad_()

    def both(run):
        swap = lambda params: [({**params[0][0], "w": w}, params[0][1]), *params[1:]]  # noqa: E731
        first, second = loss(run)(swap(PARAMS), X), loss(run)(swap(other), X)
        return torch.autograd.grad(first + second, w)[0]

    assert_close(both(reversible), both(plain))


def test_the_gradient_of_an_input_that_needs_none_does_not_hide_that_of_the_params():
    w = PARAMS[0][0]["w"].clone().requires_grad_()
    assert torch.autograd.grad(by_tensors(reversible)(w, *ARGS[1:]), w)[0].abs().max() > 0


def test_memory_does_not_grow_with_depth_unlike_the_plain_recurrence():
    x = torch.ones(4, 64, D, dtype=torch.float64)

    def peak(run, depth, take):
        blocks, params = make(depth)
        def fn(x, factor):
            return run(blocks, params, x, factor).sum()
        return peak_bytes(lambda: take(fn, x))

    def by_vjp(fn, x):
        value, pull = vjp(lambda x: fn(x, x[0, :, :1]), x)
        return pull(torch.ones_like(value))

    def by_autograd(fn, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(fn(x, x[0, :, :1].detach()), x)

    for take in (by_vjp, by_autograd):
        one = 4 * 64 * D * 8
        # less than one activation for twelve more blocks
        assert peak(reversible, 16, take) - peak(reversible, 4, take) < one
        assert peak(plain, 16, take) - peak(plain, 4, take) > 12 * 2 * one


def test_compiled_it_equals_itself():
    fn = torch.compile(by_tensors(reversible), fullgraph=True, backend="aot_eager")
    assert_close(fn(*ARGS), by_tensors(plain)(*ARGS))
    gradient = torch.compile(grad(by_tensors(reversible), (0, 3)), fullgraph=True, backend="aot_eager")
    assert_trees_close(gradient(*ARGS), grad(by_tensors(plain), (0, 3))(*ARGS))


def test_low_precision_streams_are_summed_in_float32():
    """At depth 24 the gradient of bfloat16 stays as near to float64 as that of the plain recurrence."""
    blocks, params = make(24)
    params = [tree.map(lambda t: t / 4 if t.is_floating_point() else t, p) for p in params]

    def gradient(run, dtype):
        cast = tree.map(lambda t: t.to(dtype) if t.is_floating_point() else t, params)
        fn = lambda p: run(blocks, p, X.to(dtype), FACTOR.to(dtype)).square().sum()  # noqa: E731
        return torch.cat([t.double().flatten() for t in tree.leaves(tree.grad(fn)(cast)) if t is not None])

    exact = gradient(plain, torch.float64)
    ours, theirs = (gradient(run, torch.bfloat16) for run in (reversible, plain))
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    low = tree.map(lambda t: t.bfloat16() if t.is_floating_point() else t, params)
    out = reversible(blocks, low, X.bfloat16(), FACTOR.bfloat16())
    assert out.dtype == torch.bfloat16


def test_the_backward_pass_recomputes_under_the_autocast_of_the_forward_pass():
    seen = []

    def half(params, x):
        out = x @ params
        seen.append(out.dtype)
        return out

    w = torch.eye(D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = reversible([(half, half)], [(w, w)], X.float())
    torch.autograd.grad(out.sum(), w)
    assert seen == [torch.bfloat16] * 4


def test_taps_inside_blocks_are_seen():
    def tapped(params, x):
        return taps.tap("hidden", x * params)

    def still(params, x):
        return x * params

    run = lambda x: reversible([(tapped, still)], [(torch.tensor(2.0), torch.tensor(3.0))], x)  # noqa: E731
    assert_close(taps.harvest(run)(X)[1]["hidden"], 2 * X)


def test_no_blocks_give_twice_the_input_or_the_input():
    assert_close(reversible([], [], X), 2 * X)
    assert_close(reversible([], [], X, merge="mean"), X)


@pytest.mark.parametrize(("merge", "name"), [("sum", "linformer"), ("mean", "dalle_pytorch")])
def test_upstream_computes_the_same_value_and_gradients(merge, name):
    module = upstream(f"{name}.reversible")
    lins = [(torch.nn.Linear(D, D).double(), torch.nn.Linear(D, D).double()) for _ in range(3)]
    blocks = torch.nn.ModuleList([torch.nn.ModuleList(pair) for pair in lins])
    net = module.ReversibleSequence(blocks).train()
    x = X.clone().requires_grad_()
    out = net(x)
    out.square().sum().backward()

    def linear(p, x):
        return x @ p["weight"].T + p["bias"]

    params = [tuple(dict(m.named_parameters()) for m in pair) for pair in lins]
    detached = tree.map(lambda t: t.detach(), params)
    run = lambda p, x: reversible([(linear, linear)] * 3, p, x, merge=merge)  # noqa: E731
    assert_close(run(detached, X), out.detach())
    gp, gx = tree.grad(lambda p, x: run(p, x).square().sum(), (0, 1))(detached, X)
    assert_close(gx, x.grad)
    assert_trees_close(gp, tree.map(lambda t: t.grad, params))


# ------------------------------------------------------------------------------------------------ errors


def test_a_captured_tensor_that_wants_a_gradient_is_refused():
    w = torch.ones(D, requires_grad=True)
    with pytest.raises(ValueError, match="captures a tensor that takes part.*\n  Pass it in params"):
        reversible([(lambda p, x: x * w, lambda p, x: x)], [((), ())], X.float().requires_grad_())
    out = reversible([(lambda p, x: x * w, lambda p, x: x)], [((), ())], X.float())  # nothing is recomputed
    assert torch.autograd.grad(out.sum(), w)[0].abs().min() > 1e-3


def test_a_tensor_captured_one_function_further_in_is_refused_too():
    def outer(w):
        inner = lambda x: x * w  # noqa: E731
        return reversible([(lambda p, x: inner(x), lambda p, x: x)], [((), ())], X).sum()

    with pytest.raises(ValueError, match="captures a tensor"):
        grad(outer)(torch.ones(D, dtype=torch.float64))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="expected one pair of params for each block; got 2 for 3 blocks"):
        reversible(BLOCKS, PARAMS[:2], X, FACTOR)
    with pytest.raises(ValueError, match="merge must be 'sum' or 'mean'; got 'max'"):
        reversible(BLOCKS, PARAMS, X, FACTOR, merge="max")
    with pytest.raises(ValueError, match=r"must return a tensor of x's shape \[2, 5, 3\]; got \[2, 5\]"):
        reversible([(lambda p, x: x.sum(-1), lambda p, x: x)], [((), ())], X.clone().requires_grad_())
