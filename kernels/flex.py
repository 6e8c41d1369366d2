"""torch's FlexAttention as a kernel of block-sparse attention: the value on CUDA, from a BlockMask made of the layout.

FlexAttention is right where it is compiled for a GPU and asked for a value. Its own derivatives are not used: it has no forward
mode and no second derivatives, fails under torch.func, and on a CPU has no backward. Other traps, each closed here:

- Called plainly it makes a table of all scores: here it is compiled, whole, so that what cannot be compiled is an error.
- `BlockMask.from_kv_blocks` names blocks, but without a compiler those names are ignored: the mask says the same once more.
- A block that is named full is not masked at all: none is where keys may be missing, nor at the ragged end.
- Its products follow torch's global TF32 setting: here they are exact in float32.
- Widths that are no power of 2, or below 16, are filled up with zeros.
- A row that sees nothing has a log-sum-exp of -infinity: here 0, as in the other kernels.

It has not been run on a GPU; tested are the mask, and the value on a CPU.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from .contracts import KernelUnavailable, Operator
from .native.segment_attention import _flops as pair_flops
from .triton import power_of_2
from .triton.segment_attention import why_not as triton_why_not

# b batch, h heads, n positions, nb blocks of a layout, t tiles of TILE positions, r blocks that a tile touches
TILE = 128  # positions of a block of the BlockMask: FlexAttention's own tiles have to divide it


@functools.cache
def _package():
    """FlexAttention's module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module("torch.nn.attention.flex_attention"), None
    except Exception as error:  # importing it looks for compilers
        return None, f"FlexAttention cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def missing(device: str) -> str | None:
    """None if FlexAttention can run on this kind of device, else the reason."""
    if device != "cuda":
        return f"needs CUDA tensors, got {device}: there FlexAttention has no fused kernel that gives a log-sum-exp"
    return _package()[1]


# Tracers call this with a constant and must take the answer as one.
missing._dynamo_marked_constant = True


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if FlexAttention can serve these tensors, its derivatives being those of the Triton kernels; else the reason."""
    return missing(q.device.type) or triton_why_not(q, k, v)


def _any_all(layout: Tensor, block: int, n: int) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every block of the last axis that a tile touches is there: [.., nb] -> twice [.., t]."""
    start = torch.arange(0, n, TILE, device=layout.device)
    first, last = start // block, (start + TILE - 1).clamp(max=n - 1) // block
    touched = first[:, None] + torch.arange(-(-TILE // block) + 1, device=layout.device)  # [t, r]
    inside = touched <= last[:, None]
    values = layout[..., touched.clamp(max=layout.shape[-1] - 1)]
    return (values & inside).any(-1), (values | ~inside).all(-1)


def tiles(layout: Tensor, block: int, causal: bool, n: int) -> tuple[Tensor, Tensor]:
    """Which tiles of a layout [.., nb, nb] have pairs that are seen, and which see all of theirs: twice [.., t, t]."""
    some, whole = _any_all(layout, block, n)
    some, whole = _any_all(some.mT, block, n)[0].mT, _any_all(whole.mT, block, n)[1].mT
    tile = torch.arange(some.shape[-1], device=layout.device)
    whole = whole & ((tile[:, None] + 1) * TILE <= n) & ((tile + 1) * TILE <= n)
    if causal:
        some, whole = some & (tile <= tile[:, None]), whole & (tile < tile[:, None])
    return some, whole


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's entries are there, and their columns first in order: int32 [.., t], [.., t, t]."""
    columns = (~table).to(torch.uint8).sort(dim=-1, stable=True).indices
    return table.sum(-1).int(), columns.int().contiguous()


def block_mask(layout: Tensor, keep: Tensor | None, block: int, causal: bool, b: int, n: int):
    """FlexAttention's BlockMask for a layout [b or 1, h, nb, nb] and keys keep [b, n]."""
    some, whole = tiles(layout, block, causal, n)
    shared = layout.expand(b, *layout.shape[1:])
    of = torch.arange(n, device=layout.device) // block  # a table: the compiler might take the number for a size that varies

    def seen(at_b, at_h, i, j):
        found = shared[at_b, at_h, of[i], of[j]]
        if causal:
            found = found & (j <= i)
        return found if keep is None else found & keep[at_b, j]

    full = _ordered(whole) if keep is None else (None, None)
    partly = some & ~whole if keep is None else some
    # Lists by key would serve its backward, which is not used.
    return _package()[0].BlockMask.from_kv_blocks(*_ordered(partly), *full, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=(n, n),
                                                  compute_q_blocks=False)


@functools.lru_cache(maxsize=256)
def _compiled(*shapes):
    """FlexAttention compiled for these shapes alone."""
    flex = _package()[0].flex_attention

    def call(q, k, v, mask, scale, options, aux):
        return flex(q, k, v, block_mask=mask, scale=scale, kernel_options=options, return_aux=aux)

    # Code of its own: the compiler counts how often it has compiled a piece of code, and gives up at eight.
    call.__code__ = call.__code__.replace(co_name=f"flex_attention_{'_'.join(map(str, shapes))}")
    return torch.compile(call, fullgraph=True, dynamic=False)


def _filled(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, power_of_2(t.shape[3]) - t.shape[3])).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, layout: Tensor | None, pattern: list[int],
            scale: float) -> tuple[Tensor, Tensor]:
    flex, reason = _package()
    (b, h, n, _), (_, block, causal) = q.shape, pattern
    if reason is not None or layout is None:
        raise KernelUnavailable(f"block_sparse_attention, flex: {reason or 'needs a layout'}")
    if 0 in (b, h, n):
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    with torch.no_grad(), torch.cuda.device_of(q):
        layout = layout.expand(-1, h, -1, -1)
        given = (_filled(q), _filled(k), _filled(v), block_mask(layout, keep, block, bool(causal), b, n), scale)
        aux = flex.AuxRequest(lse=True)
        if q.device.type == "cuda":
            call = _compiled(*given[0].shape, given[2].shape[3], *layout.shape, bool(causal), keep is not None, q.dtype)
            out, aux = call(*given, {"FLOAT32_PRECISION": "'ieee'"}, aux)
        else:  # for tests of what is made here: without a compiler
            out, aux = flex.flex_attention(*given[:3], block_mask=given[3], scale=scale, return_aux=aux)
    lse = aux.lse.to(q.dtype)
    return out[..., :v.shape[3]].contiguous(), lse.masked_fill(lse == -torch.inf, 0.0)


# Arguments and meaning as in native/segment_attention.py, of which pattern is that of a layout.
attend = Operator("block_sparse_flex", 1, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? layout, SymInt[] pattern, "
                  "float scale) -> (Tensor, Tensor)", cpu=_attend, cuda=_attend,
                  fake=lambda q, k, v, *_: (q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])))
attend.flops(lambda q, k, v, *_, **__: pair_flops(2, q, v))
attend.split((1, 1, 1, None, (1,)), (1, 1))
