"""A feed-forward whose hidden layer is a soft choice of k of its units, instead of a GELU.

    out = w_out y + b_out        y = coor_descent(w_in layer_norm(x) + b_in, k) in [0, 1]

Source: FeedForward of coordinate-descent-attention 0.0.11, whose coordinate-descent branch cannot run there (a misspelt name).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, taps
from ..attentions._heads import layer_norm, linear_init, ones_init, uniform_init
from ..core import check, check_input, config
from ..ops._door import only_plain

# b batch, n positions, hidden = int(dim * mult)


@config
class CoorDescent:
    """The choice as an activation: what a feed-forward may have in place of a GELU.

    iters, eps, eps_init, eps_decay, solver: of `ops.coor_descent`.
    sparsity_k: how many hidden units are on; None: a tenth of them.
    """

    iters: int = 20
    sparsity_k: float | None = None
    eps: float = 0.1
    eps_init: float | None = 4.0
    eps_decay: float = 0.7
    solver: str = "iterate"


def activate(cfg: CoorDescent, hidden: Tensor, impl: str = "auto") -> Tensor:
    """About k of the entries of the last axis of `hidden` near 1, the others near 0."""
    k = hidden.shape[-1] // 10 if cfg.sparsity_k is None else cfg.sparsity_k
    check(k > 0, "feedforward_coor_descent: sparsity_k must be above 0; got {} for {} hidden units.", k, hidden.shape[-1],
          remedy="Give sparsity_k; the default is a tenth of the hidden units, rounded down.")
    return ops.coor_descent(hidden, k, eps=cfg.eps, eps_init=cfg.eps_init, eps_decay=cfg.eps_decay, n_iters=cfg.iters,
                            solver=cfg.solver, impl=impl)


@config
class Config:
    """Options of the feed-forward.

    dim:        width of x.
    mult:       the hidden layer has int(dim * mult) units.
    use_coor_descent: choose hidden units by coordinate descent; else GELU, and the options that follow do nothing.
    coor_descent_sparsity_k: how many units are on; None: a tenth of them.
    coor_descent_iters, coor_descent_eps, coor_descent_eps_init, coor_descent_eps_decay, solver: of `ops.coor_descent`.
    """

    dim: int
    mult: float = 4
    use_coor_descent: bool = False
    coor_descent_iters: int = 20
    coor_descent_sparsity_k: float | None = None
    coor_descent_eps: float = 0.1
    coor_descent_eps_init: float | None = 4.0
    coor_descent_eps_decay: float = 0.7
    solver: str = "iterate"

    def __post_init__(self):
        check(self.dim >= 1 and self.hidden >= 1, "feedforward_coor_descent.Config: dim and dim * mult must be at least 1; "
              "got dim={}, mult={}.", self.dim, self.mult, remedy="Give a positive width.")

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return int(self.dim * self.mult)

    @property
    def activation(self) -> CoorDescent:
        """The choice of hidden units by itself."""
        return CoorDescent(iters=self.coor_descent_iters, sparsity_k=self.coor_descent_sparsity_k, eps=self.coor_descent_eps,
                           eps_init=self.coor_descent_eps_init, eps_decay=self.coor_descent_eps_decay, solver=self.solver)


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    norm: Tensor       # [dim]
    norm_bias: Tensor  # [dim]
    w_in: Tensor       # [hidden, dim]
    b_in: Tensor       # [hidden]
    w_out: Tensor      # [dim, hidden]
    b_out: Tensor      # [dim]


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name: uniform in +-1/sqrt(fan in), norm 1 and 0."""
    kind = {"dtype": dtype, "device": device}
    return Params(
        cfg,
        norm=ones_init((cfg.dim,), **kind),
        norm_bias=torch.zeros(cfg.dim, **kind),
        w_in=linear_init(params_key, "w_in", cfg.hidden, cfg.dim, **kind),
        b_in=uniform_init(params_key, "b_in", (cfg.hidden,), cfg.dim ** -0.5, **kind),
        w_out=linear_init(params_key, "w_out", cfg.dim, cfg.hidden, **kind),
        b_out=uniform_init(params_key, "b_out", (cfg.dim,), cfg.hidden ** -0.5, **kind))


def apply(params: Params, x: Tensor, *, impl: str = "auto") -> Tensor:
    """[b, n, dim] -> [b, n, dim], each position by itself. There is no residual inside.

    impl is passed to `ops.coor_descent`; without use_coor_descent all is plain torch.
    """
    cfg = params.cfg
    check_input("feedforward_coor_descent.apply", x, cfg.dim)
    hidden = F.linear(layer_norm(x, params.norm, params.norm_bias), params.w_in, params.b_in)
    if cfg.use_coor_descent:
        hidden = activate(cfg.activation, hidden, impl)
    else:
        only_plain("feedforward_coor_descent.apply", impl, "without use_coor_descent there is a GELU, in plain torch")
        hidden = F.gelu(hidden)
    return F.linear(taps.tap("hidden", hidden), params.w_out, params.b_out)
