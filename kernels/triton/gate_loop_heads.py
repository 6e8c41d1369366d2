"""Triton kernels of the gated loop with a complex gate per head, in chunks; see gate_loop_heads_device.py.

Chunk states are found for all chunks at once, then joined, then used for all chunks at once, so a GPU is filled at any number
of heads. Memory for states is d e / 32 numbers per position and head. Measured: not yet on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native.gate_loop import flops
from . import device_code, power_of_2
from . import why_not as triton_why_not

WIDTH = 128
CHUNK = 64
# Without TF32 a product keeps its operands in registers: it sums over 16 numbers at a time.
SUM = 16


def why_not(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernels can serve heads of these widths, else the reason."""
    if max(q.shape[3], v.shape[3]) > WIDTH:
        return f"needs widths of at most {WIDTH}, got {q.shape[3]} and {v.shape[3]}"
    return triton_why_not(q, k, v, *others)


class Plan:
    """The sizes of a call, and those that its launches are compiled for."""

    def __init__(self, q: Tensor, v: Tensor):
        b, h, self.n, self.d = q.shape
        self.heads, self.e = b * h, v.shape[3]
        self.chunks = -(-self.n // CHUNK)
        self.state = self.d * self.e
        self.kinds = kinds(self.d, self.e, q.dtype)
        self.row_tiles = -(-self.n // self.kinds["rows"]["R"])

    def blocks(self, of: str, *sides: str) -> int:
        """How many blocks of columns cover d, e or both."""
        count = 1
        for side in sides:
            count *= -(-{"D": self.d, "E": self.e}[side] // self.kinds[of][side])
        return count


def kinds(d: int, e: int, dtype: torch.dtype) -> dict[str, dict]:
    """What launches of each kind of kernel are compiled for: state sums, rows of outputs, rows of gradients, elementwise."""
    rows = 16 if dtype == torch.float64 else 32
    wide_d, wide_e = power_of_2(d), power_of_2(e)
    return {
        "sums": {"M": CHUNK, "R": SUM, "D": min(rows, wide_d), "E": min(rows, wide_e)},
        "rows": {"M": CHUNK, "R": rows, "K": SUM, "E": min(32, wide_e)},
        "queries": {"M": CHUNK, "R": rows, "K": SUM, "D": wide_d, "num_warps": 8 if wide_d > 64 else 4},
        "keys": {"M": CHUNK, "R": rows, "K": SUM, "D": wide_d, "E": wide_e, "num_warps": 8 if max(wide_d, wide_e) > 64 else 4},
        "flat": {"B": min(256, power_of_2(d * e))},
    }


class Launch:
    """Runs the kernels for one call; tensors are contiguous."""

    def __init__(self, q: Tensor, v: Tensor):
        self.plan = Plan(q, v)
        self.forward, lang = device_code("gate_loop_heads", q)
        self.grad, _ = device_code("gate_loop_heads_grad", q)
        self.like, self.acc = q, {"ACC": lang.accumulator(q.dtype)}
        self.dot = {**self.acc, "PRECISION": lang.PRECISION}

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def gates(self, a: Tensor, ta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p and its last of each chunk; sums of the tangents of log alpha likewise, if there is ta."""
        at = self.plan
        p, ends = self.new(at.heads, at.n, 2), self.new(at.heads, at.chunks, 2)
        logs, log_ends = (p, ends) if ta is None else (torch.empty_like(p), torch.empty_like(ends))
        self.forward.gates[(at.heads, at.chunks)](a, a if ta is None else ta, p, ends, logs, log_ends, at.n,
                                                  TANGENT=ta is not None, M=CHUNK, **self.acc)
        return p, ends, logs, log_ends

    def states(self) -> Tensor:
        at = self.plan
        return self.new(at.heads, at.chunks + 1, 2, at.d, at.e)

    def grid(self, of: str, *sides: str) -> tuple[int, int, int]:
        at = self.plan
        return at.heads, at.chunks if of == "sums" else at.row_tiles, at.blocks(of, *sides)

    def sums(self, x: Tensor, y: Tensor, p: Tensor, ends: Tensor, back: bool) -> Tensor:
        at, states = self.plan, self.states()
        self.forward.sums[self.grid("sums", "D", "E")](x, y, p, ends, states, at.n, at.d, at.e, BACK=back, **at.kinds["sums"],
                                                       **self.dot)
        return states

    def carry(self, states: Tensor, ends: Tensor, first: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
        """The state after all chunks and the product of all gates; `states` become those before each chunk."""
        at, block = self.plan, self.plan.kinds["flat"]["B"]
        last, product = self.new(at.heads, at.d, at.e, 2), self.new(at.heads, 2)
        self.forward.carry[(at.heads, -(-at.state // block))](
            states, ends, states if first is None else first.contiguous(), last, product, at.chunks, at.state,
            START=first is not None, REVERSE=back, B=block, **self.acc)
        return last, product


def _filled(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if t is None else t.contiguous()


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.shape[:2], q.shape[3], v.shape[3], 2)


def _wide(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a = (t.contiguous() for t in (q, k, v, a))
    run, out = Launch(q, v), torch.empty_like(v)
    at = run.plan
    with torch.cuda.device_of(q):
        p, ends, _, _ = run.gates(a)
        states = run.sums(k, v, p, ends, False)
        last, product = run.carry(states, ends, h0, False)
        run.forward.outputs[run.grid("rows", "E")](q, k, v, p, states, out, at.n, at.d, at.e, at.chunks, **at.kinds["rows"],
                                                   **run.dot)
    return out, last.view(_state_shape(q, v)), product.view(*q.shape[:2], 2)


def _wide_fake(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty(_state_shape(q, v)), q.new_empty(*q.shape[:2], 2)


def _wide_backward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None, g: Tensor | None, g_last: Tensor | None,
                   g_product: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, a, g = *(t.contiguous() for t in (q, k, v, a)), _filled(g, v)
    run, (dq, dk, dv, da) = Launch(q, v), (torch.empty_like(t) for t in (q, k, v, a))
    at = run.plan
    sizes = at.n, at.d, at.e, at.chunks
    with torch.cuda.device_of(q):
        p, ends, logs, _ = run.gates(a)
        states, r = run.sums(k, v, p, ends, False), run.sums(q, g, p, ends, True)
        _, product = run.carry(states, ends, h0, False)
        dh0, _ = run.carry(r, ends, g_last, True)
        logs, fixed = torch.empty_like(p), product
        run.grad.queries[run.grid("queries")](q, k, v, g, p, states, dq, logs, *sizes, **at.kinds["queries"], **run.dot)
        run.grad.keys[run.grid("keys")](q, k, v, g, p, ends, r, dk, dv, logs, *sizes, **at.kinds["keys"], **run.dot)
        if g_product is not None:
            (gr, gi), (pr, pi) = g_product.reshape(-1, 2).unbind(-1), product.unbind(-1)
            fixed = torch.stack((gr * pr + gi * pi, gi * pr - gr * pi), -1)
        run.grad.gates_back[(at.heads, at.chunks)](a, logs, states, r, fixed, da, at.n, at.chunks, at.state,
                                                   FIXED=g_product is not None, M=CHUNK, **at.kinds["flat"], **run.acc)
    return dq, dk, dv, da, dh0.view(_state_shape(q, v))


def _wide_backward_fake(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *rest) -> tuple[Tensor, ...]:
    return (*(t.new_empty(t.shape) for t in (q, k, v, a)), q.new_empty(_state_shape(q, v)))


def _wide_tangent(q, k, v, a, h0, tq, tk, tv, ta, th0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a = (t.contiguous() for t in (q, k, v, a))
    tq, tk, tv, ta = (_filled(t, x) for t, x in ((tq, q), (tk, k), (tv, v), (ta, a)))
    run, out = Launch(q, v), torch.empty_like(v)
    at = run.plan
    with torch.cuda.device_of(q):
        p, ends, logs, log_ends = run.gates(a, ta)
        states, moves = run.sums(k, v, p, ends, False), run.states()
        run.carry(states, ends, h0, False)
        run.grad.tangent_sums[run.grid("sums", "D", "E")](k, v, tk, tv, p, ends, logs, log_ends, states, moves, at.n, at.d, at.e,
                                                          **at.kinds["sums"], **run.dot)
        last, _ = run.carry(moves, ends, th0, False)
        run.grad.tangent_outputs[run.grid("rows", "E")](q, k, v, tq, tk, tv, p, logs, states, moves, out, at.n, at.d, at.e,
                                                        at.chunks, **at.kinds["rows"], **run.dot)
    return out, last.view(_state_shape(q, v)), log_ends.sum(1).view(*q.shape[:2], 2)


# q, k [b, h, n, d], v [b, h, n, e], a [b, h, n, 2], h0 [b, h, d, e, 2] or None -> out, last state, product of the gates.
# No size is 0.
wide = Operator("gate_loop_wide_triton", 1, "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0) -> (Tensor, Tensor, Tensor)",
                fake=_wide_fake, cpu=_wide, cuda=_wide)
wide_backward = Operator(
    "gate_loop_wide_backward_triton", 1,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor? g, Tensor? g_last, Tensor? g_product)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_wide_backward_fake, cpu=_wide_backward, cuda=_wide_backward)
# Tangents, None for zero -> those of out, of the last state, and of the logarithm of the product.
wide_tangent = Operator(
    "gate_loop_wide_tangent_triton", 1,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? ta, Tensor? th0)"
    " -> (Tensor, Tensor, Tensor)", fake=_wide_fake, cpu=_wide_tangent, cuda=_wide_tangent)

wide.flops(flops(10, heads=True))
wide_backward.flops(flops(30, heads=True))
wide_tangent.flops(flops(30, heads=True))
wide.split((1,) * 5, (1,) * 3)
wide_backward.split((1,) * 8, (1,) * 5)
wide_tangent.split((1,) * 10, (1,) * 3)
