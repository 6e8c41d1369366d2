"""Gradients and tangents by plain autograd where no transform is under way: what torch.func gives, without its cost per operation.

The function runs on fresh leaves that share memory with the tensors to differentiate. Whatever it closes over stays
differentiable: results that depend on such a tensor keep their graph, all others come back without one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

_CALLS = itertools.count()
_PLAIN = (Tensor, torch.nn.Parameter)


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing is under way that plain autograd would not notice or would do otherwise, and all of these are constants."""
    if torch.compiler.is_compiling() or torch._C._functorch.get_dynamic_layer_stack_depth() or fwad._current_level >= 0:
        return False
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    # Autocast remembers what it cast, leaves too: fresh ones in each step would pile up there.
    devices = {"cpu", *(t.device.type for t in tensors if not t.is_cpu)}
    if not tensors or any(torch.is_autocast_enabled(device) for device in devices) or torch._C._any_requires_grad(*tensors):
        return False
    for t in tensors:
        if type(t) not in _PLAIN or t.is_inference():
            return False
    return True


def value_and_grad(part: Callable, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """part(*tensors) -> (value, aux tensors) and the gradient of the value; None if torch refuses something on the way.

    torch.func.vjp may take what this refuses, such as saving a tensor from inference mode, or says why not.
    """
    keep = torch.is_grad_enabled()
    call = next(_CALLS)
    try:
        with torch.enable_grad():
            new = [_leaf(t, call) for t in tensors]
            value, aux = part(*new)
            # Asked for once for all: there is nothing outside in all but a few calls.
            outside = keep and _reaches_outside([value, *aux], call)
            grads = _grad(value, new, outside)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # one of this library, or no memory
            raise
        return None
    old = {id(leaf): t for leaf, t in zip(new, tensors)}

    def out(t: Tensor) -> Tensor:
        if id(t) in old:
            return old[id(t)]
        return t if not t.requires_grad or outside and _reaches_outside([t], call) else t.detach()

    return out(value), [out(t) for t in aux], [out(g) for g in grads]


def by_transform(part: Callable, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
    """The same by torch.func, which nests with every transform."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # in it torch.func of 2.11 gives zeros, without a word
            return by_transform(part, tensors)
    value, pull, aux = torch.func.vjp(part, *tensors, has_aux=True)
    return value, aux, pull(torch.ones_like(value))


def jvp(part: Callable, tensors: Sequence[Tensor],
        tangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]] | None:
    """part(*tensors) -> (tensors, aux tensors): the former, their tangents, and aux; None if torch refuses something on the way.

    A level of torch's own forward mode, which has one only: a function that takes such derivatives itself is for torch.func.
    """
    try:
        with fwad.dual_level():
            # The public function for the first: it also brings the rules that torch has for operations like the gradient of softmax.
            first = fwad.make_dual(tensors[0], tangents[0])
            others = [torch._VF._make_dual(x, t, level=0) for x, t in zip(tensors[1:], tangents[1:])]
            outs, aux = part(first, *others)
            return _apart(outs, aux)
    except RuntimeError as error:
        if type(error) not in (RuntimeError, NotImplementedError):  # one of this library, or no memory
            raise
        return None


def jvp_by_transform(part: Callable, tensors: Sequence[Tensor],
                     tangents: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor | None], Sequence[Tensor]]:
    """The same by torch.func, which nests with every transform."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # in it forward mode gives zeros, without a word
            return jvp_by_transform(part, tensors, tangents)
    if not tensors:
        outs, aux = part()
        return outs, [torch.zeros_like(o) if _moves(o) else None for o in outs], aux
    outs, moved, aux = torch.func.jvp(lambda *new: tuple(map(tuple, part(*new))), tuple(tensors), tuple(tangents), has_aux=True)
    return outs, [t if _moves(o) else None for o, t in zip(outs, moved)], aux


def _apart(outs: Sequence[Tensor], aux: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Values and tangents of duals, zeros for those that have none."""
    pairs = [torch._VF._unpack_dual(o, level=0) for o in outs]
    moved = [t if t is not None else torch.zeros_like(o) if _moves(o) else None for o, t in pairs]
    return [o for o, _ in pairs], moved, [torch._VF._unpack_dual(a, level=0)[0] for a in aux]


def _moves(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _leaf(t: Tensor, call: int) -> Tensor:
    leaf = t.detach().requires_grad_()
    leaf._fnattn_call = call
    return leaf


def _grad(value: Tensor, leaves: list[Tensor], create_graph: bool) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t, requires_grad=False) for t in leaves]
    grads = torch.autograd.grad(value, leaves, torch.ones_like(value), create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t, requires_grad=False) if g is None else g for g, t in zip(grads, leaves)]


def _reaches_outside(tensors: Sequence[Tensor], call: int) -> bool:
    """Whether a leaf takes part that was there before this call. Leaves of calls within it do not count."""
    if any(t.requires_grad and t.grad_fn is None and _older(t, call) for t in tensors):
        return True
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        edges = (node := todo.pop()).next_functions
        if not edges and _older(getattr(node, "variable", None), call):
            return True
        for following, _ in edges:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return False


def _older(leaf: Tensor | None, call: int) -> bool:
    return getattr(leaf, "_fnattn_call", -1) < call
