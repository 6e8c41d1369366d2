"""The bridge to other tools: our functions on a flat dict of tensors, or as an nn.Module.

    f = flat_fn(taylor.apply, params)              f(dict[str, Tensor], x) -> Tensor
    f(flat_params(params), x)                      equals taylor.apply(params, x)[0]

Everything that reads nn.Module.state_dict or torch.func.functional_call takes the first form; what insists on a Module takes
`as_module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import check


def flat_params(params: Any) -> dict[str, Tensor]:
    """The differentiable leaves by dotted name, in order."""
    return {name: leaf for name, leaf in tree.to_flat(params).items() if tree.is_differentiable(leaf)}


def flat_fn(apply: Callable, like: Any) -> Callable:
    """f(flat, *args, **options) -> the result of apply(params, *args, **options), without the state.

    Args:
        apply: of a family or a model, or any function of params; of a tuple that it returns the first entry is kept.
        like: params that say how the dict becomes a tree: their structure, and the leaves that nothing differentiates.
    Raises:
        ValueError: a name is missing or unknown.
    """
    whole = tree.to_flat(like)
    kept = {name: leaf for name, leaf in whole.items() if not tree.is_differentiable(leaf)}
    form = tree.structure(like)
    names = list(whole)

    def f(flat: dict[str, Tensor], *args: Any, **options: Any) -> Any:
        missing = [n for n in names if n not in kept and n not in flat]
        unknown = [n for n in flat if n not in whole]
        check(not missing and not unknown, "inspect.flat_fn: expected the names of flat_params(like); got missing {}, unknown {}.",
              missing, unknown, remedy="Start from flat_params(params).")
        out = apply(tree.unflatten([flat[n] if n in flat else kept[n] for n in names], form), *args, **options)
        return out[0] if isinstance(out, tuple) else out

    return f


def as_module(apply: Callable, params: Any) -> torch.nn.Module:
    """An nn.Module whose forward(*args) is apply(params, *args), for tools that take nothing else.

    Its parameters are copies, named as in `flat_params` with "/" for ".", which a Module does not allow.
    """
    return _Module(flat_fn(apply, params), flat_params(params))


class _Module(torch.nn.Module):
    def __init__(self, fn: Callable, flat: dict[str, Tensor]):
        super().__init__()
        self.fn = fn
        for name, leaf in flat.items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(leaf.detach().clone()))

    def forward(self, *args: Any) -> Any:
        return self.fn({name.replace("/", "."): p for name, p in self.named_parameters()}, *args)
