"""Who would see the use of some tensors: transforms, modes, autocast, profilers, derivatives. Plain calls can then take short cuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

_C = torch._C
_functorch = _C._functorch
RECORDS: list[list] = []  # of operators, one for each `contracts.recording` under way


def bits(key: str) -> int:
    """A dispatch key as a number of which each bit is a backend or what may stand before it."""
    return _C.DispatchKeySet(_C._dispatch_key_parse(key)).raw_repr()


CPU = bits("CPU")
# What every plain tensor brings with it, and has nothing to do for one that carries neither gradient nor tangent.
_PASSED = (bits("BackendSelect") | bits("ADInplaceOrView") | bits("AutogradCPU")) & ~CPU
_PLAIN = (Tensor, torch.nn.Parameter)


def backend(tensors: Sequence[Tensor | None]) -> int | None:
    """The key of the backend of these, as `bits` has it, if nothing but plain reverse mode stands before it; else None, or other bits.

    The dispatcher goes by the same bits: no transform, no mode, no autocast, no tensor that is not plain.
    """
    if torch.compiler.is_compiling():
        return None
    found = _C._dispatch_tls_local_include_set().raw_repr()
    for t in tensors:
        if type(t) in _PLAIN:
            found |= _C._dispatch_keys(t).raw_repr()
        elif t is not None:
            return None
    # Profilers and `recording` want to see the call. No level of forward mode, no tangent: outside of compiled programs,
    # which do not come this way, this global is right.
    if RECORDS or _C._autograd._profiler_enabled() or _C._len_torch_function_stack() or fwad._current_level >= 0:
        return None
    return found & ~_C._dispatch_tls_local_exclude_set().raw_repr() & ~_PASSED


def mapping() -> bool:
    """Whether a vmap is under way, around or inside whatever else."""
    if not _functorch.get_dynamic_layer_stack_depth():
        return False
    return any(layer.key() == _functorch.TransformType.Vmap for layer in _functorch.get_interpreter_stack())


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain CPU tensors, and nothing would see a use of them, nor differentiate it."""
    if torch.compiler.is_compiling() or _C.is_grad_enabled() and _C._any_requires_grad(*tensors):
        return False
    return backend(tensors) == CPU
