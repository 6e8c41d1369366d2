"""Laws about values: what comes out, whatever way it is computed. Each is law(family, cfg, key, impl)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import EMPTY, Empty, Family
from .world import (
    NotApplicable,
    equal,
    make_params,
    make_x,
    need_state,
    poisoned_empty,
    require,
    same_bits,
    streaming,
)

LENGTH = 7


def shape_and_dtype(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """out is [batch, seq, width] in x's dtype; the state keeps its structure, shapes and dtypes; nothing is NaN."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        params, x = make_params(family, cfg, key, dtype), make_x(cfg, key, dtype=dtype)
        out, state = family.apply(params, x, impl=impl)
        require(isinstance(state, Empty), "apply without a state returned a state")
        require(out.dtype == dtype, f"out is {out.dtype} for x in {dtype}")
        require(out.ndim == 3 and out.shape[:2] == x.shape[:2], f"out is {list(out.shape)} for x {list(x.shape)}")
        require(out.isfinite().all(), f"not finite in {dtype}")
        if streaming(family, params):
            before = family.init_state(params, x.shape[0], capacity=x.shape[1])
            out, after = family.apply(params, x, before, impl=impl)
            require(tree.structure(before) == tree.structure(after), "the state changed its structure")
            for old, new in zip(tree.leaves(before), tree.leaves(after)):
                require(isinstance(old, Tensor) and isinstance(new, Tensor), "a state holds something that is not a tensor")
                require(old.shape == new.shape and old.dtype == new.dtype,
                        f"a state leaf went from {old.dtype} {list(old.shape)} to {new.dtype} {list(new.shape)}")


def same_key_same_bits(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """init and apply are functions: equal arguments give equal bits, and another key gives other params."""
    params, other = family.init(key, cfg), family.init(key + 1, cfg)
    same_bits(params, family.init(key.clone(), cfg), "init gave other bits for the same key")
    drawn = [not torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(other))]
    require(any(drawn) or not drawn, "init gave the same params for another key")
    x = make_x(cfg, key, dtype=torch.float32)
    same_bits(family.apply(params, x, impl=impl), family.apply(params, x.clone(), impl=impl),
              "apply gave other bits for the same call")


