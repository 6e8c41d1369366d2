"""Taylor attention by its whole table of weights, and inputs for its tests."""

from __future__ import annotations

import torch


def dense(q, k, v, keep=None, sums=None, causal=True, scale=None):
    """out and sums from the whole table of weights, in float64."""
    (_, h, _, d), g = q.shape, k.shape[1]
    q, k, v, sums = (None if t is None else t.double() for t in (q * (d**-0.5 if scale is None else scale), k, v, sums))
    i, j = torch.triu_indices(d, d)
    weights = torch.where(i == j, 0.5, 1.0).double()
    phi = torch.cat((torch.ones_like(q[..., :1]), q, q[..., i] * q[..., j]), -1)
    psi = torch.cat((torch.ones_like(k[..., :1]), k, k[..., i] * k[..., j] * weights), -1)
    one = torch.cat((v, torch.ones_like(k[..., :1])), -1)
    if keep is not None:
        one = one * keep.double()[:, None, :, None]
    every = lambda t: t.repeat_interleave(h // g, 1)  # noqa: E731
    s = q @ every(k).mT
    p = 1 + s + s**2 / 2
    acc = (p.tril() if causal else p) @ every(one)
    total = psi.mT @ one
    if sums is not None:
        acc, total = acc + phi @ every(sums), total + sums
    return acc[..., :-1] / acc[..., -1:].clamp_min(1e-5), total


def inputs(b, h, g, n, d, e, dtype=torch.float64, m=None, seed=3):
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)
                 for shape in ((b, h, n, d), (b, g, m or n, d), (b, g, m or n, e)))


def earlier(b, g, d, e, dtype=torch.float64):
    q, k, v = inputs(b, g, g, 11, d, e, dtype, seed=5)
    return dense(q, k, v)[1].to(dtype)


def weights_of(kind, b, m):
    make = torch.Generator().manual_seed(7)
    if kind == "mask":
        return torch.rand(b, m, generator=make) > 0.4
    return torch.rand(b, m, generator=make, dtype=torch.float64) if kind == "weights" else None


def with_gradients(fn, args, cotangent_seed=9):
    """Values and the gradients of the floating arguments for one cotangent per result."""
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) if a is not None else None for a in args]
    outs = fn(*leaves)
    make = torch.Generator().manual_seed(cotangent_seed)
    given = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o.dtype) for o in outs]
    return (*outs, *torch.autograd.grad(outs, [a for a in leaves if a is not None and a.requires_grad], given))
