"""Operators that are wrong on purpose, each in a way that popular recipes are; importable, so that compile checks can run."""

from __future__ import annotations

import torch


def plain(x, y):
    """What all of them mean to compute: cubic in x, linear in y."""
    return x * x * x * y


def looped(x, y):
    """Right."""
    return x * x * (x * y)


@torch.library.custom_op("fnattn_tests::documented", mutates_args=())
def documented(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """custom_op with register_autograd: forward mode is silently zero, torch.func reverse mode raises."""
    return x * x * x * y


documented.register_fake(lambda x, y: torch.empty_like(x))
documented.register_autograd(
    lambda ctx, g: (3 * ctx.saved_tensors[0] ** 2 * ctx.saved_tensors[1] * g, ctx.saved_tensors[0] ** 3 * g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
documented.register_vmap(lambda info, dims, x, y: (
    documented(*[t.unsqueeze(0).expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                 for t, d in zip((x, y), dims)]), 0))


class _OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * x * x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return 3 * x * x * y * g, x * x * x * g


def old_style(x, y):
    """autograd.Function without setup_context: plain autograd works, torch.func does not."""
    return _OldStyle.apply(x, y)


class _SignError(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, order):
        return x * x * x * y if order == 0 else 3 * x * x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.order = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        if ctx.order == 0:
            return _SignError.apply(x, y, 1) * g, x * x * x * g, None
        return -6 * x * y * g, 3 * x * x * g, None  # the sign is wrong


def sign_error(x, y):
    """First derivatives right, second derivatives of the wrong sign."""
    return _SignError.apply(x, y, 0)


class _OneEntry(_SignError):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        if ctx.order == 0:
            return _OneEntry.apply(x, y, 1) * g, x * x * x * g, None
        last = torch.zeros_like(x)
        last[-1, -1] = 1.0
        return (6 + 0.3 * last) * x * y * g, 3 * x * x * g, None


def one_entry(x, y):
    """One second derivative, with respect to the last entry of x, is a twentieth too large."""
    return _OneEntry.apply(x, y, 0)


def detached(x, y):
    """Loses the derivative with respect to y."""
    return x * x * x * y.detach()
