"""Naming, reading and replacing intermediate values, under every transform."""

from __future__ import annotations

import threading

import pytest
import torch
from versions import OLD

from fnattn import tree
from fnattn.taps import harvest, in_use, plant, scope, tap

X = torch.linspace(-0.7, 0.9, 5, dtype=torch.float64)


def layer(h):
    return tap("act", (h * 1.7).cos())


def f(x):
    h = tap("hidden", x.sin())
    with scope("layer0"):
        g = layer(h)
    with scope("layer1"):
        g = layer(g)
    return (h * g).sum()


def untapped(x, hidden=None, act0=None):
    h = x.sin() if hidden is None else hidden
    g = (h * 1.7).cos() if act0 is None else act0
    return (h * (g * 1.7).cos()).sum()


def aot(fn):
    torch.compiler.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def test_a_tap_that_nobody_listens_to_returns_the_very_object():
    value = object()
    assert tap("x", value) is value and not in_use()
    with scope("a"):
        assert tap("x", value) is value
    assert torch.equal(f(X), untapped(X))


def test_harvest_returns_the_output_and_every_value_by_dotted_name():
    out, values = harvest(f)(X)
    assert torch.equal(out, untapped(X)) and list(values) == ["hidden", "layer0.act", "layer1.act"]
    assert torch.equal(values["hidden"], X.sin())
    assert torch.equal(values["layer0.act"], (X.sin() * 1.7).cos())


def test_harvest_keeps_only_what_is_asked_for():
    assert list(harvest(f, only={"layer1.act"})(X)[1]) == ["layer1.act"]
    assert harvest(f, only=())(X)[1] == {}


def test_plant_replaces_by_value_or_by_function():
    new = X.exp()
    assert torch.equal(plant(f, {"hidden": new})(X), untapped(X, hidden=new))
    assert torch.equal(plant(f, {"layer0.act": lambda old: old + 1})(X), untapped(X, act0=(X.sin() * 1.7).cos() + 1))
    assert torch.equal(plant(f, {})(X), f(X))
    both = plant(f, {"hidden": new, "layer0.act": new})(X)
    assert torch.equal(both, untapped(X, hidden=new, act0=new)) and not torch.equal(both, f(X))


def test_planting_what_was_harvested_changes_nothing():
    out, values = harvest(f)(X)
    assert torch.equal(plant(f, values)(X), out)


def test_trees_can_be_tapped():
    def fn(x):
        parts = tap("parts", {"a": x, "b": (x * 2, x * 3)})
        return parts["a"] + parts["b"][0] * parts["b"][1]

    _, values = harvest(fn)(X)
    assert torch.equal(values["parts"]["b"][1], X * 3)
    doubled = plant(fn, {"parts": lambda old: tree.map(lambda x: x * 2, old)})(X)
    torch.testing.assert_close(doubled, X * 2 + X * 4 * X * 6)


def test_keyword_arguments_and_other_results_pass_through():
    out, values = harvest(lambda x, *, k: (tap("y", x * k), "text"))(X, k=3)
    assert out[1] == "text" and torch.equal(values["y"], X * 3)


# ------------------------------------------------------------------------------------------------ transforms


def test_gradients_flow_through_harvested_values():
    got = torch.func.grad(lambda x: harvest(f)(x)[1]["layer0.act"].sum())(X)
    want = torch.func.grad(lambda x: (x.sin() * 1.7).cos().sum())(X)
    torch.testing.assert_close(got, want)
    assert got.abs().min() > 0


def test_the_gradient_at_an_intermediate_value_is_that_of_the_rest_of_the_function():
    h = X.sin()
    got = torch.func.grad(lambda h: plant(f, {"hidden": h})(X))(h)
    torch.testing.assert_close(got, torch.func.grad(lambda h: untapped(X, hidden=h))(h))
    assert got.abs().min() > 0
    assert not torch.func.grad(plant(f, {"hidden": h, "layer0.act": h, "layer1.act": h}))(X).any()


