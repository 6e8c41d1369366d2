"""Whole layers, projections included, and decode steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import fnattn

from .. import random
from ..attentions import coor_descent, full, gate_loop, linformer, simple_gate_loop, sparse_conv, taylor
from ..ops.conv_attention import in_window
from . import upstream, work
from .case import Case, Contest, Opponent, Work, bytes_of, floats, normal

_SCAN = "gateloop_transformer.gateloop_transformer"


def _layer(cfg: Any, make, counted: tuple[Work, Work], s: dict, device: torch.device) -> Contest:
    """Our layer on x [b, n, dim] against the upstream module that make() builds, with the same weights."""
    params = fnattn.init(random.key(0), cfg, device=device)

    def ours(params, x, impl="auto"):
        return fnattn.apply(params, x, impl=impl)[0]

    # A gradient that is scaled on purpose is so on both sides.
    x = normal("x", s["b"], s["n"], cfg.dim, device=device)
    return Contest((params, x), ours, lambda: upstream.layer(make(), params), *counted)


def _taylor(s: dict, device: torch.device) -> Contest:
    dim, h, d = s["dim"], s["h"], s["d"]
    options = {"dim": dim, "heads": h, "dim_head": d, "causal": True}

    def make():
        upstream.module("fast_transformers.causal_product")
        return upstream.module("taylor_series_linear_attention").TaylorSeriesLinearAttn(**options)

    rows = s["b"] * s["n"]
    counted = work.total(work.taylor(s["b"], h, s["n"], d, d), work.linear((rows, dim, 3 * h * d), (rows, h * d, dim)))
    return _layer(taylor.Config(**options), make, counted, s, device)


def _gate_loop(s: dict, device: torch.device) -> Contest:
    dim, h, rows = s["dim"], s["h"], s["b"] * s["n"]
    core = work.gate_loop_narrow(s["b"], s["n"], h) if h == dim else work.gate_loop_wide(s["b"], h, s["n"], dim // h, dim // h)
    counted = work.total(core, work.linear((rows, dim, 5 * dim + 2 * h)))
    return _layer(gate_loop.Config(dim=dim, heads=h),
                  lambda: upstream.module(_SCAN).GateLoopedAttention(dim, heads=h), counted, s, device)


def _simple(s: dict, device: torch.device) -> Contest:
    dim, rows = s["dim"], s["b"] * s["n"]
    counted = work.total(work.simple_gate_loop(s["b"], s["n"], dim), work.linear((rows, dim, 3 * dim)))
    return _layer(simple_gate_loop.Config(dim=dim),
                  lambda: upstream.module("gateloop_transformer").SimpleGateLoopLayer(dim), counted, s, device)


def _coor(s: dict, device: torch.device) -> Contest:
    dim, h, d = s["dim"], s["h"], s["d"]
    rows, pairs = s["b"] * s["n"], s["b"] * h * work.triangle(s["n"])
    products = Work(4 * d * pairs)
    counted = work.total(work.coor(pairs, s["n"], 1.0, 20, 0.1, 4.0, 0.7), (products, products.times(3.5)),
                         work.linear((rows, dim, 3 * h * d), (rows, h * d, dim)))
    cfg = coor_descent.Config(dim=dim, heads=h, dim_head=d, use_coor_descent=True)
    return _layer(cfg, lambda: upstream.coor_layer(dim, h, d, 20), counted, s, device)


def _picture(kind: str, s: dict, device: torch.device) -> Contest:
    dim, h, d, t, side = s["dim"], s["h"], s["d"], s["t"], s["s"]
    n = t + side * side - 1
    rows, options = s["b"] * n, {"dim": dim, "seq_len": n, "heads": h, "dim_head": d}
    if kind == "conv":
        cfg, name, pairs = sparse_conv.Config(**options, image_size=side), "SparseConvCausalAttention", work.conv_pairs(t, side, 5)
        options["image_size"] = side
    else:
        cfg, name, pairs = full.Config(**options), "Attention", work.triangle(n)
    counted = work.total(work.attention(s["b"], h, n, pairs, d), work.linear((rows, dim, 3 * h * d), (rows, h * d, dim)))
    return _layer(cfg, lambda: upstream.dalle(name, **options), counted, {**s, "n": n}, device)


def _linformer(s: dict, device: torch.device) -> Contest:
    b, n, dim, k = s["b"], s["n"], s["dim"], s["k"]
    # The context is mixed before it is projected: fewer products, if k is below n.
    mixing = work.linear((b * dim, n, 2 * k), (2 * b * k, dim, dim))
    core = Work(4 * b * n * k * dim, b * 8 * n * k), Work(14 * b * n * k * dim, 2 * b * 8 * n * k)
    counted = work.total(mixing, core, work.linear((b * n, dim, 2 * dim)))
    options = {"dim": dim, "seq_len": n, "k": k}
    return _layer(linformer.Config(**options), lambda: upstream.module("linformer").LinformerSelfAttention(**options), counted, s,
                  device)


# ------------------------------------------------------------------------------------------------ decode steps


def _step(cfg: Any, theirs, s: dict, device: torch.device, state_bytes: float | None = None) -> Contest:
    """The last of n tokens, or s["steps"] of them: some caches cost more at every so-manieth token, so that one says little.

    theirs(params, x) makes the opponent from all n tokens; it sees them, and takes its steps.
    """
    params, steps = fnattn.init(random.key(0), cfg, device=device), s.get("steps", 1)
    x = normal("x", s["b"], s["n"], cfg.dim, device=device)
    with torch.no_grad():
        _, state = fnattn.apply(params, x[:, :-steps], fnattn.init_state(params, s["b"], capacity=s.get("room", s["n"])))

    def ours(params, tokens, state, x, impl="auto"):
        if steps == 1:
            return fnattn.apply(params, tokens, state, impl=impl)[0]
        outs = []
        for token in tokens.split(1, 1):
            out, state = fnattn.apply(params, token, state, impl=impl)
            outs.append(out)
        return torch.cat(outs, 1)

    def truth(params, tokens, state, x, impl="reference"):
        return fnattn.apply(params, x, impl=impl)[0][:, -steps:]

    floor = Work(bytes=bytes_of(*(t.shape for t in floats(params))) + (state_bytes or 0))
    return Contest((params, x[:, -steps:].clone(), state, x), ours, lambda: theirs(params, x), floor, None, truth, steps)


def _decode_taylor(s: dict, device: torch.device) -> Contest:
    options = {"dim": s["dim"], "heads": s["h"], "dim_head": s["d"], "causal": True}

    def theirs(params, x):
        upstream.module("fast_transformers.causal_product")
        made = upstream.module("taylor_series_linear_attention").TaylorSeriesLinearAttn(**options)
        upstream.layer(made, params)
        with torch.no_grad():
            _, cache = made(x[:, :-1], return_cache=True)
        return Opponent(lambda params, token, *rest: made(token, cache=cache, return_cache=True)[0])

    d = s["d"]
    state = 8.0 * s["b"] * s["h"] * (1 + d + d * (d + 1) / 2) * (d + 1)
    return _step(taylor.Config(**options), theirs, s, device, state)


def _decode_simple(s: dict, device: torch.device) -> Contest:
    def theirs(params, x):
        made = upstream.module("gateloop_transformer").SimpleGateLoopLayer(s["dim"])
        upstream.layer(made, params)
        with torch.no_grad():
            _, cache = made(x[:, :-1], return_cache=True)
        return Opponent(lambda params, token, *rest: made(token, cache=cache, return_cache=True)[0])

    return _step(simple_gate_loop.Config(dim=s["dim"]), theirs, s, device, 8.0 * s["b"] * s["dim"])


def _decode_gate_loop(s: dict, device: torch.device) -> Contest:
    """Upstream has no cache: it computes the whole sequence again."""
    def theirs(params, x):
        made = upstream.module(_SCAN).GateLoopedAttention(s["dim"])
        upstream.layer(made, params)
        return Opponent(lambda params, token, state, x: made(x)[:, -1:])

    return _step(gate_loop.Config(dim=s["dim"]), theirs, s, device, 16.0 * s["b"] * s["dim"])


def _decode_picture(kind: str, cached: bool, s: dict, device: torch.device) -> Contest:
    dim, h, d, t, side = s["dim"], s["h"], s["d"], s["t"], s["s"]
    length = t + side * side - 1
    options: dict[str, Any] = {"dim": dim, "seq_len": length, "heads": h, "dim_head": d}
    cfg = sparse_conv.Config(**options, image_size=side) if kind == "conv" else full.Config(**options)

    def theirs(params, x):
        if not cached:
            made = upstream.dalle("SparseConvCausalAttention", **options, image_size=side).to(device)
            upstream.layer(made, params)
            return Opponent(lambda params, token, state, x: made(x)[:, -1:])
        mask = _conv_mask(t, side, length, device) if kind == "conv" else None
        made = upstream.dalle("Attention", **options, static_mask=mask).to(device)
        upstream.layer(made, params)
        steps, cache = s.get("steps", 1), dict[str, Any]()
        with torch.no_grad():
            made(x[:, :-steps], cache=cache, cache_key="kv")

        def run(params, tokens, *rest):
            seen, outs = dict(cache), []  # it writes the longer keys into the dict: a new dict for each run
            for i, token in enumerate(tokens.split(1, 1)):
                seen["offset"] = x.shape[1] - steps + i
                outs.append(made(token, cache=seen, cache_key="kv"))
            return torch.cat(outs, 1)

        return Opponent(run)

    read = s["n"] if kind == "full" else t + 25
    return _step(cfg, theirs, {**s, "room": length}, device, bytes_of((s["b"], h, read, 2 * d)))


def _conv_mask(t: int, side: int, length: int, device: torch.device) -> Tensor:
    """The convolution's pattern as a table [length, length]: text sees text, a pixel all text and its window."""
    at = torch.arange(length, device=device)
    row, column, pixel = (at - t) // side, (at - t) % side, at >= t
    window = in_window(row[:, None] - row, 5, 1) & in_window(column[:, None] - column, 5, 1) & pixel[:, None] & pixel
    return (window | (at < t)[None]) & (at[:, None] >= at)


