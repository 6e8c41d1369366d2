"""Trees: static configs, named leaves, and transforms over trees that hold more than floating tensors."""

from __future__ import annotations

import functools
from typing import NamedTuple

import optree
import pytest
import torch

from fnattn import tree
from fnattn.core import EMPTY, Empty, config


@config
class Cfg:
    width: int = 3


class Inner(NamedTuple):
    w: torch.Tensor
    gone: Empty = EMPTY


class Params(NamedTuple):
    cfg: Cfg
    inner: Inner
    step: torch.Tensor


def params() -> Params:
    return Params(Cfg(), Inner(torch.tensor([1.0, -2.0, 3.0])), torch.tensor(5))


def loss(p: Params, x: torch.Tensor) -> torch.Tensor:
    return (p.inner.w * x).sin().sum() * p.cfg.width + 0 * p.step


def test_a_config_is_a_node_without_leaves_for_torch_and_for_optree():
    p = params()
    assert len(tree.leaves(p)) == 2
    assert len(optree.tree_leaves(p, namespace=tree.NAMESPACE)) == 2
    assert tree.map(lambda x: x, p) == p or tree.structure(tree.map(lambda x: x, p)) == tree.structure(p)
    back = optree.tree_unflatten(optree.tree_structure(p, namespace=tree.NAMESPACE), tree.leaves(p))
    assert back.cfg == p.cfg and back.inner.w is p.inner.w


def test_trees_with_two_different_configs_cannot_be_mapped_together():
    p = params()
    with pytest.raises(ValueError, match="mismatch"):
        tree.map(torch.add, p, p._replace(cfg=Cfg(width=5)))


def test_a_config_is_frozen_keyword_only_and_hashable():
    assert hash(Cfg()) == hash(Cfg()) and Cfg() == Cfg() and Cfg(width=5) != Cfg()
    with pytest.raises(AttributeError):
        Cfg().width = 7
    with pytest.raises(TypeError):
        Cfg(3)


def test_flat_names_are_dotted_and_the_way_back_is_exact():
    p = params()
    flat = tree.to_flat({"a": p, "b": [p.step, (p.inner,)]})
    assert list(flat) == ["a.inner.w", "a.step", "b.0", "b.1.0.w"]
    back = tree.from_flat(dict(reversed(flat.items())), {"a": p, "b": [p.step, (p.inner,)]})
    assert back["a"].inner.w is p.inner.w and back["a"].cfg is p.cfg


def test_missing_and_unknown_names_are_both_named():
    with pytest.raises(ValueError, match=r"missing \['step'\], unknown \['stepp'\]"):
        tree.from_flat({"inner.w": torch.ones(3), "stepp": torch.ones(())}, params())


def test_names_that_print_alike_are_refused():
    with pytest.raises(ValueError, match=r"\['1'\] more than once"):
        tree.to_flat({1: torch.ones(()), "1": torch.ones(())})


def test_partition_and_combine_are_inverse_and_keep_integers_apart():
    p = params()
    floats, rest = tree.partition(p)
    assert floats.step is None and rest.inner.w is None
    back = tree.combine(floats, rest)
    assert back.step is p.step and back.inner.w is p.inner.w


def test_stack_and_unstack_are_inverse():
    a, b = params(), tree.map(lambda x: x + 1, params())
    both = tree.stack([a, b])
    assert both.inner.w.shape == (2, 3)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(tree.unstack(both)[1]), tree.leaves(b)))
    with pytest.raises(ValueError, match="at least one tree"):
        tree.stack([])


def test_value_and_grad_leaves_integers_alone_and_equals_autograd():
    p, x = params(), torch.tensor([0.3, 0.5, 0.7])
    value, grads = tree.value_and_grad(loss)(p, x)
    w = p.inner.w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(p._replace(inner=Inner(w)), x), w)
    assert grads.step is None and grads.cfg == p.cfg
    torch.testing.assert_close(grads.inner.w, expected)
    assert expected.abs().min() > 0
    torch.testing.assert_close(value, loss(p, x))


def test_value_and_grad_takes_several_arguments_and_aux():
    p, x = params(), torch.tensor([0.3, 0.5, 0.7])
    (value, aux), (gp, gx) = tree.value_and_grad(lambda p, x: (loss(p, x), {"x2": x * 2}), argnums=(0, 1), has_aux=True)(p, x)
    torch.testing.assert_close(gx, torch.func.grad(lambda x: loss(p, x))(x))
    torch.testing.assert_close(aux["x2"], x * 2)


def test_value_and_grad_nests_to_second_order():
    f = lambda w: (w ** 3).sum()  # noqa: E731
    w = torch.tensor([1.0, 2.0])
    second = tree.grad(lambda w: tree.grad(f)(w).sum())(w)
    torch.testing.assert_close(second, 6 * w)


def test_value_and_grad_keeps_no_graph_for_a_second_derivative():
    x = torch.ones(3)
    _, g = tree.value_and_grad(lambda w: (w ** 3).sum())(x)
    assert not g.requires_grad


@pytest.mark.parametrize("bad", [lambda w: w * 2, lambda w: 3.0])
def test_value_and_grad_wants_a_scalar(bad):
    with pytest.raises(ValueError, match="must return a 0-d tensor"):
        tree.value_and_grad(bad)(torch.ones(3))


def test_vmap_maps_tensors_and_passes_everything_else_through():
    p = params()
    many = p._replace(inner=Inner(torch.arange(6.0).reshape(2, 3)))
    axes = (Params(Cfg(), Inner(0), None), None)
    out = tree.vmap(lambda p, x: {"y": loss(p, x), "name": "seven", "none": None}, axes)(many, torch.ones(3))
    assert out["name"] == "seven" and out["none"] is None
    expected = torch.stack([loss(p._replace(inner=Inner(w)), torch.ones(3)) for w in many.inner.w])
    torch.testing.assert_close(out["y"], expected)


