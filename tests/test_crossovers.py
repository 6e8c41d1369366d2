"""The table of what impl="auto" takes: complete, and the only place that decides."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from fnattn_kernels import crossovers

from fnattn import ops
from fnattn.ops._door import choose, worthwhile
from fnattn.ops.report import CASES

ROWS = {(row.operator, row.kernel): row for row in crossovers.TABLE}
KERNELS = [(name, kernel) for name, case in CASES.items() for kernel in importlib.import_module(f"fnattn.ops.{case.module}").KERNELS]


@pytest.mark.parametrize("operator, kernel", KERNELS, ids=lambda x: getattr(x, "name", x))
def test_every_kernel_has_a_row_and_no_threshold_elsewhere(operator, kernel):
    row = ROWS[operator, kernel.name]
    assert row.measured and "{" not in row.rule
    conditional = row.takes not in (crossovers.ALWAYS, crossovers.NEVER)
    assert conditional == (kernel.worth is not None)
    if not conditional:
        assert worthwhile(operator, kernel) == (row.takes == crossovers.ALWAYS)
    elif row.limits:
        assert not any(c.isdigit() for line in inspect.getsource(kernel.worth).splitlines() for c in line.replace("shape[2]", ""))


def test_no_two_rows_say_different_things():
    assert len(ROWS) == len(crossovers.TABLE)
    assert {operator for operator, _ in ROWS} == set(CASES)


def test_a_threshold_decides(monkeypatch):
    q = torch.zeros(1, 1, 1024, 2)
    layout = torch.eye(64, dtype=torch.bool)[None]
    kernels = [k for name, k in KERNELS if name == "block_sparse_attention" and k.name != "native"]
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, layout).name == "gather"
    assert choose("block_sparse_attention", "auto", kernels, q[:, :, :1023], q, q, layout) is None
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, torch.ones_like(layout)) is None
    monkeypatch.setitem(crossovers.limits("block_sparse_attention", "gather"), "length", 2048)
    assert choose("block_sparse_attention", "auto", kernels, q, q, q, layout) is None


def test_what_the_table_forbids_is_still_there_by_name():
    x = torch.ones(1, 1, 3, 2)
    freqs = torch.ones(1)
    pytest.importorskip("rotary_embedding_torch")
    out = ops.rotary(x, torch.arange(3), freqs, impl="rotary_embedding_torch")
    torch.testing.assert_close(out, ops.rotary(x, torch.arange(3), freqs))
