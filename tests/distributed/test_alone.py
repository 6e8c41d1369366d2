"""fnattn.distributed where there is one process, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fnattn import distributed
from fnattn.core import KernelUnavailable
from fnattn.distributed import zero

X = torch.arange(24.0).reshape(2, 3, 4)


def test_without_a_group_there_is_one_process_and_nothing_changes():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    for same in (distributed.all_gather(X, 1), distributed.reduce_scatter(X, 2), distributed.all_to_all(X, 0, 2), distributed.all_reduce(X),
                 distributed.shard(X), distributed.to_heads(X), distributed.to_positions(X), distributed.broadcast(X)):
        assert torch.equal(same, X)
    value, grads = distributed.value_and_grad(lambda t: (t["x"] ** 2).sum())({"x": X, "n": 3})
    assert value == (X ** 2).sum() and torch.equal(grads["x"], 2 * X) and grads["n"] is None


@pytest.mark.parametrize("call, kind, text", [
    (lambda: distributed.all_gather(X, 3), ValueError, "all_gather: axis must be one of the 3 axes of x; got 3.\n  Count axes from 0."),
    (lambda: distributed.all_reduce([1.0]), TypeError, "all_reduce: x must be a tensor; got list.\n  Convert it: torch.as_tensor(x)."),
    (lambda: distributed.all_to_all(X, 0, 1.0), TypeError, "all_to_all: axis must be an int; got 1.0"),
    (lambda: distributed.shard({"a": X, "b": torch.tensor(1.0)}), ValueError, "axis must be one of the 0 axes of leaf 'b'; got 0."),
    (lambda: distributed.to_heads(X[0]), ValueError, "distributed.to_heads: expected [batch, heads, seq, ...]; got [3, 4]."),
    (lambda: distributed.broadcast(X, 1), ValueError, "broadcast: source must be a process in [0, 1); got 1."),
    (lambda: distributed.engine(lambda p: p.sum(), X), ValueError, "expected a process group of torch.distributed"),
])
def test_what_cannot_be_is_refused_with_a_remedy(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value) and "\n  " in str(caught.value)


def test_a_missing_deepspeed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(KernelUnavailable, match="DeepSpeed cannot be imported.*\n.*fnattn.distributed.value_and_grad"):
        zero._package()


def test_nothing_of_torch_distributed_is_imported_before_it_is_needed():
    """A family more would appear in every table, and DTensor takes a second to import."""
    code = ("import sys, fnattn, fnattn.distributed as d; assert 'sequence' not in fnattn.attentions.FAMILIES; "
            "from fnattn.distributed import sequence; assert 'sequence' in fnattn.attentions.FAMILIES; "
            "assert 'torch.distributed.tensor' not in sys.modules and 'deepspeed' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
