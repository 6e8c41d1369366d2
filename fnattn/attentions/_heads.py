"""What every attention shares: projections, heads, norms, token shift, gradient scaling, initial values."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import random
from ..ops._door import REFERENCE
from ..ops.linear import unchecked as _linear
from ..ops.rms_norm import unchecked as _rms_norm

# b batch, h heads, n positions, d width of one head


def linear_init(params_key: Tensor, name: str, out_features: int, in_features: int, *, dtype: torch.dtype,
                device: object = None) -> Tensor:
    """A weight [out, in] drawn as torch.nn.Linear does, uniform in +-1/sqrt(in), from the key and the parameter's name."""
    return uniform_init(params_key, name, (out_features, in_features), in_features ** -0.5, dtype=dtype, device=device)


def uniform_init(params_key: Tensor, name: str, shape: tuple[int, ...], bound: float, *, dtype: torch.dtype,
                 device: object = None) -> Tensor:
    """Uniform in [-bound, bound), from the key and the parameter's name: adding a parameter changes no other."""
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    drawn = random.uniform(random.fold_in(params_key, name), shape, torch.float64 if dtype == torch.float64 else torch.float32,
                           -bound, bound)
    return drawn.to(dtype=dtype, device=device)


def ones_init(shape: tuple[int, ...], *, dtype: torch.dtype, device: object = None) -> Tensor:
    """Ones: the scale of a norm."""
    return torch.ones(shape, dtype=dtype, device=device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """x weight^T + bias; plain torch where that is asked for, else as `ops.linear` chooses. impl names kernels of an attention."""
    return _linear(x, weight, bias, impl if impl == REFERENCE else "auto")


def rms_norm(x: Tensor, gamma: Tensor, impl: str = "auto") -> Tensor:
    """gamma times x by its root mean square; plain torch where that is asked for, else as `ops.rms_norm` chooses."""
    return _rms_norm(x, gamma, impl if impl == REFERENCE else "auto")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, n, h d] -> [b, h, n, d]."""
    b, n, width = x.shape
    return x.view(b, n, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[b, h, n, d] -> [b, n, h d]."""
    return x.transpose(1, 2).flatten(2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis, eps 1e-5, biased variance.

    Not F.layer_norm: in torch 2.13 the derivative of vmap(grad) through it is silently wrong, and with it hessian.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (normed * weight + bias).to(x.dtype)


def shift_tokens(x: Tensor, last: Tensor | None = None) -> Tensor:
    """Delays the second half of the channels by one position; `last` [b, 1, dim] is what came before x, else zeros.

    The first half keeps ceil(dim / 2) channels.
    """
    stay = (x.shape[-1] + 1) // 2
    before = x.new_zeros(x.shape[0], 1, x.shape[-1]) if last is None else last.to(x.dtype)
    delayed = torch.cat((before, x), 1).narrow(1, 0, x.shape[1])
    return torch.cat((x[..., :stay], delayed[..., stay:]), -1)


def scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """x, with every derivative through it multiplied by `fraction`; not the gradient of any function unless that is 1."""
    return x if fraction == 1.0 else x * fraction + x.detach() * (1.0 - fraction)


def dropout(dropout_key: Tensor | None, name: str, x: Tensor, p: float) -> Tensor:
    """Zeroes entries with probability p and scales the others by 1 / (1 - p); x itself without a key or with p = 0."""
    if dropout_key is None or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    kept = random.bernoulli(random.fold_in(dropout_key, name), 1.0 - p, tuple(x.shape))
    return torch.where(kept, x / (1.0 - p), torch.zeros_like(x))
