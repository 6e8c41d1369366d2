"""What DeepSpeed cannot do is refused with the reason; masked_softmax checks what it is given."""

from __future__ import annotations

import pytest
import torch
from fnattn_kernels import deepspeed
from fnattn_kernels.contracts import KernelUnavailable

from fnattn import ops


@pytest.mark.parametrize("versions, reason", [
    ({}, "DeepSpeed is not installed"),
    ({"deepspeed": "0.19.8", "triton": "3.7.1"}, "removed its sparse attention in 0.19.7, and 0.19.8 is installed"),
    ({"deepspeed": "0.20.0"}, "and 0.20.0 is installed"),
    ({"deepspeed": "0.19.6", "triton": "3.7.1"}, "triton 1.0.0 exactly, got 3.7.1"),
    ({"deepspeed": "0.19.6"}, "triton 1.0.0 exactly, got none"),
    ({"deepspeed": "0.19.6", "triton": "1.0.0"}, "torch before 2.0"),
])
def test_deepspeeds_sparse_attention_is_refused_with_the_reason(versions, reason, monkeypatch):
    monkeypatch.setattr(deepspeed, "_version", versions.get)
    q = torch.ones(1, 1, 4, 2)
    layout = torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(KernelUnavailable, match=reason):
        ops.block_sparse_attention(q, q, q, layout, block=2, impl="deepspeed")


def test_masked_softmax_without_a_gpu_says_so():
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu"):
        ops.masked_softmax(torch.zeros(2, 3), impl="deepspeed")


@pytest.mark.parametrize("scores, mask, error, text", [
    (torch.zeros(2, 3, dtype=torch.int64), None, TypeError, "scores must be a floating point tensor; got torch.int64"),
    (torch.zeros(()), None, ValueError, r"scores must be \[..., m\]; got \[\]"),
    (torch.zeros(2, 3), torch.ones(2, 3), TypeError, "mask must be a bool tensor, True = allowed; got torch.float32"),
    (torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), ValueError, r"broadcastable to scores \[2, 3\]; got \[2\]"),
])
def test_mistakes_are_named(scores, mask, error, text):
    with pytest.raises(error, match="^masked_softmax: .*" + text):
        ops.masked_softmax(scores, mask)
