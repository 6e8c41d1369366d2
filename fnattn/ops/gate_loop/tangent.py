"""Tangents of the complex gated loop, written out in plain torch: what the fused C kernel computes, made differentiable.

With lambda_t the tangent of log alpha_t and l_t its sum from the chunk's start, the decay D_ts = p_t / p_s has the tangent
D_ts (l_t - l_s); everything else is linear in each of q, k, v and the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fnattn_kernels.native import scan as native_scan
from torch import Tensor

from ..scan import before, complex_times, conjugate
from .backward import to_raw
from .reference import chunks, decays, gate, over_chunks, polar, split, states
from .reference import product as product_of


def log_gate(a: Tensor, ta: Tensor) -> Tensor:
    """Tangent (of log |alpha|, of arg alpha) for pairs a [..., 2] with tangent ta."""
    m, direction, inverse, zero = polar(a)
    (x, y), (tx, ty) = direction.unbind(-1), ta.unbind(-1)
    along = torch.where(zero, torch.zeros_like(m), torch.sigmoid(-m) * (x * tx + y * ty))
    return torch.stack((along, inverse * (x * ty - y * tx)), -1)


def narrow(q, k, v, a, h0, tq, tk, tv, ta, th0, scan: Callable = native_scan.scan) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of out, last state and log of the product, one channel per head. Shapes as in reference.narrow."""
    tq, tk, tv, ta = (torch.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv), (a, ta)))
    alpha, change, kv = gate(a), log_gate(a, ta), k * v

    def run(x: Tensor, start: Tensor | None) -> Tensor:
        return scan(alpha, x, start, False, True, False, False)

    h = run(torch.stack((kv, torch.zeros_like(kv)), -1), h0)
    push = torch.stack((tk * v + k * tv, torch.zeros_like(kv)), -1)
    th = run(push + complex_times(complex_times(alpha, change), before(h, 1, h0)), th0)
    return q * th[..., 0] + tq * h[..., 0], th[:, -1], change.sum(1)


def to_raw_tangent(a: Tensor, ta: Tensor, logs: Tensor, t_logs: Tensor) -> Tensor:
    """Tangent of backward.to_raw(a, logs) [..., 2]: a' moves the length m and turns the direction u."""
    m, direction, inverse, zero = polar(a)
    away = (direction * ta).sum(-1)
    size = torch.sigmoid(m)
    slow, across = torch.where(zero, torch.zeros_like(m), 1 - size), inverse * logs[..., 1]
    t_along = slow * (t_logs[..., 0] - size * away * logs[..., 0])
    t_across = inverse * (t_logs[..., 1] - away * across)
    turned = complex_times(direction, torch.stack((t_along, t_across), -1))
    raw = to_raw(a, logs[..., 0], logs[..., 1])
    angle = log_gate(a, ta)[..., 1]
    return turned + torch.stack((-raw[..., 1] * angle, raw[..., 0] * angle), -1)


def narrow_backward(q, k, v, a, h0, g, g_state, g_product, tq, tk, tv, ta, th0, tg, tg_state,
                    tg_product) -> tuple[Tensor, ...]:
    """Tangents of the gradients that backward.narrow gives; no argument is None."""
    alpha, change, kv, none = gate(a), log_gate(a, ta), k * v, torch.zeros_like(q)
    t_kv = tk * v + k * tv

    def run(x: Tensor, start: Tensor | None, reverse: bool = False) -> Tensor:
        return native_scan.scan(alpha, x, start, reverse, True, reverse, reverse)

    def at_end(x: Tensor, end: Tensor) -> Tensor:
        return torch.cat((x[:, :-1], (x[:, -1] + end)[:, None]), 1)

    h = run(torch.stack((kv, none), -1), h0)
    moved = complex_times(alpha, before(h, 1, h0))  # what each step carries over
    th = run(torch.stack((t_kv, none), -1) + complex_times(change, moved), th0)
    total = run(at_end(torch.stack((q * g, none), -1), g_state), None, True)
    sent = complex_times(conjugate(alpha), total)
    later = before(complex_times(conjugate(change), sent), 1, None, True)
    t_total = run(at_end(torch.stack((tq * g + q * tg, none), -1), tg_state) + later, None, True)
    t_sent = complex_times(conjugate(alpha), t_total) + complex_times(conjugate(change), sent)

    whole = product_of(alpha, 1)
    t_whole = complex_times(whole, change.sum(1))
    t_moved = th - torch.stack((t_kv, none), -1)
    logs = complex_times(conjugate(moved), total) + complex_times(g_product, conjugate(whole))[:, None]
    t_logs = (complex_times(conjugate(t_moved), total) + complex_times(conjugate(moved), t_total)
              + (complex_times(tg_product, conjugate(whole)) + complex_times(g_product, conjugate(t_whole)))[:, None])
    return (tg * h[..., 0] + g * th[..., 0], tv * total[..., 0] + v * t_total[..., 0],
            tk * total[..., 0] + k * t_total[..., 0], to_raw_tangent(a, ta, logs, t_logs), t_sent[:, 0])


