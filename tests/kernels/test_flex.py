"""FlexAttention as a kernel of block_sparse_attention: its mask, its value on a CPU, its refusals. It runs on CUDA alone."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels import flex
from fnattn_kernels.contracts import KernelUnavailable

from fnattn import ops, random
from fnattn.ops import _segment_kernel, _segments

# heads of the layout, block, causal, keys that are not there
CASES = [(2, 37, True, False), (1, 16, False, True), (1, 128, True, False), (1, 150, False, False), (2, 3, False, False)]


def layout(heads, blocks):
    """Random blocks, most of them there; one row of them is empty."""
    made = random.bernoulli(random.key(3), 0.8, (heads, blocks, blocks))
    made[:, blocks // 2] = False
    return made


@pytest.mark.parametrize("heads, block, causal, masked", CASES)
def test_the_mask_has_every_visible_pair_and_names_full_tiles_only_where_all_is_seen(heads, block, causal, masked):
    n = 301
    table = layout(heads, -(-n // block))[None]
    keep = random.bernoulli(random.key(5), 0.6, (2, n)) if masked else None
    seen = _segments.table(tuple(_segments.blocks(block, causal)), table, keep, n, torch.device("cpu"))
    made = flex.block_mask(table, keep, block, causal, 2, n)
    b, h, i, j = torch.meshgrid(*(torch.arange(size) for size in (2, heads, n, n)), indexing="ij")
    assert torch.equal(made.mask_mod(b, h, i, j), seen.expand(2, heads, n, n))
    tiles = torch.nn.functional.pad(seen.expand(2, heads, n, n), (0, 384 - n, 0, 384 - n)).unflatten(3, (3, 128)).unflatten(2, (3, 128))
    some, whole = tiles.any(-1).any(3), tiles.all(-1).all(3)
    partly = torch.zeros(heads, 3, 3, dtype=torch.bool)
    full = torch.zeros_like(partly)
    for found, counts, columns in ((partly, made.kv_num_blocks, made.kv_indices), (full, made.full_kv_num_blocks, made.full_kv_indices)):
        if counts is not None:
            for head in range(heads):
                for row in range(3):
                    found[head, row, columns[0, head, row, :int(counts[0, head, row])].long()] = True
    assert not (partly & full).any()
    assert not (some & ~(partly | full)).any()  # a tile with a visible pair is named
    assert masked and made.full_kv_num_blocks is None or torch.equal(full, whole[0])
    assert masked or torch.equal(partly, (some & ~whole)[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads, block, causal, masked", CASES[:2])
def test_its_value_on_a_cpu_equals_dense_attention(heads, block, causal, masked):
    q, k, v = (random.normal(key, (2, 2, 149, width), torch.float64) for key, width in zip(random.split(random.key(0), 3), (5, 5, 3)))
    table, keep = layout(heads, -(-149 // block)), random.bernoulli(random.key(5), 0.6, (2, 149)) if masked else None
    out = _segment_kernel.blocks(flex.attend, q, k, v, table, block, causal, keep, 0.7)
    expected = ops.block_sparse_attention(q, k, v, table, block=block, causal=causal, keep=keep, scale=0.7, impl="reference")
    assert_close(out, expected)
    assert (out == 0).all(-1).any() and expected.abs().max() > 0
    given = (keep, table[None], _segments.blocks(block, causal), 0.7)
    assert_close(flex.attend(q, k, v, *given)[1], _segment_kernel.NATIVE.attend(q, k, v, *given)[1])
    nothing = [t[:, :, :0] for t in (q, k, v)]
    assert _segment_kernel.blocks(flex.attend, *nothing, table[:, :0, :0], block, causal, None, 1.0).shape == (2, 2, 0, 3)


def test_on_a_cpu_it_is_refused_with_the_reason():
    q = torch.ones(1, 1, 5, 2)
    with pytest.raises(KernelUnavailable, match="impl='flex' cannot serve this call.\n  flex: needs CUDA tensors, got cpu"):
        ops.block_sparse_attention(q, q, q, torch.ones(1, 3, 3, dtype=torch.bool), block=2, impl="flex")
