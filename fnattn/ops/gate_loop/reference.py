"""The complex gated loop in plain torch and real arithmetic: the gate, the chunked form, and one channel per head.

Complex numbers are pairs (re, im) in a last axis of 2. Inside a chunk, with p_t the product of the gates from the chunk's
start up to t, the decay from s to t is Re(p_t / p_s). Gates are at least 1/2 in size, so 1 / p_s stays below 2^64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scan import before, complex_times
from ..scan import reference as scan_reference

# b batch, h heads, n positions, d width of q and k, e width of v, c chunks, m positions of one chunk
CHUNK = 64
# |a| below this counts as zero: the phase of such a number has a derivative that float32 cannot hold.
ZERO = 2.0**-100


def polar(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Length m [...], direction a / m [..., 2], 1 / m, and where a is zero (m = 1/m = 0, direction 1) of pairs a [..., 2].

    No derivative of any order becomes nan at zero: nothing there depends on a.
    """
    largest = a.detach().abs().amax(-1, keepdim=True)
    zero = largest < ZERO
    one = torch.ones_like(largest)
    # Squares of tiny and of huge numbers leave float32's range; powers of two do not round.
    scale = torch.where(largest < 2.0**-40, one * 2.0**80, torch.where(largest > 2.0**40, one * 2.0**-80, one))
    if a.dtype == torch.float64:
        scale = torch.where(largest > 2.0**400, one * 2.0**-600, scale)
    x = torch.where(zero, torch.tensor([1.0, 0.0], dtype=a.dtype, device=a.device), a * scale)
    length = x.square().sum(-1, keepdim=True).sqrt()
    m = torch.where(zero, torch.zeros_like(length), length / scale)
    inverse = torch.where(zero, torch.zeros_like(length), scale / length)
    return m.squeeze(-1), x / length, inverse.squeeze(-1), zero.squeeze(-1)


def gate(a: Tensor) -> Tensor:
    """alpha = sigmoid(|a|) e^{i arg a} for pairs a [..., 2], without an angle; at a = 0 it is 1/2 with gradient 0."""
    m, direction, _, _ = polar(a)
    return torch.sigmoid(m)[..., None] * direction


def narrow(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One channel per head: q, k, v [b, n, c], a [b, n, c, 2], h0 [b, c, 2] or None -> out, last state, product of gates."""
    alpha, kv = gate(a), k * v
    if q.shape[1] == 0:
        h = torch.zeros_like(a[:, :0].sum(1)) if h0 is None else h0
        return q * kv + alpha[..., 0], h, _one(h)  # none, but derivatives find their way
    states = scan_reference(alpha, torch.stack((kv, torch.zeros_like(kv)), -1), h0, False, True)
    return q * states[..., 0], states[:, -1], product(alpha, 1)


def wide(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [b, h, n, d], v [b, h, n, e], a [b, h, n, 2], h0 [b, h, d, e, 2] or None -> out, last state, product of gates."""
    b, h, n, d = q.shape
    if h0 is None:
        h0 = q.new_zeros(b, h, d, v.shape[-1], 2)
    if n == 0 or b * h == 0:
        none = (q + k).sum(-1, keepdim=True) + a.sum(-1, keepdim=True)  # but derivatives find their way
        return none * v, h0 + k.sum(2)[..., None, None], _one(a[:, :, :0].sum(2))
    q, k, v, p = chunks(q, k, v, a)  # [b, h, c, m, ...]
    to_now, to_end = decays(p)
    intra = (q @ k.mT * to_now[0]) @ v
    after, entering = states(k, v, p, to_end, h0)
    inter = (q * p[..., :1]) @ entering[..., 0] - (q * p[..., 1:]) @ entering[..., 1]
    return (intra + inter).flatten(2, 3)[:, :, :n], after[:, :, -1], product(p[:, :, :, -1], 2)


def chunks(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v cut into chunks [b, h, c, m, ...], and the running product p of the gates inside each chunk."""
    n = q.shape[2]
    m = min(CHUNK, n)
    fill = -n % m
    q, k, v = (split(t, m, fill) for t in (q, k, v))
    alpha = gate(a)
    if fill:  # beyond the end nothing decays, and k = 0 adds nothing
        still = torch.tensor([1.0, 0.0], dtype=a.dtype, device=a.device).expand(*a.shape[:2], fill, 2)
        alpha = torch.cat((alpha, still), 2)
    alpha = alpha.unflatten(2, (-1, m))
    reach = 1
    while reach < m:
        alpha = torch.cat((alpha[..., :reach, :], complex_times(alpha[..., reach:, :], alpha[..., :-reach, :])), -2)
        reach *= 2
    return q, k, v, alpha


def split(t: Tensor, m: int, fill: int) -> Tensor:
    """t [b, h, n, ...] with `fill` zeros behind, as [b, h, c, m, ...]."""
    return F.pad(t, (0, 0, 0, fill)).unflatten(2, (-1, m))


def decays(p: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(Re, Im) of p_t / p_s for s <= t, each [..., m, m] with zeros above the diagonal; and pairs p_end / p_s [..., m, 2]."""
    half = 2.0 ** (CHUNK // 2)
    scaled = p * half  # |p| >= 2^-64, and its square must be a normal number
    inverse = torch.stack((scaled[..., 0], -scaled[..., 1]), -1) / scaled.square().sum(-1, keepdim=True) * half
    (pr, pi), (wr, wi) = p[..., None, :].unbind(-1), inverse[..., None, :, :].unbind(-1)
    to_now = (pr * wr - pi * wi).tril(), (pr * wi + pi * wr).tril()
    return to_now, complex_times(p[..., -1:, :], inverse)


def states(k: Tensor, v: Tensor, p: Tensor, to_end: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """States [b, h, c, d, e, 2] after each chunk and entering each chunk."""
    own = torch.stack([(k * to_end[..., i : i + 1]).mT @ v for i in (0, 1)], -1)
    after = over_chunks(p[:, :, :, -1], own, h0, reverse=False)
    return after, before(after, 2, h0)


def over_chunks(factor: Tensor, own: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """s_c = factor_c s_{c-1} + own_c: factor [b, h, c, 2], own [b, h, c, d, e, 2], first [b, h, d, e, 2]."""
    factor = factor[:, :, :, None, None].transpose(1, 2)
    return scan_reference(factor, own.transpose(1, 2), first, reverse, True).transpose(1, 2)


def product(t: Tensor, axis: int) -> Tensor:
    """Product of pairs [..., 2] along `axis`, by halving."""
    t = t.movedim(axis, 0)
    while t.shape[0] > 1:
        half = t.shape[0] // 2
        both = complex_times(t[:half], t[half : 2 * half])
        t = both if t.shape[0] == 2 * half else torch.cat((both, t[2 * half :]))
    return t[0]


def _one(like: Tensor) -> Tensor:
    """Pairs (1, 0) of like's shape."""
    return torch.stack((torch.ones_like(like[..., 0]), torch.zeros_like(like[..., 0])), -1)
