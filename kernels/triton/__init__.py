"""Operators that Triton compiles for a GPU, on plain contiguous tensors.

Each operator has two kinds of files: `<op>.py` states it and launches it, and imports torch only; `<op>_device.py` and others
that end so are what the GPU runs, and are imported at the first launch. With TRITON_INTERPRET=1 in the environment before
that, Triton interprets the kernels in Python on CPU tensors: thousands of times slower, for tests.

Every kernel widens right after it loads and sums in float32 (float64 for float64), with TF32 off. Measured: not yet on a
GPU; all of them compile for one, and are tested in the interpreter.
"""

from __future__ import annotations

import functools
import importlib
import os

from torch import Tensor

from ..contracts import KernelUnavailable


@functools.cache
def _unusable(device: str, switch: str) -> str | None:
    if device == "cpu" and switch != "1":
        return "needs CUDA tensors, got cpu (TRITON_INTERPRET=1 in the environment would interpret it)"
    if device == "meta":  # shapes alone
        return None
    if device not in ("cpu", "cuda"):
        return f"needs CUDA tensors, got {device}"
    lang = importlib.import_module(f"{__name__}.lang")
    if lang.PROBLEM is not None:
        return f"Triton cannot be imported ({lang.PROBLEM}); pip install triton"
    if device == "cpu" and not lang.INTERPRETED:
        return "Triton was imported before TRITON_INTERPRET=1 was set"
    return None


def missing(device: str) -> str | None:
    """None if Triton can run on tensors of this kind of device here, else the reason."""
    return _unusable(device, os.environ.get("TRITON_INTERPRET", "0"))


# Tracers call this with a constant and must take the answer as one.
missing._dynamo_marked_constant = True


def why_not(*tensors: Tensor | None) -> str | None:
    """None if Triton kernels can take these tensors here, else the reason."""
    for t in tensors:
        if t is not None and not t.is_floating_point():
            return f"needs floating point, got {t.dtype}"
    return next((missing(t.device.type) for t in tensors if t is not None), None)


def device_code(operator: str, *tensors: Tensor | None):
    """The module <operator>_device and what launches need from `lang`.

    Raises:
        KernelUnavailable: Triton cannot run on these tensors here.
    """
    reason = why_not(*tensors)
    if reason is not None:
        raise KernelUnavailable(f"triton kernel {operator!r}: {reason}")
    return importlib.import_module(f"{__name__}.{operator}_device"), importlib.import_module(f"{__name__}.lang")


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of 2 that is at least n and at least `least`; matrix units want 16."""
    return max(least, 1 << max(n - 1, 0).bit_length())