def test_vmap_of_grad_over_trees_is_per_sample_gradients():
    p, xs = params(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    grads = tree.vmap(tree.grad(loss), (None, 0))(p, xs)
    expected = torch.stack([tree.grad(loss)(p, x).inner.w for x in xs])
    torch.testing.assert_close(grads.inner.w, expected)


def test_vmap_explains_axes_that_do_not_fit():
    with pytest.raises(ValueError, match="one entry per argument; got 1 for 2"):
        tree.vmap(loss, (0,))(params(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be a prefix"):
        tree.vmap(loss, ((0, 0, 0, 0), 0))(params(), torch.ones(2, 3))


def _block(p, x):
    return {"y": torch.tanh(x @ p["w"]) * p["n"], "x": x}


@pytest.mark.parametrize("transform", ["value", "grad", "jvp", "vmap", "vmap(grad)", "grad(grad)", "jvp(grad)", "jacfwd(jacfwd)",
                                       "vmap(vjp(grad))", "grad(vjp(grad))"])
def test_remat_equals_the_function_under_every_transform(transform):
    g = torch.Generator().manual_seed(0)
    w, x, t = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 3), (5, 3), (3, 3)))
    results = []
    for wrap in (lambda f: f, tree.remat):
        block = wrap(_block)

        def f(w, x=x):
            return block({"w": w, "n": 2}, x)["y"].pow(2).sum()  # noqa: B023 - used inside this turn of the loop

        def pulled(w, x=x):
            slope, pull = torch.func.vjp(lambda w, x: torch.func.grad(f)(w, x), w, x)
            return pull(slope.cos())[0]

        results.append({
            "value": lambda: f(w), "grad": lambda: torch.func.grad(f)(w), "jvp": lambda: torch.func.jvp(f, (w,), (t,))[1],
            "vmap": lambda: torch.func.vmap(f)(torch.stack((w, t))),
            "vmap(grad)": lambda: torch.func.vmap(torch.func.grad(f), (None, 0))(w, x.unsqueeze(1)),
            "grad(grad)": lambda: torch.func.grad(lambda w: torch.func.grad(f)(w).pow(2).sum())(w),
            "jvp(grad)": lambda: torch.func.jvp(torch.func.grad(f), (w,), (t,))[1],
            "vmap(vjp(grad))": lambda: torch.func.vmap(pulled)(torch.stack((w, t))),
            "grad(vjp(grad))": lambda: torch.func.grad(lambda w: pulled(w).sin().sum())(w),
            "jacfwd(jacfwd)": lambda: torch.func.jacfwd(torch.func.jacfwd(f))(w),
        }[transform]())
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_remat_saves_only_its_arguments():
    w = torch.randn(7, 7, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        tree.remat(lambda w, x: torch.tanh(torch.tanh(x @ w) @ w))(w, torch.ones(5, 7))
    assert set(saved) == {w.shape, torch.Size([5, 7])}


def test_remat_refuses_results_that_are_no_tensors():
    with pytest.raises(TypeError, match="must return tensors only"):
        tree.remat(lambda x: (x, 3))(torch.ones(2))


class Holder:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x * self.w


@pytest.mark.parametrize("make", [
    lambda w: lambda x: x * w, lambda w: functools.partial(torch.mul, w), lambda w: lambda x, w=w: x * w,
    lambda w: lambda x: (lambda y: y * w)(x), Holder, lambda w: Holder(w).__call__,
    lambda w: (lambda o: lambda x: o["o"](x))({"o": Holder(w)})],
    ids=["cell", "partial", "default", "inside", "object", "method", "attribute"])
def test_remat_refuses_a_captured_tensor_that_wants_a_derivative(make):
    def f(w, x):
        return tree.remat(make(w))(x).sum()

    w, x = torch.full((3,), 0.5), torch.ones(3)
    leaf = w.clone().requires_grad_()
    for run in (lambda: torch.func.grad(f)(w, x), lambda: torch.func.jvp(f, (w, x), (w, x)), lambda: tree.jvp(f, (w, x), (w, None)),
                lambda: torch.vmap(torch.func.grad(f))(w[None], x[None]), lambda: f(leaf, x.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"^tree.remat: .* captures a tensor.* that takes part in .*\n  Make it an argument"):
            run()
    # Constants may be captured, and where nothing is recomputed everything may.
    assert torch.equal(torch.func.grad(f, 1)(w, x), w)
    assert torch.equal(torch.autograd.grad(f(leaf, x), leaf)[0], x)
    assert torch.equal(torch.vmap(f)(torch.stack((w, x)), torch.stack((x, x))), torch.tensor([1.5, 3.0]))
    with torch.no_grad():
        assert f(leaf, x.clone().requires_grad_()) == 1.5


def test_remat_takes_functions_that_also_return_whole_numbers():
    def f(x):
        return x.sin(), x.argmax()

    x, t = torch.linspace(0.2, 0.9, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for transform in (lambda f: torch.func.grad(lambda x: f(x)[0].square().sum())(x),
                      lambda f: torch.func.jvp(lambda x: f(x)[0], (x,), (t,))[1],
                      lambda f: torch.func.hessian(lambda x: f(x)[0].square().sum())(x),
                      lambda f: torch.vmap(torch.func.grad(lambda x: f(x)[0].sum()))(torch.stack((x, t)))):
        torch.testing.assert_close(transform(tree.remat(f)), transform(f))
    assert tree.remat(f)(x.clone().requires_grad_())[1] == 2
