"""A model small enough for brute force: fewer than a hundred parameters, in float64, with every derivative by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fnattn import attentions, random, tree
from fnattn.attentions import taylor
from fnattn.inspect import ravel, unravel


class Small(NamedTuple):
    params: Any
    batch: dict
    flat: Tensor  # [P]

    @staticmethod
    def model(params, x):
        return attentions.apply(params, x, impl="reference")[0]

    def loss(self, params, batch):
        return (self.model(params, batch["x"]) - batch["y"]).square().sum((1, 2)).mean()

    def of_flat(self, flat, batch):
        new = unravel(flat, self.params)
        return self.loss(tree.combine(new, tree.partition(self.params)[1]), batch)

    def grads(self):
        """[b, P], one sample after the other."""
        rows = []
        for i in range(self.batch["x"].shape[0]):
            sample = {name: t[i:i + 1] for name, t in self.batch.items()}
            flat = self.flat.clone().requires_grad_()
            rows.append(torch.autograd.grad(self.of_flat(flat, sample), flat)[0])
        return torch.stack(rows)

    def hessian(self):
        return torch.func.hessian(self.of_flat)(self.flat, self.batch)


@pytest.fixture
def small() -> Small:
    cfg = taylor.Config(dim=3, heads=2, dim_head=2, causal=True, gate_value_heads=True)
    key = random.key(5)
    params = taylor.init(key, cfg, dtype=torch.float64)
    batch = {name: random.normal(random.fold_in(key, name), (5, 4, 3), torch.float64) for name in ("x", "y")}
    return Small(params, batch, ravel(params))