def wide(q, k, v, a, h0, tq, tk, tv, ta, th0) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of out, last state and log of the product. Shapes as in reference.wide."""
    n, state = q.shape[2], (*q.shape[:2], q.shape[3], v.shape[3], 2)
    tq, tk, tv, ta = (torch.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv), (a, ta)))
    h0, th0 = (q.new_zeros(state) if t is None else t for t in (h0, th0))
    change = log_gate(a, ta)
    q, k, v, p = chunks(q, k, v, a)
    m = q.shape[3]
    tq, tk, tv, lams = (split(t, m, -n % m) for t in (tq, tk, tv, change))
    logs = lams.cumsum(-2)
    (re, im), z = decays(p)
    apart = logs[..., :, None, :] - logs[..., None, :, :]
    t_re = re * apart[..., 0] - im * apart[..., 1]
    tp, tz = complex_times(p, logs), complex_times(z, logs[..., -1:, :] - logs)
    after, entering = states(k, v, p, z, h0)

    def part(t: Tensor, i: int) -> Tensor:
        return t[..., i : i + 1]

    own = torch.stack([(tk * part(z, i) + k * part(tz, i)).mT @ v + (k * part(z, i)).mT @ tv for i in (0, 1)], -1)
    own = own + complex_times(tp[..., -1, None, None, :], entering)
    t_after = over_chunks(p[:, :, :, -1], own, th0, reverse=False)
    t_entering = before(t_after, 2, th0)
    scores = q @ k.mT
    out = ((tq @ k.mT + q @ tk.mT) * re + scores * t_re) @ v + (scores * re) @ tv
    out = out + (tq * part(p, 0) + q * part(tp, 0)) @ entering[..., 0] - (tq * part(p, 1) + q * part(tp, 1)) @ entering[..., 1]
    out = out + (q * part(p, 0)) @ t_entering[..., 0] - (q * part(p, 1)) @ t_entering[..., 1]
    return out.flatten(2, 3)[:, :, :n], t_after[:, :, -1], change.sum(2)


def wide_backward(q, k, v, a, h0, g, g_state, g_product, tq, tk, tv, ta, th0, tg, tg_state, tg_product) -> tuple[Tensor, ...]:
    """Tangents of the gradients that backward.wide gives; no argument is None. Names as there."""
    n, change = q.shape[2], log_gate(a, ta)
    q, k, v, p = chunks(q, k, v, a)
    m = q.shape[3]
    g, tq, tk, tv, tg, lams = (split(t, m, -n % m) for t in (g, tq, tk, tv, tg, change))
    logs = lams.cumsum(-2)
    (re, im), z = decays(p)
    apart = logs[..., :, None, :] - logs[..., None, :, :]
    t_re, t_im = (x.squeeze(-1) for x in complex_times(torch.stack((re, im), -1), apart).split(1, -1))
    tp, tz = complex_times(p, logs), complex_times(z, logs[..., -1:, :] - logs)
    end, t_end = p[:, :, :, -1], tp[:, :, :, -1, None, None]

    def outer(c, x, y):  # sum of c x y^T
        return torch.stack([(x * part).mT @ y for part in c.split(1, -1)], -1)

    def through(c, state, y):  # c (state y), pairs [..., m, d, 2]
        return complex_times(c[..., None, :], torch.stack([y @ part.squeeze(-1).mT for part in state.split(1, -1)], -1))

    def real_sum(c, x, state):  # sum over d of Re(c state) x
        return sum((x * u) @ part.squeeze(-1) for u, part in zip(c.split(1, -1), state.split(1, -1)))

    after, entering = states(k, v, p, z, h0)
    own = outer(z, tk, v) + outer(tz, k, v) + outer(z, k, tv) + complex_times(t_end, entering)
    t_after = over_chunks(end, own, th0, reverse=False)
    t_entering = before(t_after, 2, th0)
    pc, tpc, zc, tzc = (conjugate(c) for c in (p, tp, z, tz))
    r_entering = over_chunks(conjugate(end), outer(pc, q, g), g_state, reverse=True)
    r_after = before(r_entering, 2, g_state, reverse=True)
    own = outer(pc, tq, g) + outer(tpc, q, g) + outer(pc, q, tg) + complex_times(conjugate(t_end), r_after)
    tr_entering = over_chunks(conjugate(end), own, tg_state, reverse=True)
    tr_after = before(tr_entering, 2, tg_state, reverse=True)

    read, sent = through(p, entering, g), through(zc, r_after, v)
    t_read = through(tp, entering, g) + through(p, entering, tg) + through(p, t_entering, g)
    t_sent = through(tzc, r_after, v) + through(zc, r_after, tv) + through(zc, tr_after, v)
    scores, d_scores = q @ k.mT, g @ v.mT
    t_scores, td_scores = tq @ k.mT + q @ tk.mT, tg @ v.mT + g @ tv.mT
    now, td_now = d_scores * re, td_scores * re + d_scores * t_re
    dq, dk = now @ k + read[..., 0], now.mT @ q + sent[..., 0]
    tdq = td_now @ k + now @ tk + t_read[..., 0]
    tdk = td_now.mT @ q + now.mT @ tq + t_sent[..., 0]
    tdv = ((t_scores * re + scores * t_re).mT @ g + (scores * re).mT @ tg
           + real_sum(z, k, tr_after) + real_sum(z, tk, r_after) + real_sum(tz, k, r_after))

    def dot(*pairs):
        return sum((x * y).sum(-1) for x, y in pairs)

    turn = scores * d_scores * im
    t_turn = (t_scores * d_scores + scores * td_scores) * im + scores * d_scores * t_im
    size, t_size = dot((q, dq)) - dot((k, dk)), dot((tq, dq), (q, tdq)) - dot((tk, dk), (k, tdk))
    angle = turn.sum(-2) - turn.sum(-1) - dot((q, read[..., 1]), (k, sent[..., 1]))
    t_angle = t_turn.sum(-2) - t_turn.sum(-1) - dot((tq, read[..., 1]), (q, t_read[..., 1]), (tk, sent[..., 1]), (k, t_sent[..., 1]))
    whole = product_of(end, 2)
    t_whole = complex_times(whole, change.sum(2))

    def logs_of(size, angle, behind, fixed):
        sums = torch.stack((size, angle), -1).flip(-2).cumsum(-2).flip(-2) + behind.sum((-3, -2))[:, :, :, None]
        return sums.flatten(2, 3)[:, :, :n] + fixed[:, :, None]

    sums = logs_of(size, angle, complex_times(conjugate(after), r_after), complex_times(g_product, conjugate(whole)))
    t_sums = logs_of(t_size, t_angle, complex_times(conjugate(t_after), r_after) + complex_times(conjugate(after), tr_after),
                     complex_times(tg_product, conjugate(whole)) + complex_times(g_product, conjugate(t_whole)))
    return (*(t.flatten(2, 3)[:, :, :n] for t in (tdq, tdk, tdv)), to_raw_tangent(a, ta, sums, t_sums), tr_entering[:, :, 0])
