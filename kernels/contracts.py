"""One mechanism for every compiled operator, so that each transform of torch.func gets it right.

An `Operator` is a dispatcher operator with a Python kernel on the `Autograd` key. functorch re-enters the dispatcher once
per transform level and reaches that kernel each time, exactly as it does for a built-in operator; tracers see one opaque
node. The documented ways (`custom_op` with `register_autograd`, a bare `autograd.Function`) return zero derivatives
without an error under some transforms, which is why none of them is used.

Private torch names are confined to this file, forward_mode.py, mapping.py, watchers.py, sharding.py and collectives.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C._functorch import get_single_level_autograd_function_allowed, set_single_level_autograd_function_allowed

from . import sharding, watchers
from .forward_mode import alone, along, any_moves, apart, laid_out, unpack_dual
from .mapping import fold, mapped

NAMESPACE = "fnattn"
_LIB = torch.library.Library(NAMESPACE, "FRAGMENT")
_C = torch._C
_FLOPS: dict[Any, Callable] = {}


OPERATORS: list[Operator] = []  # all that were made


class KernelUnavailable(RuntimeError):
    """A kernel was asked for by name and cannot serve this call on this machine; the text says why."""


class DerivativeUnsupported(RuntimeError):
    """A derivative was asked for that does not exist; the alternative would be a wrong number."""


class Operator:
    """A dispatcher operator `fnattn::<name>_v<version>`, right under every transform once it has been given derivatives.

    name:     operator and kernel, for example `causal_dot_native`.
    version:  counted up whenever a derivative rule changes: torch's compile caches on disk key on the name alone.
    schema:   arguments and results in torch's schema language, tensors first. Every tensor argument and result has one leading
              batch axis, into which vmap folds the mapped axis (see `fold`), unless `batch` is given to `derive`.
    fake:     results' shapes and dtypes, for tracing.
    cpu, cuda, any_device: the functions that compute. They get plain tensors, of any strides.
    autocast: dtype that low-precision arguments are cast to under autocast; None leaves them alone.
    """

    def __init__(self, name: str, version: int, schema: str, *, fake: Callable, cpu: Callable | None = None,
                 cuda: Callable | None = None, any_device: Callable | None = None,
                 autocast: torch.dtype | None = torch.float32):
        self.name = f"{name}_v{version}"
        self.qualified = f"{NAMESPACE}::{self.name}"
        # How many arguments are tensors, or may be: the first ones. What comes later, or in lists, nobody would look into for a
        # gradient or a mapped axis.
        kinds = [str(a.type) for a in _C.parse_schema(self.name + schema).arguments]
        self.tensors = sum("Tensor" in kind for kind in kinds)
        if any(kind not in ("Tensor", "Optional[Tensor]") for kind in kinds[:self.tensors]):
            raise ValueError(f"Operator {name}: tensors must be the first arguments, each by itself; got {schema}.\n"
                             f"  Put numbers behind them, and give the parts of a list one by one.")
        _LIB.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self.op = self.packet.default
        self._vjp: Callable | None = None
        self._jvp: Callable | None = None
        self._both: Callable | None = None
        self._save_outputs = True
        self.splits: list[sharding.Split] = []
        for key, fn in (("CPU", cpu), ("CUDA", cuda), ("CompositeExplicitAutograd", any_device)):
            if fn is not None:
                _LIB.impl(self.name, fn, key)
        self._ends = {watchers.bits(key): fn or any_device for key, fn in (("CPU", cpu), ("CUDA", cuda)) if fn or any_device}
        torch.library.register_fake(self.qualified, self._on_one_device(fake), lib=_LIB)
        _LIB.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        if autocast is not None:
            for device in ("cpu", "cuda"):
                torch.library.register_autocast(self.qualified, device, autocast, lib=_LIB)
        self._node = _node(self)
        self._reverse = _reverse(self)
        OPERATORS.append(self)
        sharding.add(self)

    def _on_one_device(self, fake: Callable) -> Callable:
        """`fake`, which the dispatcher also takes if only some tensors are on the meta device: its results would be empty memory."""

        def checked(*args):
            devices = {t.device.type for t in args[:self.tensors] if type(t) in watchers.PLAIN}
            if len(devices) > 1:
                raise ValueError(f"{self.qualified}: tensors must be on one device; got {', '.join(sorted(devices))}.\n"
                                 f"  Move them: .to(device); from the meta device, which holds no numbers, draw or load them.")
            return fake(*args)

        return checked

    def __repr__(self) -> str:
        return f"Operator({self.qualified})"

    def __call__(self, *args):
        fn = self._end(args)
        if fn is None:
            return self.packet(*args)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args[:self.tensors]):
            return self.packet(*args) if self._vjp is None else self._reverse.apply(fn, *args)
        with _C._AutoDispatchBelowADInplaceOrView():
            return fn(*args)

    def straight(self, args: Sequence[Any]) -> Callable | None:
        """The function that computes, if the dispatcher would do nothing but call it; else None."""
        if torch.compiler.is_compiling():  # before what tracers cannot follow
            return None
        return None if _C.is_grad_enabled() and _C._any_requires_grad(*args[:self.tensors]) else self._end(args)

    def _end(self, args: Sequence[Any]) -> Callable | None:
        """The function that computes, if nothing but plain reverse mode stands before it; else None.

        Through Python kernels the dispatcher takes 30 microseconds to find it, most of a small call.
        """
        bits = watchers.backend(args[:self.tensors])
        return None if bits is None else self._ends.get(bits)

    def derive(self, *, vjp: Callable, jvp: Callable, both: Callable | None = None, batch: Callable | None = None,
               save_outputs: bool = True) -> None:
        """Gives the operator its derivatives and its vmap rule.

        vjp(needs, args, outs, cotangents) -> one gradient per argument (None where not needed or not a tensor);
            cotangents of unused outputs are None.
        jvp(args, outs, tangents) -> tangent of each output; tangents[i] is None where argument i has none.
            It runs inside a forward-mode level: plain differentiable torch code and Operators only, no torch.func.
        both(args, tangents) -> (outs, tangent of each output): the operator and jvp in one, where that is cheaper; used where
            forward mode is all there is at a level. The rest is as for jvp.
        batch: the rule for torch.library.register_vmap; default: fold the mapped axis into the leading axis.
        save_outputs: whether the rules read `outs`; False saves their memory.
        """
        self._vjp, self._jvp, self._both, self._save_outputs = vjp, jvp, both, save_outputs
        _LIB.impl(self.name, mapped(self.op, batch or fold(self)), "FuncTorchBatched", with_keyset=True)

    def flops(self, formula: Callable) -> None:
        """Gives the operator a FLOP formula, which takes shapes where the operator takes tensors; see `register_flops`."""
        _FLOPS[self.packet] = formula
        if "torch.utils.flop_counter" in sys.modules:
            register_flops()

    def split(self, arguments: Sequence[sharding.Axis], results: Sequence[sharding.Axis]) -> None:
        """Lets DTensor split the operator along one more axis than the batch, for example that of the heads.

        One axis per tensor argument in the order of the schema, and per result; None: whole on every device. (axis,): whole
        where its size is 1. "sum": results of the devices are to be added.
        """
        self.splits.append(sharding.Split(tuple(arguments), tuple(results)))

    def like(self, other: Operator) -> None:
        """Takes the FLOP formula and the splits of an operator with the same arguments and results."""
        self.flops(_FLOPS[other.packet])
        self.splits += other.splits

    def _autograd(self, keyset, *args):
        """Runs once per transform level and once at the bottom, like the kernel of a built-in operator."""
        sharding.on_first_use(args)
        if watchers.RECORDS:
            watchers.RECORDS[-1].append(self)
        forward_on = _C._is_fwd_grad_enabled()
        reverse = _C.is_grad_enabled() and _C._any_requires_grad(*args)
        if reverse or (forward_on and any_moves(args)):
            if self._vjp is None:
                raise DerivativeUnsupported(
                    f"{self.qualified} is a raw kernel without derivatives, and an input carries a gradient or tangent.\n"
                    f"  Call the public operator in fnattn.ops instead.")
            if self._both is not None and not reverse:
                if (duals := alone(self._both, args)) is not None:
                    return duals
                if (split := apart(args)) is not None:
                    return along(self._both, split)
            before = get_single_level_autograd_function_allowed()
            set_single_level_autograd_function_allowed(True)
            try:
                return self._node.apply((keyset, forward_on), *args)
            finally:
                set_single_level_autograd_function_allowed(before)
        with _C._AutoDispatchBelowADInplaceOrView():
            return self.op.redispatch(keyset & _C._after_autograd_keyset, *args)


@contextlib.contextmanager
def recording() -> Iterator[list[Operator]]:
    """A list that receives every Operator called meanwhile, once per transform level."""
    watchers.RECORDS.append([])
    try:
        yield watchers.RECORDS[-1]
    finally:
        watchers.RECORDS.pop()


def register_flops() -> None:
    """Lets torch's FlopCounterMode count every Operator. Call it before making the mode.

    It has happened already where torch.utils.flop_counter was imported before fnattn. That module imports Triton, so it is
    not imported for the few who count.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for packet, formula in _FLOPS.items():
        if packet not in flop_registry:
            register_flop_formula(packet)(formula)


