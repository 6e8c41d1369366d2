"""What of DeepSpeed can serve an attention today: the row softmax of its inference kernels, which Triton compiles.

That kernel takes contiguous rows, sums in float32 and has no derivatives. Its own mask is not used: it subtracts the largest
score before it masks, so a masked score far above the others makes the row NaN, as does a row without any entry. Entries
that are not there are -infinity here, and rows without entries are set apart. Measured: not yet on a GPU.

DeepSpeed's block-sparse attention is gone, and never ran on a torch that this library runs on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import torch
from torch import Tensor

from .contracts import KernelUnavailable, Operator
from .triton import missing as triton_missing

COLUMNS = 131072     # a row is held by one block
ELEMENTS = 1 << 31   # the kernel counts them in 32 bits


@functools.cache
def _package():
    """The function, or the reason why it cannot be imported."""
    try:
        return importlib.import_module("deepspeed.ops.transformer.inference.triton.softmax").softmax, None
    except Exception as error:  # importing DeepSpeed looks for accelerators and compilers: much can go wrong
        text = " ".join(str(error).split())[:200]
        return None, f"DeepSpeed's softmax cannot be imported ({type(error).__name__}: {text}); pip install deepspeed==0.19.8 triton"


def missing(device: str) -> str | None:
    """None if DeepSpeed's softmax and Triton can run on this kind of device here, else the reason."""
    return triton_missing(device) or _package()[1]


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def sparse_missing() -> str:
    """Why DeepSpeed's block-sparse attention cannot run here."""
    deepspeed, triton = _version("deepspeed"), _version("triton")
    if deepspeed is None:
        return "DeepSpeed is not installed; its sparse attention was removed in 0.19.7, and ran on triton 1.0.0 and torch before 2.0 only"
    if tuple(int(part) for part in deepspeed.split(".")[:3] if part.isdigit()) > (0, 19, 6):
        return f"DeepSpeed removed its sparse attention in 0.19.7, and {deepspeed} is installed; its layouts are in fnattn.ops.layouts"
    if triton != "1.0.0":
        return f"DeepSpeed's sparse attention needs triton 1.0.0 exactly, got {triton or 'none'}"
    return f"DeepSpeed's sparse attention needs torch before 2.0, got {torch.__version__}"


# Tracers call these with constants and must take the answers as such.
missing._dynamo_marked_constant = True
sparse_missing._dynamo_marked_constant = True


def why_not(scores: Tensor) -> str | None:
    """None if the kernel can serve these scores, else the reason."""
    if not scores.is_floating_point():
        return f"needs floating point, got {scores.dtype}"
    if scores.dtype == torch.float64:
        return "computes in float32 only, got float64"
    if scores.shape[-1] > COLUMNS:
        return f"needs rows of at most {COLUMNS}, got {scores.shape[-1]}"
    return missing(scores.device.type)


def _softmax(x: Tensor) -> Tensor:
    reason = why_not(x)
    if reason is None and (x.dtype != torch.float32 or x.numel() >= ELEMENTS):
        reason = f"needs fewer than 2^31 numbers in float32, got {list(x.shape)} in {x.dtype}"
    if reason is not None:
        raise KernelUnavailable(f"masked_softmax, deepspeed: {reason}")
    if x.numel() == 0:
        return torch.empty_like(x)
    empty = (x == -torch.inf).all(-1, keepdim=True)
    with torch.cuda.device_of(x):
        y = _package()[0](x.masked_fill(empty, 0.0).contiguous())
    return y.masked_fill_(empty, 0.0)


# x [rows, n], -infinity for entries that are not there -> softmax of each row, 0 for rows without entries.
softmax = Operator("masked_softmax_deepspeed", 1, "(Tensor x) -> Tensor", cpu=_softmax, cuda=_softmax,
                   fake=lambda x: x.new_empty(x.shape))
softmax.flops(lambda x, **_: 4 * x[0] * x[1])  # the largest taken off, exponential, sum, quotient
