"""Activation patching: which intermediate values carry the difference between two inputs. All patches in one vmap.

    clean   = values tapped on the clean input
    patched = the corrupted run, with the clean value of one tap at one position (or head) put in its place
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import taps, tree
from ..core import check

# t taps, s slices of a tap (positions or heads)


class Patches(NamedTuple):
    """What a metric does when one value is put back."""

    names: tuple          # t tap names
    metric: Tensor        # [t, s, ...]: with the clean value of tap t at slice s
    clean: Tensor         # [...]: on the clean input
    corrupted: Tensor     # [...]: on the corrupted input
    restored: Tensor      # [t, s, ...]: (metric - corrupted) / (clean - corrupted): 1 brings all of it back, 0 nothing


def patch(fn: Callable, clean: Any, corrupted: Any, names: Sequence[str], *, axis: int = -2, chunk_size: int | None = None) -> Patches:
    """Restores each tap at each slice, one at a time, in a single vmap over all of them.

    Args:
        fn: fn(input) -> a metric, 0-d or any tensor: for example the logit of the answer. Its taps are named in `names`.
        clean, corrupted: two inputs of the same shape.
        names: taps with the same size along `axis`: for example every "blocks.i.attn_out".
        axis: what a slice is: -2 positions, both for [b, n, dim] and [b, h, n, d]; 1 heads of [b, h, n, d].
        chunk_size: so many patches at a time.
    Memory of t s forward passes, or chunk_size of them. Differentiable.
    Source: Vig et al. 2020, arXiv 2004.12265; Heimersheim and Nanda 2024, arXiv 2404.15255 (denoising).
    """
    before, values = taps.harvest(fn, only=names)(clean)
    return _sweep(fn, values, before, corrupted, {}, tuple(names), axis, chunk_size)


def causal_trace(fn: Callable, x: Any, corruption: Mapping[str, Any], names: Sequence[str], *, axis: int = -2,
                 chunk_size: int | None = None) -> Patches:
    """The same where the corruption is an intervention and not another input: noise planted at a tap, for example.

    Args:
        corruption: tap -> value or function from the old value to the new one, as `taps.plant` takes it. A tap cannot be both
            corrupted and restored.
        names: taps to restore, each at each slice.
    Source: Meng et al. 2022, arXiv 2202.05262.
    """
    both = sorted(set(corruption) & set(names))
    check(not both, "inspect.causal_trace: a tap cannot be both corrupted and restored; got {}.", both,
          remedy="Restore what comes after the corruption.")
    before, values = taps.harvest(fn, only=names)(x)
    return _sweep(fn, values, before, x, dict(corruption), tuple(names), axis, chunk_size)


def _sweep(fn: Callable, values: Mapping[str, Tensor], clean: Tensor, x: Any, corruption: dict, names: tuple, axis: int,
           chunk_size: int | None) -> Patches:
    check(bool(names), "inspect.patch: expected at least one tap; got none.", remedy="taps.harvest(fn)(x)[1] has their names.")
    sizes = {name: values[name].shape[axis] for name in names}
    check(len(set(sizes.values())) == 1, "inspect.patch: taps must have one size along axis {}; got {}.", axis, sizes,
          remedy="Call it once for taps of each kind.")
    slices = next(iter(sizes.values()))
    device = values[names[0]].device

    def restore(old: Tensor, value: Tensor, here: Tensor) -> Tensor:
        shape = [1] * old.ndim
        shape[axis] = slices
        return torch.where(here.reshape(shape), value, old)

    def run(chosen: Tensor) -> Tensor:  # [t, s] bool: what is put back
        puts = {name: (lambda old, name=name, i=i: restore(old, values[name], chosen[i])) for i, name in enumerate(names)}
        return taps.plant(fn, {**corruption, **puts})(x)

    count = len(names) * slices
    each = torch.eye(count, dtype=torch.bool, device=device).reshape(count, len(names), slices)
    corrupted = taps.plant(fn, corruption)(x) if corruption else fn(x)
    metric = tree.vmap(run, chunk_size=chunk_size)(each).unflatten(0, (len(names), slices))
    return Patches(names, metric, clean, corrupted, (metric - corrupted) / (clean - corrupted))
