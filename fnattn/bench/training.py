"""A whole step of training: loss and gradient, clipping, AdamW, new parameters; eager.

Ours is a pure function of parameters and optimiser state. Against it stand the same model written with nn.Module and
torch.optim, on the same operators or torch's own, and upstream's transformer where there is one. A row is timed after a first
step of each side has given the same loss and the same change of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, optim, random, tree
from ..attentions import full, gate_loop, taylor
from ..convert import dump
from ..models import lm
from . import upstream

# b batch, n positions

CLIP, RATE, TOKENS = 0.5, 1e-3, 256
TOLERANCE = 1e-3  # of the loss, and of the sum of all changes: Adam's first step is a sign, which rounding turns where it is near 0


class Training(NamedTuple):
    """One row: a family, the other side ("torch" or "upstream"), sizes. goal: the least ratio theirs / ours."""

    name: str
    family: str
    peer: str
    sizes: dict[str, int]
    quick: dict[str, int]
    goal: float = 1.0


class Sides(NamedTuple):
    """Functions of nothing that take a step and return its loss; each also tells its parameters, in our order."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    our_params: Callable[[], list[Tensor]]
    their_params: Callable[[], list[Tensor]]


def config(family: str, s: dict) -> lm.Config:
    """A language model over bytes."""
    dim, heads = s["dim"], s["h"]
    attention: Any = {
        "taylor": lambda: taylor.Config(dim=dim, heads=heads, dim_head=16, causal=True),
        "gate_loop": lambda: gate_loop.Config(dim=dim),
        "full": lambda: full.Config(dim=dim, seq_len=s["n"], heads=heads, dim_head=dim // heads),
    }[family]()
    return lm.Config(attention=attention, depth=s["depth"], num_tokens=TOKENS)


# ------------------------------------------------------------------------------------------------ the same with nn.Module


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Taylor(nn.Module):
    """Taylor attention on this library's operator."""

    def __init__(self, cfg: taylor.Config):
        super().__init__()
        self.heads, inner = cfg.heads, cfg.heads * cfg.dim_head
        self.to_q, self.to_kv = nn.Linear(cfg.dim, inner, bias=False), nn.Linear(cfg.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, dim] -> [b, n, dim]"""
        q, k, v = (_heads(t, self.heads) for t in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        return self.to_out(ops.taylor(q, k, v)[0].transpose(1, 2).flatten(2))


class GateLoop(nn.Module):
    """GateLoop on this library's operator."""

    def __init__(self, cfg: gate_loop.Config):
        super().__init__()
        self.heads, self.fraction = cfg.head_count, cfg.frac_gradient_state_transition
        self.to_qkv, self.to_a = nn.Linear(cfg.dim, 3 * cfg.inner, bias=False), nn.Linear(cfg.dim, 2 * self.heads)
        self.to_gates, self.to_out = nn.Linear(cfg.dim, cfg.inner, bias=False), nn.Linear(cfg.inner, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, dim] -> [b, n, dim]"""
        q, k, v = (_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, -1))
        a = self.to_a(x).unflatten(-1, (self.heads, 2)).transpose(1, 2)
        a = a * self.fraction + a.detach() * (1 - self.fraction)
        out = ops.gate_loop(q, k, v, a)[0].transpose(1, 2).flatten(2)
        return self.to_out(F.silu(self.to_gates(x)) * out)


class Full(nn.Module):
    """Softmax attention on torch's operator."""

    def __init__(self, cfg: full.Config):
        super().__init__()
        self.heads, inner = cfg.heads, cfg.heads * cfg.dim_head
        self.to_qkv, self.to_out = nn.Linear(cfg.dim, 3 * inner, bias=False), nn.Linear(inner, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, dim] -> [b, n, dim]"""
        q, k, v = (_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


MODULES = {taylor.Config: Taylor, gate_loop.Config: GateLoop, full.Config: Full}


class Block(nn.Module):
    """Pre-norm attention and feed-forward; parameters in the order of ours."""

    def __init__(self, cfg: lm.Config):
        super().__init__()
        hidden = int(cfg.dim * cfg.ff_mult)
        self.attn_norm, self.attn = nn.RMSNorm(cfg.dim), MODULES[type(cfg.attention)](cfg.attention)
        self.ff_norm = nn.RMSNorm(cfg.dim)
        self.ff = nn.Sequential(nn.Linear(cfg.dim, hidden), nn.GELU(), nn.Linear(hidden, cfg.dim))

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, dim] -> [b, n, dim]"""
        x = x + self.attn(self.attn_norm(x))
        return x + self.ff(self.ff_norm(x))


class Model(nn.Module):
    """models.lm as one would write it with torch.nn."""

    def __init__(self, cfg: lm.Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.num_tokens, cfg.dim)
        self.blocks = nn.Sequential(*(Block(cfg) for _ in range(cfg.depth)))
        self.norm, self.to_logits = nn.RMSNorm(cfg.dim), nn.Linear(cfg.dim, cfg.num_tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean of -log p of each token after the first: [b, n] -> []"""
        scores = self.to_logits(self.norm(self.blocks(self.embed(ids[:, :-1]))))
        return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------ steps


def build(case: Training, s: dict, device: torch.device) -> Sides:
    """Both sides with the same parameters and data.

    Raises:
        upstream.Missing: the other side is a package that is not there.
    """
    cfg = config(case.family, s)
    params = lm.init(random.key(0), cfg, device=device)
    ids = random.randint(random.key(1, device=device), (s["b"], s["n"]), 0, TOKENS)
    optimizer = optim.chain(optim.clip_by_global_norm(CLIP), optim.adamw(RATE))
    at: list[Any] = [params, optimizer.init(params)]

    def ours() -> Tensor:
        loss, grads = tree.value_and_grad(lm.loss)(at[0], ids)
        updates, at[1] = optimizer.update(grads, at[1], at[0])
        at[0] = optim.apply_updates(at[0], updates)
        return loss

    if case.peer == "torch":
        made: nn.Module = Model(cfg).to(device)
        with torch.no_grad():
            for mine, their in zip(tree.leaves(params), made.parameters(), strict=True):
                their.copy_(mine)
        theirs, listed = _step(made, lambda: made(ids)), lambda: list(made.parameters())
        return Sides(ours, theirs, lambda: tree.leaves(at[0]), listed)
    made = upstream.module("gateloop_transformer").Transformer(s["dim"], num_tokens=TOKENS, depth=s["depth"])
    upstream.layer(made, params)
    return Sides(ours, _step(made, lambda: made(ids, return_loss=True)), lambda: [dump(at[0])[n] for n in _names(made)],
                 lambda: [dict(made.named_parameters())[n] for n in _names(made)])


def _names(made: nn.Module) -> list[str]:
    return [name for name, _ in made.named_parameters()]


def _step(made: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def wrong(sides: Sides) -> str | None:
    """Takes a step on both sides and says how they differ; None if they do not."""
    before = [p.detach().clone() for p in sides.our_params()]
    mine, their = float(sides.ours()), float(sides.theirs())
    if not abs(mine - their) <= TOLERANCE * abs(their):
        return f"the loss is {mine:.6f}, the other side's {their:.6f}"
    moved = [(new.detach() - old).double() for new, old in zip(sides.our_params(), before, strict=True)]
    other = [(new.detach() - old).double() for new, old in zip(sides.their_params(), before, strict=True)]
    total = float(sum(t.abs().sum() for t in other))
    apart = float(sum((a - b).abs().sum() for a, b in zip(moved, other, strict=True)))
    if not 0 < total or not apart <= 10 * TOLERANCE * total:
        return f"of the parameters' change, {apart:.2e} of {total:.2e} differs"
    return None


SMALL, LARGE = {"b": 4, "n": 64, "dim": 64, "h": 4, "depth": 2}, {"b": 4, "n": 256, "dim": 256, "h": 8, "depth": 4}
QUICK = {"b": 1, "n": 16, "dim": 32, "h": 2, "depth": 1}

CASES: dict[str, Training] = {case.name: case for case in (
    *(Training(f"training {family}{' large' if sizes is LARGE else ''}", family, "torch", sizes, QUICK)
      for family in ("taylor", "gate_loop", "full") for sizes in (SMALL, LARGE)),
    *(Training(f"training {word}", "gate_loop", "upstream", sizes, QUICK)
      for word, sizes in (("transformer", SMALL), ("transformer large", LARGE))),
)}
PEERS = {"torch": "nn.Module, torch.optim", "upstream": "gateloop-transformer"}  # what the table calls the other side