def _node(operator: Operator) -> type:
    """The autograd node of one operator at one transform level."""

    class Node(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, meta, *args):
            keyset, forward_on = meta
            # Function.apply has switched grad mode and forward mode off; the transform levels below need them. Below
            # ADInplaceOrView too, as built-in operators do: a kernel may return a view of its own memory, and a view
            # that autograd knows of refuses a tangent of another layout.
            with torch.enable_grad(), fwad._set_fwd_grad_enabled(forward_on), _C._AutoDispatchBelowADInplaceOrView():
                out = operator.op.redispatch(keyset & _C._after_autograd_keyset, *args)
            outs = out if isinstance(out, tuple) else (out,)
            ctx.strides = [o.stride() for o in outs]
            ctx.tensor_at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            ctx.others = [None if isinstance(a, Tensor) else a for a in args]
            # The arguments as they came, tangents included: core forward-over-reverse needs the duals.
            saved = [args[i] for i in ctx.tensor_at] + (list(outs) if operator._save_outputs else [])
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        def backward(ctx, *cotangents):
            args, count, saved = list(ctx.others), len(ctx.tensor_at), ctx.saved_tensors
            if all(c is None for c in cotangents):
                return (None,) * (1 + len(args))
            # A pullback may be called when its level is over, inside others that are not.
            saved, cotangents = [watchers.alive(t) for t in saved], [watchers.alive(c) for c in cotangents]
            for i, t in zip(ctx.tensor_at, saved):
                args[i] = t
            return (None, *operator._vjp(ctx.needs_input_grad[1:], args, saved[count:], cotangents))

        @staticmethod
        def jvp(ctx, _, *tangents):
            args, count = list(ctx.others), len(ctx.tensor_at)
            # Forward mode was switched off around this call; outer forward-mode levels need it on, and this level's
            # tangents must not be seen by the rule a second time.
            with fwad._set_fwd_grad_enabled(True):
                saved = [unpack_dual(t)[0] for t in ctx.saved_tensors]
                for i, t in zip(ctx.tensor_at, saved):
                    args[i] = t
                moved = operator._jvp(args, saved[count:], tangents)
                if isinstance(moved, tuple):
                    return tuple(map(laid_out, moved, ctx.strides))
                return laid_out(moved, ctx.strides[0])

        @staticmethod
        def _compiled_autograd_key(ctx):
            return (ctx._autograd_function_id,)

    Node.__name__ = Node.__qualname__ = operator.name
    return Node


