"""tree.value_and_grad has two ways to a gradient, plain autograd and torch.func: nobody can tell them apart by the results."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.utils.flop_counter import FlopCounterMode

from fnattn import _autograd, attentions, random, taps, tree
from fnattn.models import lm


@pytest.fixture
def roads(monkeypatch):
    """Which way each call took: a list of bools, True for plain autograd."""
    taken: list[bool] = []
    usable = _autograd.usable
    monkeypatch.setattr(_autograd, "usable", lambda tensors: taken.append(usable(tensors)) or taken[-1])
    return taken


def by_func(monkeypatch, call):
    """The same call by way of torch.func."""
    with monkeypatch.context() as patch:
        patch.setattr(_autograd, "usable", lambda tensors: False)
        return call()


def cube(x: torch.Tensor) -> torch.Tensor:
    return (x ** 3).sum()


def numbers(n: int = 5, seed: int = 0) -> torch.Tensor:
    return random.normal(random.key(seed), (n,), torch.float64)


def same(a, b) -> None:
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b)):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.requires_grad == y.requires_grad and torch.equal(x, y)
        else:
            assert x == y


# ------------------------------------------------------------------------------------------------ the same results


def cases() -> list:
    return [pytest.param(family, i, id=f"{family.name}-{i}") for family in attentions.FAMILIES.values()
            for i in range(len(family.examples))]


@pytest.mark.parametrize(("family", "i"), cases())
def test_every_family_gives_the_same_bits_on_both_ways(family, i, roads, monkeypatch):
    cfg = family.examples[i]
    params = family.init(random.key(3), cfg)
    x = random.normal(random.key(4), (2, 13, cfg.dim))

    def loss(params, x):
        out, _ = family.apply(params, x, dropout_key=random.key(5))
        return out.square().sum(), out

    def call():
        return tree.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    found = call()
    assert roads == [True]
    # With grad mode on, torch.func runs derivatives that could be differentiated again: silu's then differs in the last bit.
    with torch.no_grad():
        same(found, by_func(monkeypatch, call))
    assert not any(t.requires_grad for t in tree.leaves(found) if isinstance(t, torch.Tensor))
    assert found[1][1].abs().max() > 0


@pytest.mark.parametrize("options", [{"remat": True}, {"dropout": 0.25, "norm": "layer"}, {"tied": True, "seq_len": 13}])
def test_a_model_gives_the_same_bits_on_both_ways(options, roads, monkeypatch):
    cfg = lm.Config(attention=attentions.FAMILIES["taylor"].config(dim=12, heads=3, dim_head=4, causal=True), depth=2,
                    num_tokens=17, **options)
    params, ids = lm.init(random.key(0), cfg), random.randint(random.key(1), (2, 13), 0, 17)

    def call():
        return tree.value_and_grad(lm.loss)(params, ids, dropout_key=random.key(2))

    found = call()
    assert roads == [True]
    same(found, by_func(monkeypatch, call))


def test_leaves_that_are_not_differentiated_and_arguments_that_are_not_used(roads, monkeypatch):
    given = {"x": numbers(), "unused": numbers(3), "step": torch.tensor(4), "name": "seven", "none": None, "b": (2.5,)}

    def loss(p):
        return cube(p["x"]) * p["step"] * p["b"][0], {"p": p, "name": p["name"], "none": None, "twice": p["x"] * 2}

    def call():
        return tree.value_and_grad(loss, has_aux=True)(given)

    (value, aux), grads = call()
    assert roads == [True]
    same(((value, aux), grads), by_func(monkeypatch, call))
    assert grads["step"] is None and grads["name"] is None and grads["none"] is None
    assert torch.equal(grads["unused"], torch.zeros(3, dtype=torch.float64)) and grads["x"].abs().min() > 0
    assert list(aux["p"]) == list(given) and aux["p"]["x"] is given["x"] and not aux["twice"].requires_grad


def test_a_value_that_depends_on_nothing_or_is_the_argument_itself(roads, monkeypatch):
    x = torch.tensor(3.0)
    for fn in (lambda x: torch.ones(()), lambda x: x, lambda x: x.view(1)[0]):
        same(tree.value_and_grad(fn)(x), by_func(monkeypatch, lambda fn=fn: tree.value_and_grad(fn)(x)))
    assert tree.value_and_grad(lambda x: x)(x)[0] is x and all(roads)


def test_what_the_function_does_to_classes_that_only_torch_was_told_of():
    class Box:
        def __init__(self, x):
            self.x = x

    torch.utils._pytree.register_pytree_node(Box, lambda box: ([box.x], None), lambda items, _: Box(*items))
    grads = tree.grad(lambda box: cube(box["a"].x))({"a": Box(numbers())})
    assert torch.equal(grads["a"].x, 3 * numbers() ** 2)


def test_complex_arguments(roads, monkeypatch):
    z = torch.complex(numbers(), numbers(seed=1))
    fn = lambda z: (z ** 3).abs().sum()  # noqa: E731
    found = tree.value_and_grad(fn)(z)
    same(found, by_func(monkeypatch, lambda: tree.value_and_grad(fn)(z)))
    assert found[1].is_complex() and roads == [True]


def test_a_function_that_wants_an_integer_differentiated_is_refused():
    with pytest.raises(ValueError, match="0-d tensor of floats"):
        tree.grad(lambda x: torch.tensor(3))(numbers())
    with pytest.raises(ValueError, match=r"must return \(value, aux\)"):
        tree.grad(lambda x: x.sum(), has_aux=True)(numbers())


# ------------------------------------------------------------------------------------------------ closures


def test_what_a_closure_needs_stays_differentiable_and_nothing_else_does(roads):
    x, w = numbers(), numbers(seed=1).requires_grad_()

    def fn(x):
        return (x ** 2 * w.exp()).sum(), {"both": x * w, "w": w * 2, "x": x * 3, "w itself": w}

    (value, aux), g = tree.value_and_grad(fn, has_aux=True)(x)
    assert roads == [True]
    assert {k: t.requires_grad for k, t in aux.items()} == {"both": True, "w": True, "x": False, "w itself": True}
    torch.testing.assert_close(g, 2 * x * w.exp())
    (slope,) = torch.autograd.grad(g.sum(), w, retain_graph=True)
    torch.testing.assert_close(slope, 2 * x * w.detach().exp())
    (slope,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(slope, x ** 2 * w.detach().exp())


def test_a_closure_over_a_result_that_wants_a_gradient_counts_too():
    x, w = numbers(), numbers(seed=1).requires_grad_()
    middle = w.sin()
    value, g = tree.value_and_grad(lambda x: (x ** 2).sum() + (middle ** 2).sum())(x)
    assert value.requires_grad and not g.requires_grad
    (slope,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(slope, 2 * w.detach().sin() * w.detach().cos())


def test_a_closure_is_used_by_the_results_of_two_calls_in_one_another(roads):
    x, w = numbers(), numbers(seed=1).requires_grad_()

    def outer(x):
        inner, g = tree.value_and_grad(lambda y: (y ** 3 * x ** 2).sum())(w.detach())  # inner closes over outer's x
        return inner + g.sum() + x.sum()

    value, g = tree.value_and_grad(outer)(x)
    y = w.detach()
    torch.testing.assert_close(g, 2 * x * y ** 3 + 6 * x * y ** 2 + 1)
    assert roads == [True, True] and not value.requires_grad and not g.requires_grad  # inner leaves are nobody's closure


def test_arguments_that_want_a_gradient_are_differentiated_through(roads):
    x = numbers().requires_grad_()
    value, g = tree.value_and_grad(cube)(x)
    assert roads == [False] and value.requires_grad
    (second,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())


def test_an_argument_beside_the_differentiated_one_may_want_a_gradient(roads):
    x, w = numbers(), numbers(seed=1).requires_grad_()
    g = tree.grad(lambda x, w: (x ** 2 * w ** 3).sum())(x, w)
    assert roads == [True]
    (mixed,) = torch.autograd.grad(g.sum(), w)
    torch.testing.assert_close(mixed, 6 * x * w.detach() ** 2)


# ------------------------------------------------------------------------------------------------ modes


def test_without_grad_mode_the_function_is_differentiated_and_results_carry_no_graph(roads, monkeypatch):
    x, w = numbers(), numbers(seed=1).requires_grad_()

    def fn(x):
        with torch.no_grad():
            constant = x ** 2
        return (x ** 3 * w - constant).sum()

    with torch.no_grad():
        found = tree.value_and_grad(fn)(x)
        same(found, by_func(monkeypatch, lambda: tree.value_and_grad(fn)(x)))
        assert not torch.is_grad_enabled()
    assert roads == [True] and not found[0].requires_grad
    torch.testing.assert_close(found[1], 3 * x ** 2 * w.detach())


def test_inference_mode_and_tensors_from_it(roads, monkeypatch):
    x = numbers()
    with torch.inference_mode():
        other = numbers(seed=1)
        same(tree.grad(cube)(x), 3 * x ** 2)
    same(tree.grad(cube)(other), 3 * other.clone() ** 2)
    assert roads == [False, False]
    found = tree.value_and_grad(lambda x: (x * other).sum())(x)  # autograd cannot save it; torch.func can
    same(found, by_func(monkeypatch, lambda: tree.value_and_grad(lambda x: (x * other).sum())(x)))
    same(found[1], other.clone())


def test_transforms_around_and_forward_mode_take_the_other_way(roads):
    x = numbers()
    hessian = torch.func.jacrev(tree.grad(cube))(x)
    torch.testing.assert_close(hessian, torch.diag(6 * x))
    torch.testing.assert_close(torch.func.jvp(tree.grad(cube), (x,), (torch.ones_like(x),))[1], 6 * x)
    torch.testing.assert_close(tree.vmap(tree.grad(cube))(x[:, None]), 3 * x[:, None] ** 2)
    with fwad.dual_level():
        moved = fwad.unpack_dual(tree.grad(cube)(fwad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(moved, 6 * x)
    with FlopCounterMode(display=False):
        tree.grad(cube)(x)
    with torch.autocast("cpu"):
        tree.grad(cube)(x)
    assert len(roads) == 6 and not any(roads)


@pytest.mark.parametrize("inner", ["grad", "jvp", "vmap(grad)", "hessian"])
def test_transforms_inside_the_function(inner, roads, monkeypatch):
    x = numbers()

    def fn(x):
        f = lambda y: (y ** 3).sum() * x.sum()  # noqa: E731
        return {"grad": lambda: torch.func.grad(f)(x), "jvp": lambda: torch.func.jvp(f, (x,), (x.sin(),))[1],
                "vmap(grad)": lambda: torch.func.vmap(torch.func.grad(f))(x[:, None]),
                "hessian": lambda: torch.func.hessian(f)(x)}[inner]().square().sum()

    found = tree.value_and_grad(fn)(x)
    assert roads == [True] and found[1].abs().min() > 0
    same(found, by_func(monkeypatch, lambda: tree.value_and_grad(fn)(x)))


def test_tracing_and_compiling_see_one_graph():
    x = numbers()
    graph = torch.fx.experimental.proxy_tensor.make_fx(tree.grad(cube))(x)
    other = numbers(seed=1)
    torch.testing.assert_close(graph(other), 3 * other ** 2)
    compiled = torch.compile(tree.value_and_grad(cube), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(other)[1], 3 * other ** 2)


def test_taps_are_kept_apart_as_ever(roads):
    fn = lambda x: taps.tap("h", x ** 3).sum()  # noqa: E731
    with pytest.raises(ValueError, match="means nothing outside"):
        taps.harvest(tree.grad(fn))(numbers())
    planted = taps.plant(tree.grad(lambda x: fn(x) + x.sum()), {"h": torch.zeros(5, dtype=torch.float64)})(numbers())
    torch.testing.assert_close(planted, torch.ones(5, dtype=torch.float64))
    assert not roads


def test_what_torch_refuses_is_refused_in_its_own_words(roads):
    with pytest.raises(RuntimeError, match="in-place"):
        tree.grad(lambda x: x.mul_(2).sum())(numbers())

    class Mine(RuntimeError):
        pass

    runs = []

    def fails(x):
        runs.append(1)
        raise Mine

    with pytest.raises(Mine):
        tree.grad(fails)(numbers())
    assert len(runs) == 1 and roads == [True, True]


# ------------------------------------------------------------------------------------------------ memory


def test_nothing_of_the_graph_outlives_the_call():
    kept: list[weakref.ref] = []

    def fn(x):
        h = x.exp()
        kept.append(weakref.ref(h))
        return (h * h).sum(), h.detach().clone()

    gc.disable()
    try:
        result = tree.value_and_grad(fn, has_aux=True)(numbers())
        assert kept[0]() is None
    finally:
        gc.enable()
    assert result[0][0].grad_fn is None and result[1].grad_fn is None


def test_hooks_on_saved_tensors_see_the_function(roads):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        tree.grad(cube)(numbers())
    assert roads == [True] and saved
