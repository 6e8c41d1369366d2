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


CPU, CUDA = bits("CPU"), bits("CUDA")
# What every plain tensor brings with it, and has nothing to do for one that carries neither gradient nor tangent.
_PASSED = (bits("BackendSelect") | bits("ADInplaceOrView") | bits("AutogradCPU")) & ~CPU
PLAIN = (Tensor, torch.nn.Parameter)
_FRONT_AND_BACK = bits("FuncTorchDynamicLayerFrontMode") | bits("FuncTorchDynamicLayerBackMode")
_AUTOCAST = (bits("AutocastCPU") | bits("AutocastCUDA")) & ~(CPU | CUDA)


def backend(tensors: Sequence[Tensor | None]) -> int | None:
    """The key of the backend of these, as `bits` has it, if nothing but plain reverse mode stands before it; else None, or other bits.

    The dispatcher goes by the same bits: no transform, no mode, no autocast, no tensor that is not plain.
    """
    if torch.compiler.is_compiling():
        return None
    # No level of forward mode, no tangent: outside of compiled programs, which do not come this way, this global is right.
    if fwad._current_level >= 0 and _C._is_fwd_grad_enabled() or _listened():
        return None
    found, keys = _C._dispatch_tls_local_include_set().raw_repr(), _C._dispatch_keys
    for t in tensors:
        if type(t) in PLAIN:
            found |= keys(t).raw_repr()
        elif t is not None:
            return None
    return found & ~_C._dispatch_tls_local_exclude_set().raw_repr() & ~_PASSED


def _listened() -> bool:
    """Whether profilers, modes of torch functions or `contracts.recording` want to see every call."""
    return bool(RECORDS) or _C._autograd._profiler_enabled() or _C._len_torch_function_stack() > 0


def mapping() -> bool:
    """Whether a vmap is under way, around or inside whatever else."""
    if not _functorch.get_dynamic_layer_stack_depth():
        return False
    return any(layer.key() == _functorch.TransformType.Vmap for layer in _functorch.get_interpreter_stack())


def alive(t: Tensor | None) -> Tensor | None:
    """t without the wrappers of levels that are over: built-in operators take them off, torch.func.vjp around one leaves them."""
    while t is not None and _functorch.is_dead_tensor_wrapper(t):
        t = _functorch.unwrap_if_dead(t)
    return t


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain CPU tensors, and nothing would see a use of them, nor differentiate it."""
    if torch.compiler.is_compiling() or _C.is_grad_enabled() and _C._any_requires_grad(*tensors):
        return False
    return backend(tensors) == CPU


def lone_level() -> int | None:
    """Inside a kernel of the Autograd key: the level of torch.func.jvp if that, or 0 if a dual level, is all there is; else None."""
    if torch.compiler.is_compiling() or _listened():
        return None
    if _C._dispatch_tls_local_include_set().raw_repr() & ~(_PASSED | _FRONT_AND_BACK):  # a mode
        return None
    depth = _functorch.get_dynamic_layer_stack_depth()
    if depth == 0:
        return 0
    layer = _functorch.peek_interpreter_stack()
    return layer.level() if depth == 1 and layer.key() == _functorch.TransformType.Jvp else None


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors of one backend, through which no gradient is to flow."""
    found = 0
    for t in tensors:
        if type(t) not in PLAIN:
            return False
        found |= _C._dispatch_keys(t).raw_repr()
    return found & ~(_PASSED | _AUTOCAST) in (CPU, CUDA) and not (_C.is_grad_enabled() and _C._any_requires_grad(*tensors))


class Below:
    """Below the level that `lone_level` gave: nothing is there but plain tensors."""

    def __init__(self, level: int):
        self.level = level

    def __enter__(self) -> None:
        self.forward = fwad._set_fwd_grad_enabled(False)
        self.forward.__enter__()
        if self.level:
            self.layer = _functorch.pop_dynamic_layer_stack()
            include = _C._dispatch_tls_local_include_set().raw_repr() & ~_FRONT_AND_BACK
            self.keys = _C._ForceDispatchKeyGuard(_C.DispatchKeySet.from_raw_repr(include), _C.DispatchKeySet.from_raw_repr(_AUTOCAST))
            self.keys.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.level:
            self.keys.__exit__(*error)
            _functorch.push_dynamic_layer_stack(self.layer)
        self.forward.__exit__(*error)
