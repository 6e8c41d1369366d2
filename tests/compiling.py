"""Triton's kernels compiled for a GPU that need not be here: what the tests of their compilation share."""

from __future__ import annotations

import pytest
from fnattn_kernels.triton import lang

needs_triton = pytest.mark.skipif(lang.PROBLEM is not None, reason=f"Triton: {lang.PROBLEM}")
compiles = pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")

# Shared memory of one block: 99 KiB is what small GPUs of compute capability 8.6 and 8.9 have.
SHARED = 99 * 1024


def compiled(device, name, pointers, integers, constants, floats=(), dtype="fp32", masks=(), lists=()):
    """The named kernel, compiled; its shared memory is checked."""
    kernel, constants = getattr(device, name), dict(constants)
    warps = constants.pop("num_warps", 4)
    kinds = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    kinds |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(masks, "*u8") | dict.fromkeys(lists, "*i32")
    found = lang.compiled_for(kernel, {name: kinds[name] for name in kernel.arg_names}, constants, warps=warps)
    assert found.metadata.shared <= SHARED
    return found
