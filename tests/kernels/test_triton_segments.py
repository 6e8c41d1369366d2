"""Triton's kernels over static lists: the lists name what they should, and the kernels compile for a GPU that need not be here."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, compiles, needs_triton
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import lang, segment_attention

from fnattn import ops, random
from fnattn.ops import _segment_tiles, _segments


def layout(heads, blocks, seed=3):
    """Random blocks; one row of them is empty."""
    made = random.bernoulli(random.key(seed), 0.5, (heads, blocks, blocks))
    made[:, blocks // 2] = False
    return made


PATTERNS = [(_segments.conv(37, 11, 5, 1, False), None), (_segments.conv(3, 7, 3, 2, True), None),
            (_segments.axial(37, 11, 0, False), None), (_segments.axial(5, 37, 1, False), None),
            (_segments.blocks(7, True), layout(2, 22)), (_segments.blocks(40, False), layout(1, 4)),
            (_segments.blocks(40, True), layout(1, 4))]


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("pattern, layout", PATTERNS, ids=lambda x: str(x) if isinstance(x, list) else "")
def test_lists_name_every_visible_pair_once_and_no_other(pattern, layout, keys):
    n = min(151, pattern[1] + pattern[2] ** 2) if layout is None else 151
    expected = _segments.table(tuple(pattern), layout, None, n, torch.device("cpu")).view(-1, n, n)
    for size in (16, 32):
        made = _segment_tiles.walk(tuple(pattern), n, None if layout is None else layout[None], size, keys, torch.device("cpu"))
        assert sorted(p for p in made.positions.flatten().tolist() if p >= 0) == list(range(n))
        runs, words = made.runs.flatten().tolist(), made.words.flatten().tolist()
        for group in range(len(expected)):
            count = torch.zeros(n, n, dtype=torch.int64)
            for positions, (first, total) in zip(made.positions.tolist(), made.tiles[group].tolist()):
                for run, word in zip(runs[first:first + total], words[first:first + total]):
                    members = [p for lane, p in enumerate(positions) if word >> lane & 1]
                    others = [j for j in range(run * made.run, (run + 1) * made.run) if j < n]
                    for i in members:
                        count[i, others] += 1
            count = count.T if keys else count
            count = count.tril() if made.causal else count
            assert torch.equal(count, expected[group].long())


@pytest.mark.parametrize("name, options", [("conv_attention", dict(text_len=3, image_size=2)),
                                           ("axial_attention", dict(text_len=3, image_size=2)),
                                           ("block_sparse_attention", dict(layout=torch.ones(1, 3, 3, dtype=torch.bool), block=2))])
def test_on_a_cpu_the_reason_says_what_is_missing(name, options):
    q = torch.ones(1, 1, 5, 2)
    if not lang.INTERPRETED:
        with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
            getattr(ops, name)(q, q, q, **options, impl="triton")


@needs_triton
@compiles
@pytest.mark.parametrize("width, causal, keep, run", [(16, True, True, 1), (64, True, False, 128), (128, True, False, 16)])
def test_every_kernel_compiles_for_a_gpu(width, causal, keep, run):
    from fnattn_kernels.triton import segment_attention_device, segment_second_device

    shape = dict(segment_attention.tiles(width, width, torch.float32), CAUSAL=causal, KEEP=keep, RUN=run,
                 ACC=lang.accumulator(torch.float32), PRECISION=lang.PRECISION)
    sizes = ("n", "d", "e", "heads", "groups", "group_b", "group_h", "free")
    given = ("g", "lse", "delta")
    moved = (*given, "tq", "tk", "tv", "tg", "tlse", "tdelta")
    for device, name, others in ((segment_attention_device, "attend", ("out", "lse")),
                                 (segment_attention_device, "backward_queries", (*given, "dq")),
                                 (segment_attention_device, "backward_keys", (*given, "dk", "dv")),
                                 (segment_attention_device, "tangent", ("out", "lse", "tq", "tk", "tv", "tout", "tlse")),
                                 (segment_second_device, "second_queries", (*moved, "dq")),
                                 (segment_second_device, "second_keys", (*moved, "dk", "dv"))):
        compiled(device, name, ("q", "k", "v", *others), sizes, shape, floats=("scale",), masks=("keep",),
                 lists=("positions", "tiles", "runs", "words"))
