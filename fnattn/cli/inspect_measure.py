"""What `fnattn inspect` measures: each function takes the subject and returns JSON values, or None where there is nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import data, inspect, random, taps, tree
from ..models import lm


class Subject(NamedTuple):
    """What is looked at, and how much."""

    params: lm.Params
    path: Path
    folder: Path
    step: int
    settings: dict
    metrics: list[dict]
    windows: Tensor         # int64 [samples, length + 1] of the validation text
    source: str
    shown: Tensor           # int64 [bytes]: the text whose maps are shown
    exact: bool             # whether the config's own gradients are derivatives
    member: int | None
    curvature_samples: int
    runs: int
    steps: int
    heads_shown: int
    seed: int

    @property
    def count(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in tree.leaves(self.params) if tree.is_differentiable(p))

    @property
    def shown_text(self) -> str:
        """The text whose maps are shown."""
        return data.decode(self.shown)

    @property
    def key(self) -> Tensor:
        """Of everything random here."""
        return random.key(self.seed)


def loss(params: lm.Params, ids: Tensor) -> Tensor:
    """Nats per byte, without dropout."""
    return lm.nll(params, ids).mean()


def number(x: Any) -> float | None:
    """A float with 6 digits for JSON; None for what is no number."""
    value = float(x)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(x: Tensor) -> Any:
    """The same for a tensor, as nested lists."""
    return [numbers(row) for row in x] if x.ndim else number(x)


def loss_curve(subject: Subject) -> dict | None:
    """Training and validation loss by step."""
    if not subject.metrics:
        return None
    valid = [line for line in subject.metrics if "valid_loss" in line]
    return {"step": [line["step"] for line in subject.metrics], "loss": [line["loss"] for line in subject.metrics],
            "grad_norm": [line.get("grad_norm") for line in subject.metrics],
            "valid_step": [line["step"] for line in valid], "valid_loss": [line["valid_loss"] for line in valid]}


def gradient(subject: Subject) -> dict:
    """Norms of the gradient of the mean loss, by leaf, layer and head."""
    windows = subject.windows[:16]
    grads = tree.grad(loss)(subject.params, windows)
    found = {"samples": windows.shape[0],
             "leaves": {name: number(norm) for name, norm in inspect.leaf_norms(grads).items()},
             "layers": {name: number(norm) for name, norm in inspect.layer_norms(grads).items()}, "heads": {}}
    if "kv" not in _taps(subject):
        heads = inspect.head_norms(loss, subject.params, windows)
        found["heads"] = {name: numbers(norm) for name, norm in heads.items()}
    return found


def _taps(subject: Subject) -> set[str]:
    _, seen = taps.harvest(lm.apply)(subject.params, subject.shown[None, :2])
    return {name.rpartition(".")[2] for name in seen}


def noise(subject: Subject) -> dict:
    """The gradient noise scale, and the signal-to-noise ratio of parameters by layer (median)."""
    found = inspect.moments(loss, subject.params, subject.windows, chunk_size=8)
    scale = inspect.noise_scale_from_moments(found)
    layers: dict[str, list[Tensor]] = {}
    for name, ratio in tree.to_flat(tree.map(_filled, inspect.signal_to_noise(found))).items():
        if ratio.numel():
            parts = name.split(".")
            layers.setdefault(".".join(parts[:2]) if parts[0] == "blocks" else parts[0], []).append(ratio.flatten())
    return {"samples": found.count, "tokens_per_sample": subject.windows.shape[1] - 1, "scale": number(scale.scale),
            "trace": number(scale.trace), "signal": number(scale.signal), "batch": subject.settings.get("batch"),
            "signal_to_noise": {name: number(torch.cat(parts).median()) for name, parts in layers.items()}}


def _filled(x: Tensor | None) -> Tensor:
    return torch.zeros(0) if x is None else x


def hessian(subject: Subject) -> dict:
    """Spectral density, largest and smallest eigenvalues, trace."""
    windows = subject.windows[:subject.curvature_samples]

    def product(v: Any) -> Any:
        return inspect.hvp(loss, subject.params, v, windows)

    runs = inspect.spectrum(product, subject.params, subject.key, runs=subject.runs, steps=subject.steps)
    density = inspect.density(runs, points=400)
    first = runs[0]
    order = first.values.abs().argsort(descending=True)[:8]
    # What Lanczos leaves over bounds the error, as far as the products themselves are exact.
    rounding = 10 * torch.finfo(first.values.dtype).eps * first.values.abs().max()
    # Each run's quadrature gives the trace: P times the mean of the values under its weights.
    traces = torch.stack([subject.count * (r.weights * r.values).sum() for r in runs])
    return {"samples": windows.shape[0], "runs": subject.runs, "steps": subject.steps,
            "largest": number(max(r.values[-1] for r in runs)), "smallest": number(min(r.values[0] for r in runs)),
            "trace": number(traces.mean()), "trace_error": number(traces.std() / len(runs) ** 0.5) if len(runs) > 1 else None,
            "values": numbers(first.values[order]), "residuals": numbers((first.last * first.vectors[-1].abs())[order] + rounding),
            "grid": numbers(density.grid), "density": numbers(density.density)}


def attention(subject: Subject) -> dict:
    """Maps on the shown text, and what is read from them, per layer and head."""
    with torch.no_grad():
        maps = inspect.attention_maps(lm.apply, subject.params, subject.shown[None])
        worst = max(float((one.map @ one.values - one.heads).abs().max() / one.heads.abs().max().clamp(min=1e-30))
                    for one in maps.values())
    strength = {} if "kv" in _taps(subject) else inspect.head_norms(loss, subject.params, subject.shown[None])
    layers = {}
    for name, one in maps.items():
        size = strength[name] if name in strength else one.values.abs().mean((0, 2, 3))
        order = size.argsort(descending=True)[:subject.heads_shown].sort().values
        nulls = one.map.shape[-1] - one.map.shape[-2]
        attention = one.map[0, :, :, nulls:]
        context = inspect.effective_context(attention)
        layers[name] = {
            "heads": one.map.shape[1], "null_keys": nulls, "shown": order.tolist(),
            "mean_distance": numbers(context.mean.mean(-1)), "reach_90": numbers(context.reach.double().mean(-1)),
            "entropy": numbers(inspect.entropy(attention).mean(-1)), "context_by_position": numbers(context.mean.mean(0)),
            "signed": bool((attention < 0).any()),
            "last_query": [_top(subject, attention[h, -1]) for h in order],
            "maps": numbers(attention[order])}
    return {"relative_error": number(worst), "positions": subject.shown.shape[0], "layers": layers}


def _top(subject: Subject, row: Tensor) -> list[list]:
    """The three keys with the largest entries: [position, character, entry]."""
    best = row.abs().argsort(descending=True)[:3]
    return [[int(j), data.decode(subject.shown[j:j + 1]), number(row[j])] for j in best]


def character(subject: Subject) -> dict | None:
    """Half-lives of a gated family's decays, or the error of Taylor's series, per layer; None for other families."""
    with torch.no_grad():
        _, seen = taps.harvest(lm.apply)(subject.params, subject.shown[None])
    found = {}
    for name, one in inspect.attentions_of(subject.params).items():
        inside = {key.removeprefix(name + "."): value for key, value in seen.items() if key.startswith(name + ".")}
        if "a" in inside:
            life = inspect.decay_from_taps(one, inside).half_life.flatten().double()
            found[name] = {"half_life": {str(q): number(life.quantile(q / 100)) for q in (5, 25, 50, 75, 95)}}
        elif type(one.cfg).__module__.endswith(".taylor"):
            error = inspect.taylor_error_from_taps(one, inside)
            found[name] = {"variation": number(error.variation.mean()), "largest_score": number(error.largest.max()),
                           "relative": number(error.relative.max())}
    return found or None


def outliers(subject: Subject) -> dict:
    """The norm of every sample's gradient, and the samples that stand out."""
    found = inspect.per_sample_norms(loss, subject.params, subject.windows, chunk_size=8)
    norm = found.norm
    order = norm.argsort(descending=True)
    spread = (norm - norm.median()).abs().median() * 1.4826  # the deviation of a normal distribution with this median gap

    def sample(i: int) -> dict:
        return {"sample": i, "norm": number(norm[i]), "loss": number(found.loss[i]), "text": data.decode(subject.windows[i]),
                "deviations": number((norm[i] - norm.median()) / spread)}

    return {"norms": numbers(norm), "losses": numbers(found.loss), "median": number(norm.median()),
            "largest": [sample(int(i)) for i in order[:5]], "smallest": [sample(int(i)) for i in order[-2:]]}


MEASURES = {
    "loss": ("loss curve", loss_curve),
    "gradient": ("gradient norms", gradient),
    "noise": ("gradient noise scale", noise),
    "hessian": ("Hessian spectrum", hessian),
    "attention": ("attention maps", attention),
    "character": ("decays and series", character),
    "outliers": ("gradients of single samples", outliers),
}
