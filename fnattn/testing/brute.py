"""What each operator means, written as directly as possible: sums over all pairs, loops over time. Slow, and obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v, f features


def _heads(q: Tensor, k: Tensor) -> Tensor:
    """k with each key head repeated for the query heads that it serves."""
    return k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)


def causal_dot(q: Tensor, k: Tensor, v: Tensor, *, reverse: bool = False) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, _heads(q, k))
    return torch.einsum("bhij,bhje->bhie", scores.triu() if reverse else scores.tril(), _heads(q, v))


def scan(a: Tensor, x: Tensor, h0: Tensor | None = None, *, reverse: bool = False, pairs: bool = False) -> Tensor:
    h = torch.zeros_like(x[:, 0]) if h0 is None else h0
    hs: list = [None] * x.shape[1]
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        h = (_times(a[:, t], h) if pairs else a[:, t] * h) + x[:, t]
        hs[t] = h
    return torch.stack(hs, 1)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Complex product of (re, im) pairs."""
    return torch.stack((x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1], x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]), -1)


def features(k: Tensor) -> Tensor:
    """psi(k) = [1, k_i, w_ij k_i k_j for i <= j], w = 1/2 on the diagonal."""
    d = k.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=k.device)
    weight = torch.where(rows == columns, 0.5, 1.0).to(k.dtype)
    return torch.cat((torch.ones_like(k[..., :1]), k, weight * k[..., rows] * k[..., columns]), -1)


def taylor(q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, sums: Tensor | None = None, causal: bool = True,
           scale: float | None = None) -> tuple[Tensor, Tensor]:
    q_s = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = torch.einsum("bhid,bhjd->bhij", q_s, _heads(q, k))
    p = 1 + s + s * s / 2
    weight = k.new_ones(k.shape[0], k.shape[2]) if keep is None else keep.to(k.dtype)  # [b, m]
    p = p * weight[:, None, None, :]
    if causal:
        p = p.tril()
    above, below = torch.einsum("bhij,bhje->bhie", p, _heads(q, v)), p.sum(-1, keepdim=True)
    ones = torch.ones_like(k[..., :1])
    total = torch.einsum("bgjf,bgje->bgfe", features(k) * weight[:, None, :, None], torch.cat((v, ones), -1))
    if sums is not None:
        rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], device=q.device)
        phi = torch.cat((torch.ones_like(q_s[..., :1]), q_s, q_s[..., rows] * q_s[..., columns]), -1)
        past = torch.einsum("bhif,bhfe->bhie", phi, _heads(q, sums))
        above, below, total = above + past[..., :-1], below + past[..., -1:], total + sums
    return above / below.clamp(min=1e-5), total


