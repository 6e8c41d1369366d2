"""What vmap does with an operator: the rule that folds a mapped axis into the batch axis, and how vmap reaches a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import _add_batch_dim

_C = torch._C


def mapped(op: Any, rule: Callable) -> Callable:
    """The kernel by which vmap reaches a rule: that of torch.library.register_vmap for arguments that are tensors or none.

    Taking trees of arguments apart and together, as that does, costs a small operator ten times what it computes.
    """
    below = _C.DispatchKeySet(_C._dispatch_key_parse("FuncTorchBatched"))
    of_none = _none_of(op)

    def kernel(_, *args):
        here = retrieve_current_functorch_interpreter()
        level, plain, dims = here.level(), list(args), [None] * len(args)
        for i, a in enumerate(args):
            if isinstance(a, Tensor):
                plain[i], dims[i] = _C._functorch._unwrap_batched(a, level)
        with _C._ExcludeDispatchKeyGuard(below):
            if all(dim is None for dim in dims):
                return op(*args)
            of_some = rule if here.batch_size() else of_none
            out, out_dims = of_some(VmapInfo(here.batch_size(), here.randomness()), tuple(dims), *plain)
        if isinstance(out, tuple):
            return tuple(o if dim is None else _add_batch_dim(o, dim, level) for o, dim in zip(out, out_dims, strict=True))
        return out if out_dims is None else _add_batch_dim(out, out_dims, level)

    return kernel


def fold(operator: Callable) -> Callable:
    """vmap rule for operators whose tensors all have one leading batch axis: the mapped axis becomes part of it."""

    def rule(info, in_dims, *args):
        size = info.batch_size

        def merge(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        out = operator(*[merge(x, d) for x, d in zip(args, in_dims)])
        if isinstance(out, tuple):
            return tuple(_unfold(o, size) for o in out), (0,) * len(out)
        return _unfold(out, size), 0

    return rule


def _unfold(out: Tensor, size: int) -> Tensor:
    return out.unflatten(0, (size, out.shape[0] // size))


def _none_of(op: Any) -> Callable:
    """The rule for an axis of no entries: no result tells how large an example's axes are, so the operator sees one of zeros.

    It is made from the arguments, and the results from its results, so that derivatives find their way, if only to zeros.
    """
    def rule(info, in_dims, *args):
        out = op(*[a if dim is None else a.any(dim) if a.dtype == torch.bool else a.sum(dim, dtype=a.dtype)
                   for a, dim in zip(args, in_dims)])
        if isinstance(out, tuple):
            return tuple(o.unsqueeze(0)[:0] for o in out), (0,) * len(out)
        return out.unsqueeze(0)[:0], 0

    return rule
