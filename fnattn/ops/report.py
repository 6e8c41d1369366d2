"""Which kernel would serve each operator on this machine, and why the others would not.

Nothing is guessed: for a typical call on each device, every kernel of the operator is asked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import torch
from fnattn_kernels.contracts import KernelUnavailable, recording
from torch import Tensor

from ._door import REFERENCE, worthwhile

# b batch, h heads, n positions, d width of a head, c channels


SIZES = {"b": 2, "h": 8, "n": 256, "d": 16}
Draw = Callable[..., Tensor]  # a float tensor of a shape, on the device and in the dtype in question


class Case(NamedTuple):
    """A typical call of one operator at sizes like SIZES.

    module:  where its reference and KERNELS are.
    call:    (draw, sizes) -> positional arguments of the public function.
    options: sizes -> its keyword arguments.
    asked:   from the positional arguments, what its kernels are asked about.
    """

    module: str
    call: Callable[[Draw, dict], tuple]
    options: Callable[[dict], dict] = lambda s: {}
    asked: Callable[..., tuple] = lambda *args: args


def _qkv(draw: Draw, s: dict) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(draw(s["b"], s["h"], s["n"], s["d"]) for _ in range(3))


def _gate_loop(draw: Draw, s: dict) -> tuple:
    return *_qkv(draw, s), draw(s["b"], s["h"], s["n"], 2)


def _simple_gate_loop(draw: Draw, s: dict) -> tuple:
    return tuple(draw(s["b"], s["n"], s["h"] * s["d"]) for _ in range(3))


def _scan(draw: Draw, s: dict) -> tuple:
    a, x, _ = _simple_gate_loop(draw, s)
    return a.sigmoid(), x


def _linear(draw: Draw, s: dict) -> tuple:
    """One row for each sequence."""
    width = s["h"] * s["d"]
    return draw(s["b"], 1, width), draw(4 * width, width)


def _rotary(draw: Draw, s: dict) -> tuple:
    x = draw(s["b"], s["h"], s["n"], s["d"])
    freqs = 10000.0 ** (-torch.arange(0, s["d"], 2, device=x.device) / s["d"])
    return x, torch.arange(s["n"], device=x.device), freqs.float()


def _blocks(draw: Draw, s: dict) -> tuple:
    """Every second block, and the diagonal."""
    q, k, v = _qkv(draw, s)
    i = torch.arange(-(-s["n"] // BLOCK), device=q.device)
    return q, k, v, ((i[:, None] - i) % 2 == 0)[None]


def _cached(draw: Draw, s: dict) -> tuple:
    """One query against keys of which a quarter lies apart."""
    late = s["n"] // 4
    shapes = (1, s["n"] - late, s["n"] - late, late, late)
    return tuple(draw(s["b"], s["h"], n, s["d"]) for n in shapes)


def _picture(s: dict) -> dict:
    """A quarter of the positions is text, the rest the beginning of a picture."""
    text = s["n"] // 4
    return {"text_len": text, "image_size": math.isqrt(max(s["n"] - text - 1, 0)) + 1}


BLOCK = 16
PACKAGES = {"fast_transformers": "pytorch-fast-transformers", "colt5": "CoLT5-attention", "deepspeed": "deepspeed", "triton": "triton",
            "rotary_embedding_torch": "rotary-embedding-torch"}
CASES = {
    "causal_dot": Case("causal_dot", _qkv),
    "scan": Case("scan", _scan, asked=lambda a, x: (a, x, None)),
    "taylor": Case("taylor", _qkv),
    "gate_loop": Case("gate_loop.complex", _gate_loop, asked=lambda q, k, v, a: (q, k, v, a, None, None)),
    "simple_gate_loop": Case("gate_loop.simple", _simple_gate_loop, asked=lambda q, kv, a: (q, kv, a, None)),
    "softmax_attention": Case("softmax", _qkv, lambda s: {"causal": True}),
    "cached_attention": Case("cached_attention", _cached, lambda s: {"first": s["n"] - s["n"] // 4, "length": s["n"]},
                             asked=lambda q, k, v, *late: (q, k, v)),
    "linear": Case("linear", _linear, asked=lambda x, weight: (x, weight, None)),
    "rms_norm": Case("rms_norm", lambda draw, s: (draw(s["b"], s["n"], s["h"] * s["d"]), draw(s["h"] * s["d"]))),
    "masked_softmax": Case("masked_softmax", lambda draw, s: (draw(s["b"], s["h"], s["n"], s["n"]),)),
    "rotary": Case("rotary", _rotary, asked=lambda x, positions, freqs: (x, freqs)),
    "coor_descent": Case("coor_descent", lambda draw, s: (draw(s["b"], s["h"], s["n"]),), lambda s: {"k": 2.0},
                         asked=lambda s: (s, s[..., 0], "iterate")),
    "coor_descent_attention": Case("coor_attention", _qkv, lambda s: {"sparsity_k": 2.0}),
    "block_sparse_attention": Case("block_sparse", _blocks, lambda s: {"block": BLOCK, "causal": True}),
    "conv_attention": Case("conv_attention", _qkv, _picture),
    "axial_attention": Case("axial_attention", _qkv, _picture),
}


class Answer(NamedTuple):
    """One implementation of one operator on one device: reason is why it would not run, None if it could.

    version: the dispatcher operators that it calls, whose names end in their version, and the version of a package it wraps.
    """

    operator: str
    device: str
    dtype: str
    impl: str
    reason: str | None
    chosen: bool
    version: str


def devices() -> list[str]:
    """The kinds of devices that this machine has."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def rows(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Iterator[Answer]:
    """What every implementation of every operator answers, for a typical call on every device of this machine."""
    for name, case in CASES.items():
        kernels = importlib.import_module(f"{__package__}.{case.module}").KERNELS
        for device in devices():
            for dtype in dtypes:
                asked = case.asked(*case.call(functools.partial(_zeros, dtype, device), SIZES))
                answers = [(k.name, k.why_not(*asked), worthwhile(name, k, *asked)) for k in kernels]
                chosen = next((impl for impl, reason, worth in answers if reason is None and worth), REFERENCE)
                short = str(dtype).removeprefix("torch.")
                yield from (Answer(name, device, short, impl, reason, impl == chosen, version(name, impl, reason is None))
                            for impl, reason, _ in answers)
                yield Answer(name, device, short, REFERENCE, None, chosen == REFERENCE, f"torch {torch.__version__}")


