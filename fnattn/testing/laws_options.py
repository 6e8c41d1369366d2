"""Laws about masks, contexts, dropout, precision and refusals. Each is law(family, cfg, key, impl)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import random, tree
from ..core import Family
from .world import NotApplicable, equal, make_params, make_x, need_state, require, same_bits, streaming, takes

# Fields that make a key's contribution depend on where it stands: removing a key then moves the later ones.
POSITIONAL = ("rotary_emb", "use_rotary_embed", "shift_tokens", "static_mask", "seq_len")


def _need_mask(family: Family, params: Any, x: Tensor, impl: str) -> None:
    if not takes(family, params, x, impl, mask=torch.ones(x.shape[:2], dtype=torch.bool)):
        raise NotApplicable("this config takes no mask")


def masked_keys_are_removed(family: Family, cfg: Any, key: Tensor, impl: str, keep: Sequence[bool] = (1, 0, 1, 1, 0, 1, 1)) -> None:
    """A masked key is as good as not there: at the end for every config, anywhere where positions do not matter."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=7)
    _need_mask(family, params, x, impl)
    n = x.shape[1]
    equal(family.apply(params, x, mask=torch.ones(2, n, dtype=torch.bool), impl=impl)[0], family.apply(params, x, impl=impl)[0],
          "a mask that keeps everything")
    short = max(1, n - 2)
    padded = torch.arange(n).expand(2, n) < short
    equal(family.apply(params, x, mask=padded, impl=impl)[0][:, :short], family.apply(params, x[:, :short], impl=impl)[0],
          "masked padding at the end")
    chosen = torch.tensor([bool(b) for b in keep[:n]] + [True] * (n - len(keep)))
    mask = chosen.expand(2, n)
    if chosen.any() and not any(getattr(cfg, field, None) for field in POSITIONAL):
        equal(family.apply(params, x, mask=mask, impl=impl)[0][:, chosen], family.apply(params, x[:, chosen], impl=impl)[0],
              f"masked keys {[i for i in range(n) if not chosen[i]]}")
    # Whatever the config: a gradient must not reach a key through the mask, nor NaN come out of it.
    leaf = x.clone().requires_grad_()
    out = family.apply(params, leaf, mask=mask, impl=impl)[0]
    require(torch.autograd.grad(out.sum(), leaf)[0].isfinite().all(), "the gradient of a masked call is not finite")


