"""How much memory a function needs at its peak, counted exactly: the same number on every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .. import tree


class _Count(TorchDispatchMode):
    """Follows every storage that an operator returns, for as long as anybody holds it."""

    def __init__(self, given: set[int]):
        super().__init__()
        self.given = given
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.live = {at: (ref, size) for at, (ref, size) in self.live.items() if not ref.expired()}
        for t in tree.leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.given and storage._cdata not in self.live:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak_bytes(fn: Callable, *args: Any) -> int:
    """The largest sum of bytes of tensors that fn(*args) holds at once, beside its arguments.

    Counts what torch's operators return, under every transform; memory inside a compiled kernel is not seen.
    """
    given = {t.untyped_storage()._cdata for t in tree.leaves(args) if isinstance(t, Tensor)}
    with _Count(given) as count:
        fn(*args)
    return count.peak