def _reverse(operator: Operator) -> type:
    """The same node where plain reverse mode is all there is: it calls the function that computes, and keeps no tangents."""
    count = operator.tensors

    class Reverse(operator._node):
        @staticmethod
        def forward(ctx, fn, *args):
            with _C._AutoDispatchBelowADInplaceOrView():
                out = fn(*args)
            ctx.options = args[count:]
            outs = () if not operator._save_outputs else out if isinstance(out, tuple) else (out,)
            ctx.save_for_backward(*args[:count], *outs)
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        def backward(ctx, *cotangents):
            args = ctx.saved_tensors
            for c in cotangents:
                if c is not None:
                    return (None, *operator._vjp(ctx.needs_input_grad[1:], [*args[:count], *ctx.options], args[count:], cotangents))
            return (None,) * (1 + count + len(ctx.options))

    Reverse.__name__ = Reverse.__qualname__ = operator.name
    return Reverse


def reference_vjp(fn: Callable, needs: Sequence[bool], args: Sequence[Any], cotangents: Sequence[Tensor | None]):
    """Gradients of the plain-torch function fn for each argument that needs one; None for the others."""
    wanted = [i for i, (a, need) in enumerate(zip(args, needs)) if need and isinstance(a, Tensor)]

    def part(*chosen):
        full = list(args)
        for i, x in zip(wanted, chosen):
            full[i] = x
        return fn(*full)

    outs, pull = torch.func.vjp(part, *[args[i] for i in wanted])
    if isinstance(outs, tuple):
        given = tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outs, cotangents))
    else:
        given = cotangents[0]
    grads: list[Tensor | None] = [None] * len(args)
    for i, g in zip(wanted, pull(given)):
        grads[i] = g
    return tuple(grads)
