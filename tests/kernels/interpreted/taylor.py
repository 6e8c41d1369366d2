"""taylor by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import taylor_launch as launch
from interpreted_checks import FEW, SOME, check

from fnattn.ops import taylor
from fnattn.testing import brute


@pytest.mark.parametrize("name, only", [("taylor", SOME), ("taylor, one key head, weights, earlier sums", FEW),
                                        ("taylor, not causal, mask", FEW)])
def test_every_transform_is_right(name, only):
    check(name, "triton", only)
