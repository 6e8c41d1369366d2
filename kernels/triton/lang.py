"""Triton, or the reason why it is not here."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl

    PROBLEM = None
    # Triton's own functions were made for the interpreter or the compiler when it was imported; ours are made now.
    INTERPRETED = bool(triton.knobs.runtime.interpret) and not isinstance(tl.sum, triton.JITFunction)
    jit = triton.jit
except Exception as error:  # not installed, or made for another machine: device code can then be read, not run
    triton = tl = None
    PROBLEM = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    INTERPRETED = False

    def jit(fn):
        """fn itself."""
        return fn

# Of the matrix units: "ieee" multiplies float32 as it is; "tf32" would round it to 10 bits first.
PRECISION = "ieee"


def accumulator(dtype: torch.dtype):
    """The dtype that sums run in, as Triton calls it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def compiled_for(kernel, signature: dict[str, str], constants: dict, capability: int = 90, warps: int = 4):
    """The kernel compiled for an NVIDIA GPU that need not be here; for tests.

    signature: Triton's type of each argument, "*fp32", "i32", "constexpr" and so on; constants: the values of the last kind.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