def test_value_and_harvest_come_out_of_grad_as_aux():
    grads, values = torch.func.grad(harvest(f), has_aux=True)(X)
    torch.testing.assert_close(grads, torch.func.grad(untapped)(X))
    torch.testing.assert_close(values, harvest(f)(X)[1])


def test_forward_mode_gives_the_tangents_of_harvested_values():
    (_, values), (_, tangents) = torch.func.jvp(harvest(f), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangents["hidden"], X.cos())
    assert torch.equal(values["hidden"], X.sin())
    _, tangent = torch.func.jvp(plant(f, {"hidden": lambda old: old * 2}), (X,), (torch.ones_like(X),))
    want = torch.func.jvp(lambda x: untapped(x, hidden=x.sin() * 2), (X,), (torch.ones_like(X),))[1]
    torch.testing.assert_close(tangent, want)


def test_vmap_outside_maps_the_values():
    xs = torch.stack([X, X * 2, X - 1])
    out, values = torch.vmap(harvest(f))(xs)
    for i, x in enumerate(xs):
        one, here = harvest(f)(x)
        torch.testing.assert_close(out[i], one)
        torch.testing.assert_close(tree.map(lambda v, i=i: v[i], values), here)
    hs = xs.exp()
    planted = torch.vmap(lambda x, h: plant(f, {"hidden": h})(x))(xs, hs)
    torch.testing.assert_close(planted, torch.stack([untapped(x, hidden=h) for x, h in zip(xs, hs)]))


@pytest.mark.parametrize("transform", [
    lambda fn: torch.func.jacrev(fn), lambda fn: torch.func.jacfwd(fn), lambda fn: torch.func.hessian(fn),
    lambda fn: torch.vmap(torch.func.grad(fn)), lambda fn: torch.func.grad(lambda x: torch.vmap(fn)(x).sum())])
def test_planting_works_inside_and_outside_every_transform(transform):
    def want_fn(x):
        return untapped(x, hidden=x.sin() * 2)

    x = torch.stack([X, X + 1])
    each = {"hidden": lambda old: old * 2}
    fn, plain = (f, want_fn) if "vmap" in transform.__code__.co_names else (lambda x: f(x[0]), lambda x: want_fn(x[0]))
    want = transform(plain)(x)
    torch.testing.assert_close(transform(plant(fn, each))(x), want)
    torch.testing.assert_close(plant(transform(fn), each)(x), want)
    assert want.any()


def test_plants_and_harvests_nest_in_both_orders():
    each = {"hidden": lambda old: old * 2}
    for fn in (harvest(plant(f, each)), plant(harvest(f), each)):
        out, values = fn(X)
        assert torch.equal(values["hidden"], X.sin() * 2)
        assert torch.equal(out, untapped(X, hidden=X.sin() * 2))
    twice = plant(plant(f, each), {"hidden": lambda old: old + 1})(X)
    assert torch.equal(twice, untapped(X, hidden=X.sin() * 2 + 1))


def test_a_harvest_inside_a_transform_can_be_handed_on():
    def fn(xs):
        out, values = torch.vmap(harvest(f))(xs)
        tap("each", values)
        return out.sum()

    _, values = harvest(fn)(torch.stack([X, X + 1]))
    assert list(values) == ["each"] and values["each"]["hidden"].shape == (2, 5)


def test_names_count_from_where_the_harvest_began():
    def outer(x):
        with scope("outer"):
            out, values = harvest(f)(x)
        tap("names", list(values))
        return out

    assert harvest(outer)(X)[1]["names"] == ["hidden", "layer0.act", "layer1.act"]


def test_remat_computes_its_gradient_with_what_was_planted():
    each = {"hidden": lambda old: old * 3}
    torch.testing.assert_close(torch.func.grad(plant(tree.remat(f), each))(X), torch.func.grad(plant(f, each))(X))
    assert list(harvest(tree.remat(f))(X)[1]) == list(harvest(f)(X)[1])


