"""tree.jvp: forward mode over whole trees, the same numbers as torch.func.jvp on every way that it goes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import assert_close

import fnattn
from fnattn import _autograd, random, tree
from fnattn.attentions import FAMILIES, taylor
from fnattn.models import lm

EXAMPLES = [(name, i) for name, family in FAMILIES.items() for i in range(len(family.examples))]
F64 = torch.float64


@pytest.fixture
def ways(monkeypatch):
    """Which way each call went: "quick", "refused" or "transform"."""
    seen = []
    quick, slow = _autograd.jvp, _autograd.jvp_by_transform

    def noted(*args):
        found = quick(*args)
        seen.append("refused" if found is None else "quick")
        return found

    monkeypatch.setattr(_autograd, "jvp", noted)
    monkeypatch.setattr(_autograd, "jvp_by_transform", lambda *args: seen.append("transform") or slow(*args))
    return seen


def setting(name, which):
    cfg = FAMILIES[name].examples[which]
    params = fnattn.init(random.key(0), cfg, dtype=F64)
    x = random.normal(random.key(1), (2, 6 if not hasattr(cfg, "seq_len") else min(cfg.seq_len, 6), cfg.dim), F64)
    along = tree.map(lambda t: t.cos() if tree.is_differentiable(t) else None, params)
    return params, x, along, x.sin()


def moved(fn, primals, tangents):
    """The same by torch.func.jvp over the leaves that move."""
    items, form = tree.flatten(primals)
    moves = tree.flatten(tangents)[0]
    at = [i for i, t in enumerate(moves) if t is not None]

    def flat(*new):
        full = list(items)
        for i, x in zip(at, new):
            full[i] = x
        return fn(*tree.unflatten(full, form))

    return torch.func.jvp(flat, tuple(items[i] for i in at), tuple(moves[i] for i in at))


@pytest.mark.parametrize("name, which", EXAMPLES)
def test_every_family_moves_as_by_torch_func(name, which, ways):
    params, x, along, dx = setting(name, which)

    def run(params, x):
        return fnattn.apply(params, x)[0]

    value, tangent = tree.jvp(run, (params, x), (along, dx))
    expected, true = moved(run, (params, x), (along, dx))
    assert_close(value, expected), assert_close(tangent, true)
    assert true.abs().max() > 1e-3 and ways == ["quick"]
    assert not value.requires_grad and not tangent.requires_grad


@pytest.mark.parametrize("name, which", EXAMPLES)
def test_gradients_move_as_by_torch_func(name, which, ways):
    """Forward over reverse, and the way back to torch.func where forward mode is inside."""
    params, x, along, _ = setting(name, which)

    def slope(params):
        return tree.grad(lambda params: fnattn.apply(params, x)[0].sin().sum())(params)

    _, tangent = tree.jvp(slope, (params,), (along,))
    _, true = moved(lambda params: [t for t in tree.leaves(slope(params)) if t is not None], (params,), (along,))
    assert ways == ["quick"]
    for found, expected in zip([t for t in tree.leaves(tangent) if t is not None], true, strict=True):
        assert_close(found, expected)
    assert any(t.abs().max() > 1e-3 for t in true)


PARAMS = taylor.init(random.key(0), taylor.Config(dim=6, heads=2, dim_head=3, causal=True), dtype=F64)
ALONG = tree.map(torch.cos, PARAMS)
X = random.normal(random.key(1), (2, 5, 6), F64)


def total(params, x=X):
    return taylor.apply(params, x)[0].sin().sum()


def test_forward_mode_of_forward_mode(ways):
    def slope(params):
        return tree.jvp(total, (params,), (ALONG,))[1]

    found = tree.jvp(slope, (PARAMS,), (ALONG,))[1]
    assert ways == ["transform", "refused", "transform", "transform"]
    grad = tree.jvp(tree.grad(total), (PARAMS,), (ALONG,))[1]
    assert_close(found, sum((g * t).sum() for g, t in zip(tree.leaves(grad), tree.leaves(ALONG))))
    assert found.abs() > 1e-3


@pytest.mark.parametrize("outer", ["grad", "vmap", "jacrev", "compile", "no_grad", "inference", "requires grad"])
def test_under_what_else_there_is(outer, ways):
    def slope(x):
        return tree.jvp(lambda params, x: total(params, x), (PARAMS, x), (ALONG, None))[1]

    def true(x):
        return moved(lambda params: total(params, x), (PARAMS,), (ALONG,))[1]

    if outer == "grad":
        assert_close(torch.func.grad(slope)(X), torch.func.grad(true)(X))
    elif outer == "vmap":
        assert_close(torch.vmap(slope)(X[:, None]), torch.vmap(true)(X[:, None]))
    elif outer == "jacrev":
        assert_close(torch.func.jacrev(slope)(X), torch.func.jacrev(true)(X))
    elif outer == "compile":
        assert_close(torch.compile(slope, fullgraph=True, backend="aot_eager")(X), true(X))
    elif outer == "no_grad":
        with torch.no_grad():
            assert_close(slope(X), true(X))
    elif outer == "inference":
        with torch.inference_mode():
            found = slope(X)
        assert_close(found.clone(), true(X))
    else:
        x = X.clone().requires_grad_()
        found, = torch.autograd.grad(slope(x), x)
        assert_close(found, torch.func.grad(true)(X))
    assert true(X).abs() > 1e-3


@pytest.mark.parametrize("inner", ["vmap", "jacrev", "hessian", "remat", "autograd"])
def test_around_what_else_there_is(inner, ways):
    def autograd(params):
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            return torch.autograd.grad(total(params, x), x)[0]

    fn = {"vmap": lambda p: torch.vmap(lambda x: total(p, x[None]))(X),
          "jacrev": lambda p: torch.func.jacrev(lambda x: total(p, x))(X),
          "hessian": lambda p: torch.func.hessian(lambda x: total(p, x))(X[:1, :2]),
          "remat": lambda p: tree.remat(lambda p: taylor.apply(p, X)[0])(p), "autograd": autograd}[inner]
    expected = moved(fn, (PARAMS,), (ALONG,))[1] if inner != "autograd" else moved(
        lambda p: torch.func.grad(lambda x: total(p, x))(X), (PARAMS,), (ALONG,))[1]
    assert_close(tree.jvp(fn, (PARAMS,), (ALONG,))[1], expected)
    assert expected.abs().max() > 1e-3 and ("refused" in ways) == (inner == "hessian")


def test_a_language_model_with_remat_and_what_it_closes_over(ways):
    cfg = lm.Config(attention=PARAMS.cfg, depth=2, num_tokens=11, remat=True)
    params, ids = lm.init(random.key(0), cfg, dtype=F64), torch.arange(12).reshape(2, 6) % 11
    along, scale = tree.map(torch.cos, params), torch.tensor(2.0, dtype=F64, requires_grad=True)
    value, tangent = tree.jvp(lambda params: lm.loss(params, ids) * scale, (params,), (along,))
    _, true = moved(lambda params: lm.loss(params, ids), (params,), (along,))
    assert_close(tangent, 2 * true)
    assert_close(torch.autograd.grad(tangent, scale, retain_graph=True)[0], true)
    assert_close(torch.autograd.grad(value, scale)[0], lm.loss(params, ids))


def test_leaves_that_stay_and_leaves_that_are_no_floats(ways):
    given = {"a": X, "n": torch.tensor(3), "word": "w", "b": (X[0], None)}

    def fn(tree_in, y):
        return {"out": tree_in["a"] * tree_in["n"] + y, "n": tree_in["n"] + 1, "word": tree_in["word"], "same": tree_in["b"][0]}, y.sum()

    value, tangent, aux = tree.jvp(fn, (given, X), ({"a": X.cos(), "n": None, "word": None, "b": (None, None)}, None), has_aux=True)
    assert torch.equal(value["out"], X * 4) and value["n"] == 4 and value["word"] == "w" and torch.equal(aux, X.sum())
    assert torch.equal(tangent["out"], 3 * X.cos()) and tangent["n"] is None and tangent["word"] is None
    assert torch.equal(tangent["same"], torch.zeros_like(X[0])) and ways == ["quick"]
    value, tangent = tree.jvp(torch.sin, (X,), (None,))
    assert torch.equal(value, X.sin()) and torch.equal(tangent, torch.zeros_like(X))


@pytest.mark.parametrize("primals, tangents, kind, text", [
    (X, X, ValueError, "must be tuples with one entry per argument; got Tensor and Tensor."),
    ((X,), (X, X), ValueError, "got 1 entries and 2 entries."),
    (({"a": X},), ({"b": X},), ValueError, "a tangent must have the structure of its argument"),
    ((X,), (X[0],), ValueError, "a tangent must have its leaf's shape [2, 5, 6]; got [5, 6]."),
    ((X,), (X.float(),), TypeError, "of its leaf's floating dtype; got torch.float32 for torch.float64."),
    ((torch.tensor(1),), (torch.tensor(1),), TypeError, "floating dtype; got torch.int64 for torch.int64."),
])
def test_tangents_that_do_not_fit_are_refused_with_a_remedy(primals, tangents, kind, text):
    with pytest.raises(kind) as caught:
        tree.jvp(lambda *args: args[0], primals, tangents)
    assert text in str(caught.value) and "\n  " in str(caught.value)


def test_the_gradient_of_softmax_moves_in_a_process_that_took_no_other_derivative():
    """torch's rule for it is loaded by who asks for forward mode."""
    code = ("import torch; from fnattn import _autograd, tree; x = torch.randn(5, dtype=torch.float64); v = x.cos()\n"
            "found = []; quick = _autograd.jvp; _autograd.jvp = lambda *a: found.append(quick(*a)) or found[-1]\n"
            "slope = torch.func.grad(lambda x: (x.softmax(0) * torch.arange(5)).sum())\n"
            "t = tree.jvp(slope, (x,), (v,))[1]; assert found[0] is not None\n"
            "assert torch.allclose(t, torch.func.jvp(slope, (x,), (v,))[1], rtol=1e-12) and t.abs().max() > 1e-3")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_of_the_function_come_through(ways):
    def broken(x):
        raise fnattn.KernelUnavailable("no")

    with pytest.raises(fnattn.KernelUnavailable):
        tree.jvp(broken, (X,), (X,))
    with pytest.raises(RuntimeError, match="size of tensor"):
        tree.jvp(lambda x: x + torch.ones(7), (X,), (X,))
    assert tree.jvp(torch.sin, (X,), (X,))[1].shape == X.shape  # no level stays behind