def masked_context_is_removed(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """A masked position of the context is as good as not there."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=3)
    context = make_x(cfg, key, length=7, name="context")
    keep = torch.tensor([True, False, True, True, False, True, True])[:context.shape[1]]
    if not takes(family, params, x, impl, context=context):
        raise NotApplicable("this config takes no context")
    out = family.apply(params, x, context=context, impl=impl)[0]
    require(out.shape[:2] == x.shape[:2], f"out is {list(out.shape)} for x {list(x.shape)}")
    require(not torch.equal(out, family.apply(params, x, context=context * 0.5, impl=impl)[0]), "the context is ignored")
    if not family.masks:
        return
    mask = keep.expand(2, -1)
    if getattr(cfg, "seq_len", None) is None:
        equal(family.apply(params, x, context=context, mask=mask, impl=impl)[0],
              family.apply(params, x, context=context[:, keep], impl=impl)[0], "masked context")


def empty_rows_are_zero(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """A sequence of which nothing may be attended gives zeros (a bias of the last projection stays), and finite gradients."""
    params, x = make_params(family, cfg, key), make_x(cfg, key)
    _need_mask(family, params, x, impl)
    if getattr(cfg, "attn_null_kv", 0):
        raise NotApplicable("every row sees the null keys")
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1] = False
    leaf = x.clone().requires_grad_()
    out = family.apply(params, leaf, mask=mask, impl=impl)[0]
    require(torch.autograd.grad(out.sin().sum(), leaf)[0].isfinite().all(), "the gradient at an empty row is not finite")
    bias = [p for name, p in tree.to_flat(params).items() if name.split(".")[-1] in ("bias", "b", "to_out_bias")]
    constant = out[1, :1].detach() if bias else torch.zeros_like(out[1, :1])
    equal(out[1].detach(), constant.expand_as(out[1]), "a row that sees nothing")
    equal(out[0].detach(), family.apply(params, x[:1], impl=impl)[0][0], "the row beside it")


def dropout_laws(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """No key is p = 0; the same key, the same mask; another key, another; the mean over keys is the value without."""
    fields = [f.name for f in dataclasses.fields(cfg) if "dropout" in f.name and getattr(cfg, f.name)]
    params, x = make_params(family, cfg, key), make_x(cfg, key)
    plain = family.apply(params, x, impl=impl)[0]
    one, two = random.fold_in(key, "one"), random.fold_in(key, "two")
    if not fields:
        same_bits(family.apply(params, x, dropout_key=one, impl=impl)[0], plain, "a key changes a config without dropout")
        return
    never = params._replace(cfg=dataclasses.replace(cfg, **dict.fromkeys(fields, 0.0)))
    same_bits(family.apply(never, x, dropout_key=one, impl=impl)[0], plain, "no key is not the same as p = 0")
    dropped = family.apply(params, x, dropout_key=one, impl=impl)[0]
    same_bits(dropped, family.apply(params, x, dropout_key=one.clone(), impl=impl)[0], "the same key gave another mask")
    require(not torch.equal(dropped, plain), "dropout does nothing")
    require(not torch.equal(dropped, family.apply(params, x, dropout_key=two, impl=impl)[0]), "another key gave the same mask")
    # the derivative belongs to the mask that the value used
    leaf = x.clone().requires_grad_()
    shift = random.normal(random.fold_in(key, "shift"), tuple(x.shape), x.dtype)

    def value(t):
        return family.apply(params, t, dropout_key=one, impl=impl)[0].sin().sum()

    (slope,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-6
    numeric = (value(x + step * shift) - value(x - step * shift)) / (2 * step)
    equal((slope * shift).sum().detach(), numeric.detach(), "the gradient under dropout", rtol=1e-5, atol=1e-7)
    count = 512
    outs = torch.vmap(lambda k: family.apply(params, x, dropout_key=k, impl=impl)[0])(random.split(key, count))
    error = (outs.mean(0) - plain).abs()
    require((error <= 6 * outs.std(0) / count**0.5 + 1e-12).all(), f"the mean over {count} keys is off by {error.max().item():.1e}")


def low_precision(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """In float32, bfloat16 and float16 the error of values and gradients is at most twice that of plain torch."""
    if impl == "reference":
        raise NotApplicable("this is plain torch")
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=17)

    def everything(dtype: torch.dtype, name: str):
        p = tree.map(lambda t: t.to(dtype) if t.is_floating_point() else t, params)
        leaf = x.to(dtype).requires_grad_()
        out = family.apply(p, leaf, impl=name)[0]
        return out.detach().double(), torch.autograd.grad(out.double().sin().sum(), leaf)[0].double()

    exact = everything(torch.float64, "reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for what, ours, plain, true in zip(("value", "gradient"), everything(dtype, impl), everything(dtype, "reference"), exact):
            size = true.abs().max().item()
            error, allowed = (ours - true).abs().max().item(), 2 * (plain - true).abs().max().item()
            # one rounding of the result is always allowed: plain torch may be lucky
            require(error <= allowed + torch.finfo(dtype).eps * size,
                    f"{what} in {dtype}: error {error:.1e}, plain torch {allowed / 2:.1e}")


def state_after_mask(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """A mask given chunk by chunk is the mask of the whole."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, length=7)
    fresh = need_state(family, params, x.shape[1])
    _need_mask(family, params, x, impl)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)[:, :x.shape[1]]
    whole, final = family.apply(params, x, fresh, mask=mask, impl=impl)
    equal(whole, family.apply(params, x, mask=mask, impl=impl)[0], "a mask with a fresh state and without one")
    first, state = family.apply(params, x[:, :3], fresh, mask=mask[:, :3], impl=impl)
    second, state = family.apply(params, x[:, 3:], state, mask=mask[:, 3:], impl=impl)
    equal(torch.cat((first, second), 1), whole, "masked chunks")
    equal(state, final, "the state after masked chunks")


def _refused(call, name: str, what: str, error: type[Exception] = ValueError) -> None:
    try:
        call()
    except error as raised:
        text = str(raised)
        require(name in text, f"the refusal of {what} does not name {name}: {text}")
        require("\n  " in text, f"the refusal of {what} has no remedy on its own line: {text}")
        return
    raise AssertionError(f"{what} was not refused")


def refusals(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """What a family declares it cannot do raises ValueError with its name and a remedy; so do wrong shapes and names."""
    params, x = make_params(family, cfg, key), make_x(cfg, key)
    mask, name, apply = torch.ones(x.shape[:2], dtype=torch.bool), family.name, family.apply
    if not family.masks:
        _refused(lambda: apply(params, x, mask=mask, impl=impl), name, "mask")
    else:
        if takes(family, params, x, impl, mask=mask):
            _refused(lambda: apply(params, x, mask=mask[:, :-1], impl=impl), name, "a mask of the wrong length")
            _refused(lambda: apply(params, x, mask=mask.to(x.dtype), impl=impl), name, "a floating mask", TypeError)
        else:
            _refused(lambda: apply(params, x, mask=mask, impl=impl), name, "mask")
    if not takes(family, params, x, impl, context=x):
        _refused(lambda: apply(params, x, context=x, impl=impl), name, "context")
    if not streaming(family, params):
        _refused(lambda: family.init_state(params, 2, capacity=5), name, "init_state")
        _refused(lambda: apply(params, x, (x,), impl=impl), name, "a state")
    _refused(lambda: apply(params, x[..., :-1], impl=impl), name, "x of the wrong width")
    _refused(lambda: apply(params, x[0], impl=impl), name, "x without a batch axis")
    _refused(lambda: apply(params, x.long(), impl=impl), name, "integer x", TypeError)
    try:
        apply(params, x, impl="no such kernel")
    except ValueError as error:
        require("no such kernel" in str(error), f"the refusal of an unknown impl does not quote it: {error}")
    else:
        raise AssertionError("an unknown impl was ignored")


OPTION_LAWS = (masked_keys_are_removed, masked_context_is_removed, empty_rows_are_zero, state_after_mask, dropout_laws,
               low_precision, refusals)