@pytest.mark.parametrize("build", [
    lambda c: c(f)(X), lambda c: c(harvest(f))(X), lambda c: c(plant(f, {"layer0.act": lambda old: old + 1}))(X),
    lambda c: c(torch.func.grad(lambda h: plant(f, {"hidden": h})(X)))(X),
    lambda c: c(torch.vmap(harvest(f)))(X[:, None]),
    pytest.param(lambda c: c(torch.func.jacrev(lambda x: harvest(f)(x)[1]))(X),
                 marks=pytest.mark.skipif(OLD, reason="before 2.13 torch cannot compile jacrev of several results"))])
def test_fullgraph_compile_equals_eager(build):
    torch.testing.assert_close(build(aot), build(lambda fn: fn))


def test_a_function_compiled_without_listeners_can_be_harvested_later():
    compiled = aot(f)
    compiled(X)
    torch.testing.assert_close(harvest(compiled)(X), harvest(f)(X))
    torch.testing.assert_close(plant(compiled, {"hidden": X})(X), untapped(X, hidden=X))
    torch.testing.assert_close(compiled(X), untapped(X))


# ------------------------------------------------------------------------------------------------ mistakes


def fails(call, *texts):
    with pytest.raises(ValueError) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)
    assert not in_use()


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev, torch.func.jacfwd,
                                       lambda fn: lambda x: torch.vmap(torch.func.grad(fn))(x)])
def test_a_value_from_a_transform_inside_is_refused_and_the_remedies_work(transform):
    xs = torch.stack([X, X + 1])

    def fn(x):
        return f(x) if x.ndim == 1 else f(x[0])

    fails(lambda: harvest(transform(fn))(xs), "taps.harvest: values must not come from a transform", "got 'hidden'",
          "\n  Harvest inside it, as in torch.vmap(harvest(fn)), or leave it out with only=...")
    assert harvest(transform(fn), only=())(xs)[1] == {}
    assert torch.vmap(harvest(f))(xs)[1]["hidden"].shape == (2, 5)


def test_unknown_names_are_refused_with_the_names_there_are():
    names = "Its names are ['hidden', 'layer0.act', 'layer1.act']."
    fails(lambda: plant(f, {"hiden": X})(X), "taps.plant: expected names that the function taps; got ['hiden'].", names)
    fails(lambda: harvest(f, only=["layer2.act"])(X), "taps.harvest: expected names", "got ['layer2.act']", names)


def test_a_name_tapped_twice_is_refused_and_a_scope_tells_them_apart():
    def twice(x):
        return tap("a", x) + tap("a", x * 2)

    def apart(x):
        with scope("second"):
            y = tap("a", x * 2)
        return tap("a", x) + y

    text = "every name must be tapped once; got 'a' twice.\n  Tell them apart: with fnattn.taps.scope"
    fails(lambda: harvest(twice)(X), "taps.harvest: " + text)
    fails(lambda: plant(twice, {"a": X})(X), "taps.plant: " + text)
    assert set(harvest(apart)(X)[1]) == {"a", "second.a"}


@pytest.mark.parametrize("new, got", [
    (X[:3], "torch.float64 [3]"), (X.float(), "torch.float32 [5]"), (3.0, "float"), (lambda old: (old, old), "tuple(")])
def test_a_replacement_of_another_kind_is_refused(new, got):
    fails(lambda: plant(f, {"hidden": new})(X), got, "\n  Match the value that harvest returns under that name.",
          "taps.plant: the replacement for 'hidden' must be torch.float64 [5]; got")


def test_an_error_inside_ends_the_harvest_and_the_scope():
    def fn(x):
        with scope("deep"):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        harvest(fn)(X)
    assert not in_use() and list(harvest(f)(X)[1])[0] == "hidden"


def test_another_thread_does_not_see_the_harvest():
    found = []

    def fn(x):
        thread = threading.Thread(target=lambda: found.append(in_use()))
        thread.start()
        thread.join()
        return tap("y", x)

    harvest(fn)(X)
    assert found == [False]
