"""The other sides: the real upstream packages, called as their own layers call them. Each is optional."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import dump
from .case import Opponent

# import name -> (distribution, the version that the table's goals are about)
PINNED = {
    "taylor_series_linear_attention": ("taylor-series-linear-attention", "0.2.0"),
    "fast_transformers": ("pytorch-fast-transformers", "0.4.0"),
    "linformer": ("linformer", "0.2.3"),
    "gateloop_transformer": ("gateloop-transformer", "0.2.5"),
    "coordinate_descent_attention": ("coordinate-descent-attention", "0.0.11"),
    "colt5_attention": ("colt5-attention", "0.11.2"),
    "dalle_pytorch": ("dalle-pytorch", "1.6.6"),
}


class Missing(Exception):
    """An upstream package is not there."""


def versions() -> dict[str, str]:
    """Distribution -> installed version, or "missing"."""
    found = {}
    for distribution, _ in PINNED.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "missing"
    return found


def module(name: str) -> Any:
    """The upstream module.

    Raises:
        Missing: its package is not installed, or cannot be imported here.
    """
    package = name.partition(".")[0]
    distribution, pinned = PINNED[package]
    if package not in sys.modules and find_spec(package) is None:
        raise Missing(f"{distribution}=={pinned} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside upstream are not ours to fix
        if package == "dalle_pytorch" and package not in sys.modules:
            # Its __init__ imports a tokenizer that no longer installs; the sub-modules themselves need only torch.
            shell = types.ModuleType(package)
            shell.__path__ = list(find_spec(package).submodule_search_locations)
            sys.modules[package] = shell
        try:
            return importlib.import_module(name)
        except Exception as error:  # whatever an optional package raises, the table goes on without it
            raise Missing(f"{distribution} cannot be imported: {type(error).__name__}: {error}") from error


def layer(made: nn.Module, params: Any, at: int = 1) -> Opponent:
    """An upstream layer with the weights of our params, as a function of args[at]."""
    made.load_state_dict({name: t.detach().clone() for name, t in dump(params).items()})
    made.to(next(iter(dump(params).values())).device)
    return Opponent(lambda *args: made(args[at]), tuple(made.parameters()), (at,))


def bare(made: nn.Module, *names: str) -> Opponent:
    """An upstream layer without its projections: a function of the packed queries, keys and values alone."""
    for name in names:
        setattr(made, name, nn.Identity())
    return Opponent(made)


def taylor(d: int) -> Opponent:
    """Upstream's causal Taylor attention between its projections."""
    expand = module("taylor_series_linear_attention.attention").second_taylor_expansion
    causal_dot = module("fast_transformers.causal_product").CausalDotProduct.apply

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = expand(q * d ** -0.5), expand(k)
        den = torch.einsum("...nd,...nd->...n", q, k.cumsum(-2)).unsqueeze(-1)
        return causal_dot(q, k, v) / den.clamp(min=1e-5)

    return Opponent(fn)


def gate_loop(h: int) -> Opponent:
    """Upstream's gated scan between its projections, recomputed in the backward pass, as its layer does by default."""
    operator = module("gateloop_transformer.gateloop_transformer").gate_loop_operator
    from torch.utils.checkpoint import checkpoint

    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        b, n, _ = a.shape
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        a = torch.view_as_complex(a.unflatten(-1, (h, 2)).transpose(1, 2).flatten(0, 1)[:, :, None, None].contiguous())
        a = torch.polar(a.abs().sigmoid(), a.angle())
        args = q, k, v, a
        out = checkpoint(operator, *args, use_reentrant=True) if torch.is_grad_enabled() else operator(*args)
        return out.unflatten(0, (b, h)).transpose(1, 2).flatten(2)

    return Opponent(fn)


def simple_gate_loop() -> Opponent:
    """Upstream's simple scan between projection and norm."""
    operator = module("gateloop_transformer.simplified_gate_loop").gate_loop_operator

    def fn(q: Tensor, kv: Tensor, a: Tensor) -> Tensor:
        b, n, c = q.shape
        q, kv, a = (t.transpose(1, 2).flatten(0, 1).unsqueeze(-1) for t in (q, kv, a))
        out, _ = operator(q, kv, a.sigmoid())
        return out.squeeze(-1).unflatten(0, (b, c)).transpose(1, 2)

    return Opponent(fn)


def coor_descent(**options: Any) -> Opponent:
    """Upstream's iteration."""
    operator = module("colt5_attention.coor_descent").coor_descent
    return Opponent(lambda s: operator(s, **options))


def coor_layer(dim: int, heads: int, dim_head: int, iterations: int) -> nn.Module:
    """Upstream's coordinate-descent attention, which needs triton merely to be imported."""
    return module("coordinate_descent_attention.coordinate_descent_attention").Attention(
        dim, dim_head=dim_head, heads=heads, use_coor_descent=True, coor_descent_iters=iterations)


def dalle(kind: str, **options: Any) -> nn.Module:
    """One of upstream's text-to-image attentions."""
    return getattr(module("dalle_pytorch.attention"), kind)(**options)


def dense(allowed: Tensor, h: int) -> Opponent:
    """Softmax attention by einsum with a mask: what DeepSpeed's block-sparse kernel, which needs CUDA, computes."""
    def fn(qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
        scores = scores.masked_fill_(~allowed, -torch.finfo(scores.dtype).max)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).transpose(1, 2).flatten(2)

    return Opponent(fn)