def names_are_stable(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Parameter names depend on the config alone, not on key or dtype; each is a dotted path of identifiers and numbers."""
    names = list(tree.to_flat(family.init(key, cfg)))
    require(names == list(tree.to_flat(family.init(key + 1, cfg, dtype=torch.float64))), "names differ with key or dtype")
    bad = [n for n in names if not all(part.isidentifier() or part.isdigit() for part in n.split("."))]
    require(not bad, f"names that are no paths: {bad}")


def inputs_are_untouched(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Nothing that goes in is written to."""
    params, x = make_params(family, cfg, key), make_x(cfg, key)
    state = family.init_state(params, x.shape[0], capacity=x.shape[1]) if streaming(family, params) else EMPTY
    given = [*tree.leaves(params), x, *tree.leaves(state)]
    copies, versions = [t.clone() for t in given], [t._version for t in given]
    family.apply(params, x, state, impl=impl)
    require(all(torch.equal(a, b) for a, b in zip(given, copies)), "apply changed one of its inputs")
    require(versions == [t._version for t in given], "apply wrote to one of its inputs")


def split_anywhere(family: Family, cfg: Any, key: Tensor, impl: str, cuts: Sequence[int] = (1, 4), length: int = LENGTH) -> None:
    """Chunks with the state carried between them give what one pass gives, and the same final state."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=length)
    fresh = need_state(family, params, x.shape[1])
    whole, final = family.apply(params, x, fresh, impl=impl)
    equal(whole, family.apply(params, x, impl=impl)[0], "with a fresh state and without one")
    state, outs = fresh, []
    edges = [0, *sorted(min(c, x.shape[1]) for c in cuts), x.shape[1]]
    for start, stop in zip(edges, edges[1:]):
        out, state = family.apply(params, x[:, start:stop], state, impl=impl)
        outs.append(out)
    equal(torch.cat(outs, 1), whole, f"cut at {edges[1:-1]}")
    equal(state, final, f"the state after cuts at {edges[1:-1]}")


def combine_is_associative(family: Family, cfg: Any, key: Tensor, impl: str, cuts: Sequence[int] = (2, 5)) -> None:
    """States of segments combine, in any grouping, to the state of the whole."""
    if family.combine is None:
        raise NotApplicable("the family has no combine")
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=LENGTH)
    fresh = need_state(family, params, x.shape[1])
    first, second = sorted(cuts)
    a = family.apply(params, x[:, :first], fresh, impl=impl)[1]
    b = family.apply(params, x[:, first:second], family.resume(a), impl=impl)[1]
    c = family.apply(params, x[:, second:], family.resume(b), impl=impl)[1]
    whole = family.apply(params, x, fresh, impl=impl)[1]
    equal(family.combine(family.combine(a, b), c), whole, "combine(combine(a, b), c)")
    equal(family.combine(a, family.combine(b, c)), whole, "combine(a, combine(b, c))")


def absorbing_is_applying(family: Family, cfg: Any, key: Tensor, impl: str, cut: int = 2) -> None:
    """The state without outputs is the state beside them, and has the same gradients."""
    if family.absorb is None:
        raise NotApplicable("the family has no absorb")
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=LENGTH)
    state = family.apply(params, x[:, :cut], need_state(family, params, x.shape[1]), impl=impl)[1]
    masks = {"mask": (torch.arange(x.shape[1] - cut) % 3 != 1).expand(x.shape[0], -1)} if family.masks else {}

    def total(after: Any) -> Tensor:
        return sum(t.sin().sum() for t in tree.leaves(after) if tree.is_differentiable(t))

    def slopes(run: Callable) -> list[Tensor]:
        found = tree.grad(lambda params, x, state: total(run(params, x, state)), (0, 1, 2))(params, x[:, cut:], state)
        return [t for t in tree.leaves(found) if isinstance(t, Tensor)]

    for options in ({}, masks):
        short = lambda *args, options=options: family.absorb(*args, impl=impl, **options)  # noqa: E731
        whole = lambda *args, options=options: family.apply(*args, impl=impl, **options)[1]  # noqa: E731
        equal(short(params, x[:, cut:], state), whole(params, x[:, cut:], state), "the state")
        equal(slopes(short), slopes(whole), "its gradients")


def causality(family: Family, cfg: Any, key: Tensor, impl: str, at: int = 3) -> None:
    """A change at one position leaves every earlier output as it was, to the bit, and reaches its own."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=LENGTH)
    if not streaming(family, params):
        raise NotApplicable("this config is not causal")
    at = min(at, x.shape[1] - 1)
    changed = torch.cat((x[:, :at], x[:, at:at + 1] + 1.0, x[:, at + 1:]), 1)
    before, after = family.apply(params, x, impl=impl)[0], family.apply(params, changed, impl=impl)[0]
    same_bits(before[:, :at], after[:, :at], f"an output before position {at} changed with position {at}")
    require(not torch.equal(before[:, at], after[:, at]), f"the output at position {at} does not see its own input")


def batch_invariance(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """What a sequence gives does not depend on the others in the batch."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, batch=3)
    whole = family.apply(params, x, impl=impl)[0]
    for i in range(3):
        equal(family.apply(params, x[i:i + 1], impl=impl)[0], whole[i:i + 1], f"sequence {i} alone", rtol=1e-12, atol=1e-13)


def strides_do_not_matter(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Non-contiguous and expanded inputs and params give what their contiguous copies give."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, batch=1)
    odd = tree.map(lambda p: p.movedim(0, -1).contiguous().movedim(-1, 0) if p.ndim > 1 else
                   torch.stack((p, p), -1)[..., 0], params)
    for name, view in (("transposed", x.transpose(1, 2).contiguous().transpose(1, 2)), ("expanded", x.expand(3, -1, -1)),
                       ("strided", torch.stack((x, x), -1)[..., 0]), ("expanded in time", x[:, :1].expand(-1, 4, -1)
                                                                       if x.shape[1] >= 4 else x)):
        expected = family.apply(params, view.contiguous(), impl=impl)[0]
        equal(family.apply(params, view, impl=impl)[0], expected, f"x {name}", rtol=1e-12, atol=1e-13)
        equal(family.apply(odd, view, impl=impl)[0], expected, f"params not contiguous, x {name}", rtol=1e-12, atol=1e-13)


def any_length(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Lengths 1, 2 and odd ones work, the gradient too; a causal prefix is a prefix of the result."""
    params, long = make_params(family, cfg, key), make_x(cfg, key, length=67)
    causal = streaming(family, params)
    whole = family.apply(params, long, impl=impl)[0] if causal else None
    for length in sorted({n for n in (1, 2, 3, 13, 67) if n <= long.shape[1]}):
        x = long[:, :length].clone().requires_grad_()
        out = family.apply(params, x, impl=impl)[0]
        (slope,) = torch.autograd.grad(out.sin().sum(), x)
        require(out.shape[1] == length and out.isfinite().all() and slope.isfinite().all(), f"length {length} fails")
        if causal:
            equal(out, whole[:, :length], f"the first {length} of {long.shape[1]}")


def empty_batch(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """No sequences in, none out; gradients of params are zeros."""
    params, x = make_params(family, cfg, key), make_x(cfg, key)
    width = family.apply(params, x, impl=impl)[0].shape[-1]
    params = tree.map(lambda p: p.detach().requires_grad_(p.is_floating_point()), params)
    out = family.apply(params, x[:0], impl=impl)[0]
    require(tuple(out.shape) == (0, x.shape[1], width), f"an empty batch gives {list(out.shape)}")
    grads = torch.autograd.grad(out.sum(), [p for p in tree.leaves(params) if p.requires_grad], allow_unused=True)
    require(all(g is None or not g.any() for g in grads), "gradients of an empty batch are not zero")


def no_unwritten_memory(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """With torch.empty handing out NaN, values and gradients are the same."""
    params, x = make_params(family, cfg, key), make_x(cfg, key)

    def everything():
        leaf = x.clone().requires_grad_()
        out = family.apply(params, leaf, impl=impl)[0]
        return out.detach(), torch.autograd.grad(out.sin().sum(), leaf)[0]

    expected = everything()
    with poisoned_empty():
        actual = everything()
    equal(actual, expected, "with poisoned memory")


def meta_init(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """init on the meta device gives the shapes and dtypes without the numbers."""
    real, shapes = family.init(key, cfg), family.init(key, cfg, device="meta")
    require(tree.structure(real) == tree.structure(shapes), "init on meta gives another structure")
    for name, (a, b) in zip(tree.to_flat(real), zip(tree.leaves(real), tree.leaves(shapes))):
        require(b.device.type == "meta", f"{name} is on {b.device}")
        require(a.shape == b.shape and a.dtype == b.dtype, f"{name} has another shape or dtype on meta")


def flat_round_trip(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """from_flat(to_flat(params)) is params, config and all."""
    params = make_params(family, cfg, key)
    back = tree.from_flat(dict(reversed(tree.to_flat(params).items())), params)
    require(tree.structure(back) == tree.structure(params) and back.cfg == cfg, "the round trip lost the structure")
    same_bits(back, params, "the round trip changed a value")


VALUE_LAWS = (shape_and_dtype, same_key_same_bits, names_are_stable, inputs_are_untouched, split_anywhere, combine_is_associative,
              absorbing_is_applying, causality, batch_invariance, strides_do_not_matter, any_length, empty_batch, no_unwritten_memory,
              meta_init, flat_round_trip)