WIDE = {"b": 2, "dim": 512, "h": 8, "d": 64, "t": 257, "s": 32}
SMALL = {"b": 2, "dim": 32, "h": 2, "d": 16, "t": 17, "s": 8}
_GATE, _DALLE = "gateloop-transformer", "dalle-pytorch"
_FT = "taylor-series-linear-attention with pytorch-fast-transformers"

CASES = (
    Case("linformer layer", "layer", _linformer, {"b": 2, "n": 4096, "dim": 512, "k": 256}, {"b": 1, "n": 128, "dim": 64, "k": 16},
         (1.5, 1.25), "linformer"),
    Case("taylor layer", "layer", _taylor, {"b": 2, "n": 4096, "dim": 512, "h": 32, "d": 16},
         {"b": 1, "n": 128, "dim": 32, "h": 2, "d": 16}, (3.5, 3.5), _FT, memory=False),
    # Among millions of gates some are near 0, where their phase has a derivative of 1 / |a|: the rounding of the projection
    # alone moves gradients by 4e-4, in plain torch and upstream too.
    Case("gate_loop layer d1", "layer", _gate_loop, {"b": 2, "n": 4096, "dim": 512, "h": 512},
         {"b": 1, "n": 128, "dim": 64, "h": 64}, (1.5, 1.35), _GATE, tolerance=1e-3, memory=False),
    Case("gate_loop layer h8", "layer", _gate_loop, {"b": 1, "n": 1024, "dim": 512, "h": 8}, {"b": 1, "n": 128, "dim": 64, "h": 4},
         (6, 8), _GATE, memory=False),
    Case("simple_gate_loop layer", "layer", _simple, {"b": 2, "n": 4096, "dim": 512}, {"b": 1, "n": 128, "dim": 64},
         (1.5, 1.35), _GATE, memory=False),
    Case("coor_descent layer", "layer", _coor, {"b": 1, "n": 1024, "dim": 512, "h": 8, "d": 64},
         {"b": 1, "n": 64, "dim": 32, "h": 2, "d": 16}, (20, 14), "coordinate-descent-attention", {"n": 256}, 1e-3, False),
    Case("conv layer", "layer", partial(_picture, "conv"), WIDE, SMALL, (4, 2.3), _DALLE, memory=False),
    Case("full layer", "layer", partial(_picture, "full"), WIDE, SMALL, (1.5, 1.4), _DALLE, memory=False),
    Case("decode taylor", "decode", _decode_taylor, {"b": 2, "n": 64, "dim": 512, "h": 8, "d": 16},
         {"b": 2, "n": 16, "dim": 32, "h": 2, "d": 16}, (5, None), _FT, memory=False),
    Case("decode simple_gate_loop", "decode", _decode_simple, {"b": 4, "n": 64, "dim": 512}, {"b": 2, "n": 16, "dim": 32},
         (1.9, None), _GATE, memory=False),
    Case("decode gate_loop", "decode", _decode_gate_loop, {"b": 2, "n": 1024, "dim": 512}, {"b": 1, "n": 64, "dim": 32},
         (None, None), _GATE + ", recomputing", memory=False),
    Case("decode full", "decode", partial(_decode_picture, "full", True), {**WIDE, "n": 1024, "steps": 32}, {**SMALL, "n": 40, "steps": 8},
         (2.5, None), _DALLE, memory=False),
    Case("decode conv", "decode", partial(_decode_picture, "conv", True), {**WIDE, "n": 1024}, {**SMALL, "n": 40},
         (2, None), _DALLE + ", masked cache", memory=False),
    Case("decode conv recomputed", "decode", partial(_decode_picture, "conv", False), {**WIDE, "n": 1024}, {**SMALL, "n": 40},
         (200, None), _DALLE + ", recomputing", memory=False),
)