def version(name: str, impl: str, able: bool) -> str:
    """What an implementation of an operator consists of: seen, if it is able to run, on the meta device, where nothing is computed."""
    case, called = CASES[name], []
    try:
        if not able:
            raise KernelUnavailable
        with recording() as called:
            args = case.call(functools.partial(_zeros, torch.float32, "meta"), SIZES)
            getattr(importlib.import_module(__package__), name)(*args, **case.options(SIZES), impl=impl)
    except KernelUnavailable:
        pass
    found = list(dict.fromkeys(operator.name for operator in called))
    if impl in PACKAGES:
        try:
            found.append(f"{PACKAGES[impl]} {importlib.metadata.version(PACKAGES[impl])}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


def _zeros(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def report(file: TextIO | None = None) -> None:
    """Prints, per operator and device, which implementation impl="auto" runs, and why not the others."""
    out: Any = sys.stdout if file is None else file
    out.write(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, devices: {', '.join(devices())}\n"
              f'impl="auto" takes the one marked *; any other is taken when asked for by name, or says why not.\n'
              f"Behind each that could run: its operators, with their versions, and the package that it wraps.\n\n")
    for answer in rows():
        mark = "*" if answer.chosen else " "
        fact = answer.reason or answer.version or "could run"
        out.write(f"{answer.operator:<23} {answer.device:<5} {mark} {answer.impl:<24} {fact}".rstrip() + "\n")