def gate_loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, state: tuple[Tensor, Tensor] | None = None):
    size = a.square().sum(-1, keepdim=True).sqrt()
    alpha = size.sigmoid() * a / size  # [b, h, n, 2]
    b, h, n, d = q.shape
    memory = q.new_zeros(b, h, d, v.shape[-1], 2) if state is None else state[0]
    product = torch.stack((torch.ones_like(a[:, :, 0, 0]), torch.zeros_like(a[:, :, 0, 0])), -1) if state is None else state[1]
    outs = []
    for t in range(n):
        kv = torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        memory = _times(alpha[:, :, t, None, None], memory) + torch.stack((kv, torch.zeros_like(kv)), -1)
        product = _times(alpha[:, :, t], product)
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], memory[..., 0]))
    return torch.stack(outs, 2), (memory, product)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
                      scale: float | None = None, offset: int | Tensor | None = None) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    scores = torch.einsum("bhid,bhjd->bhij", q, _heads(q, k)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    if causal:
        first = m - n if offset is None else offset
        allowed = allowed & (torch.arange(m, device=q.device) <= first + torch.arange(n, device=q.device)[:, None])
    p = torch.where(allowed, scores.exp(), torch.zeros_like(scores))
    total = p.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhje->bhie", p / torch.where(total == 0, torch.ones_like(total), total), _heads(q, v))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, *, first: int, length: int,
                     mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    k, v = (torch.cat((x[:, :, :first], late[:, :, :length - first]), 2) for x, late in ((k, k_late), (v, v_late)))
    return softmax_attention(q, k, v, mask=mask, causal=True, scale=scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = (x[..., None, :] * weight).sum(-1)
    return out if bias is None else out + bias


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    p = scores.exp() if mask is None else torch.where(mask, scores.exp(), torch.zeros_like(scores))
    total = p.sum(-1, keepdim=True)
    return p / torch.where(total == 0, torch.ones_like(total), total)


def rotary(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    angles = positions.to(freqs.dtype)[..., None] * freqs  # [n, pairs]
    width = 2 * freqs.shape[-1]
    re, im = x[..., 0:width:2], x[..., 1:width:2]
    turned = torch.stack((re * angles.cos() - im * angles.sin(), re * angles.sin() + im * angles.cos()), -1).flatten(-2)
    return torch.cat((turned, x[..., width:]), -1)


def simple_gate_loop(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None = None, *, reverse: bool = False):
    h = scan(a.sigmoid(), kv, h0, reverse=reverse)
    return q * h, h[:, 0 if reverse else -1]


def coor_descent(s: Tensor, k: Tensor, *, eps: float = 0.1, eps_init: float | None = None, eps_decay: float = 1.0,
                 n_iters: int = 20, mask: Tensor | None = None, solver: str = "iterate") -> Tensor:
    there = torch.ones_like(s, dtype=torch.bool) if mask is None else mask
    k = torch.as_tensor(k, dtype=s.dtype, device=s.device)[..., None]
    if solver == "exact":
        return _coor_exact(s, k, eps, there)
    low = torch.full_like(s, -1e300)
    b, now = -s, max(eps_init or eps, eps)
    for _ in range(n_iters):
        a = now * (k.log() - torch.where(there, (s + b) / now, low).logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
        now = max(now * eps_decay, eps)
    return torch.where(there, ((s + a + b) / now).exp(), 0.0)


def _coor_exact(s: Tensor, k: Tensor, eps: float, there: Tensor) -> Tensor:
    """min(1, exp((s - m) / eps)) with sum k: the smallest number of capped entries for which the next one is below the cap."""
    n = s.shape[-1]
    order = torch.where(there, s, -1e300).argsort(-1, descending=True)
    rank = order.argsort(-1)
    y = there.to(s.dtype)  # as many entries as k or fewer: all are capped
    for capped in reversed(range(n)):
        rest = there & (rank >= capped)
        possible = rest.any(-1, keepdim=True) & (k > capped)
        total = torch.where(rest, s / eps, -1e300).logsumexp(-1, keepdim=True)
        m = eps * (total - (torch.where(possible, k, capped + 1.0) - capped).log())
        fits = possible & (torch.where(rest, s - m, -1.0) <= 0).all(-1, keepdim=True)
        free = torch.where(rest & fits, s - m, 0.0)
        y = torch.where(fits, torch.where(rest, (free / eps).exp(), there.to(s.dtype)), y)
    return y


def coor_descent_attention(q: Tensor, k: Tensor, v: Tensor, sparsity_k: Tensor, *, causal: bool = True, **options) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    scores = torch.einsum("bhid,bhjd->bhij", q, _heads(q, k)) * q.shape[-1] ** -0.5
    seen = torch.arange(m, device=q.device) <= m - n + torch.arange(n, device=q.device)[:, None]
    seen = (seen if causal else seen | True).expand(scores.shape)
    y = coor_descent(scores, sparsity_k.expand(scores.shape[:3]), mask=seen, **options)
    return torch.einsum("bhij,bhje->bhie", y, _heads(q, v))


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, *, block: int) -> Tensor:
    n = q.shape[2]
    mask = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n]
    return softmax_attention(q, k, v, mask=mask[None])


def _picture_mask(n: int, text_len: int, image_size: int, sees) -> Tensor:
    """Text sees its past; a pixel sees all text, and the pixels for which sees(rows back, columns back)."""
    def allowed(i: int, j: int) -> bool:
        if j > i or i < text_len or j < text_len:
            return j <= i
        (row, column), (row_j, column_j) = divmod(i - text_len, image_size), divmod(j - text_len, image_size)
        return sees(row - row_j, column - column_j)

    return torch.tensor([[allowed(i, j) for j in range(n)] for i in range(n)])


def _masked_picture(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, text_len: int, mask: Tensor | None, text_sees_all: bool,
                    scale: float | None) -> Tensor:
    allowed = allowed.to(q.device)
    if mask is not None:
        ignores = torch.arange(q.shape[2], device=q.device)[:, None] < (text_len if text_sees_all else 0)
        allowed = allowed & (mask[:, None, None, :] | ignores)
    return softmax_attention(q, k, v, mask=allowed, scale=scale)


def conv_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, text_len: int, image_size: int,
                   kernel_size: int = 5, dilation: int = 1, text_sees_all: bool = False, scale: float | None = None) -> Tensor:
    window = [i * dilation for i in range(kernel_size)]
    allowed = _picture_mask(q.shape[2], text_len, image_size, lambda row, column: row in window and column in window)
    return _masked_picture(q, k, v, allowed, text_len, mask, text_sees_all, scale)


def axial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, text_len: int, image_size: int, axis: int = 0,
                    text_sees_all: bool = False, scale: float | None = None) -> Tensor:
    allowed = _picture_mask(q.shape[2], text_len, image_size,
                            lambda row, column: (column if axis else row) == 0 and row >= 0 and column >= 0)
    return _masked_picture(q, k, v, allowed, text_len, mask, text_sees_all, scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1]).sqrt() * gamma
