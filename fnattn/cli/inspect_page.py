"""The page of `fnattn inspect`: what was measured, each figure with its numbers in a table under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import inspect_figures as figures
from .html import Section, Table, report
from .inspect_measure import Subject


def page(subject: Subject, found: Mapping[str, Any]) -> str:
    """The whole page."""
    family = type(subject.params.cfg.attention).__module__.rpartition(".")[2]
    valid = (found.get("loss") or {}).get("valid_loss") or []
    member = "" if subject.member is None else f", member {subject.member} of an ensemble"
    intro = (f"{subject.path}{member}: {len(subject.params.blocks)} blocks of {family} attention at width {subject.params.cfg.dim}, "
             f"{subject.count:,} parameters, after {subject.step} steps. Measured on {subject.windows.shape[0]} windows of "
             f"{subject.windows.shape[1] - 1} bytes from the validation part of {subject.source}.")
    if not subject.exact:
        intro += " Its config scales some gradients in training (frac_gradient...); here derivatives are those of the function itself."
    title = f"Inside {family}" + (f": {valid[-1]:.3f} nats per byte" if valid else "")
    makers = {"loss": _loss, "gradient": _gradient, "noise": _noise, "hessian": _hessian,
              "attention": lambda part: _attention(part, subject.shown_text), "character": _character, "outliers": _outliers}
    sections = [section for name, make in makers.items() if name in found for section in make(found[name])]
    return report(title=title, intro=intro, sections=sections)


def _n(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _loss(found: Mapping) -> list[Section]:
    every = max(1, len(found["step"]) // 8)
    chosen = sorted({*range(every - 1, len(found["step"]), every), len(found["step"]) - 1})
    valid = dict(zip(found["valid_step"], found["valid_loss"]))
    rows = [(found["step"][i], _n(found["loss"][i]), _n(valid.get(found["step"][i])), _n(found["grad_norm"][i])) for i in chosen]
    return [Section("Loss curve", "Nats per byte during training; a model that knows nothing has ln 256 = 5.55.",
                    [figures.losses(found), Table(("step", "training", "validation", "gradient norm"), rows)])]


def _gradient(found: Mapping) -> list[Section]:
    total = sum((v or 0.0) ** 2 for v in found["layers"].values()) or 1.0
    rows = [(name, _n(v), f"{100 * (v or 0.0) ** 2 / total:.1f} %") for name, v in found["layers"].items()]
    sections = [Section("Gradient by layer", f"Norm of the gradient of the mean loss over {found['samples']} samples. Shares are of the "
                        f"squared norm, which is what a clipped step is divided into.",
                        [figures.bars("Gradient norm by layer", found["layers"], "norm of the gradient"),
                         Table(("layer", "norm", "share"), rows)])]
    if found["heads"]:
        rows = []
        for name, norms in found["heads"].items():
            order = sorted(range(len(norms)), key=lambda h: -(norms[h] or 0.0))
            rows.append((name, len(norms), ", ".join(f"{h}: {_n(norms[h], 3)}" for h in order[:4]),
                         ", ".join(f"{h}: {_n(norms[h], 3)}" for h in order[-2:])))
        sections.append(Section("Gradient by head", "Norm of the gradient with respect to what each head computes: how much the loss "
                                "would move if the head's output did. A head near 0 is one that nothing reads.",
                                [figures.heads(found["heads"]), Table(("layer", "heads", "largest", "smallest"), rows)]))
    return sections


def _noise(found: Mapping) -> list[Section]:
    scale, batch = found["scale"], found["batch"]
    caption = ("The batch size at which half of a sample's worth is lost to averaging: far smaller batches use every sample fully, far "
               "larger ones waste most of them. Estimated from the spread of per-sample gradients.")
    if scale is None:
        caption += " The mean gradient is lost in the noise of so few samples: take more with --samples."
    rows = [("noise scale B = tr Σ / |G|²", f"{_n(scale)} samples of {found['tokens_per_sample']} bytes"),
            ("tr Σ, variance of one sample's gradient", _n(found["trace"])),
            ("|G|², squared norm of the true gradient", _n(found["signal"])),
            ("batch in training", _n(batch)), ("samples measured", found["samples"])]
    ratio = [(name, _n(v)) for name, v in found["signal_to_noise"].items()]
    return [Section("Gradient noise", caption, [figures.noise(scale, batch), Table(("quantity", "value"), rows),
                                                Table(("layer", "median |mean| / deviation of a parameter's gradient"), ratio)])]


def _hessian(found: Mapping) -> list[Section]:
    rows = [("largest eigenvalue (sharpness)", _n(found["largest"])), ("smallest eigenvalue", _n(found["smallest"])),
            ("trace", f"{_n(found['trace'])} ± {_n(found['trace_error'], 2)}"),
            ("measured with", f"{found['runs']} Lanczos runs of {found['steps']} products, {found['samples']} samples")]
    top = [(i + 1, _n(v, 5), _n(r, 2)) for i, (v, r) in enumerate(zip(found["values"], found["residuals"]))]
    return [Section("Hessian spectrum", "Density of the eigenvalues of the Hessian of the loss, by stochastic Lanczos quadrature; "
                    "the height is logarithmic, and ticks mark the eigenvalues in the table. Gradient "
                    "descent is stable while the learning rate stays below 2 / sharpness.",
                    [figures.density(found), Table(("quantity", "value"), rows),
                     Table(("rank by size", "eigenvalue", "off by at most"), top)])]


def _attention(found: Mapping, text: str) -> list[Section]:
    sections = [Section("The text looked at", f"{found['positions']} bytes; the maps below are of these.", [text])]
    for name, layer in found["layers"].items():
        many = ""
        if len(layer["shown"]) < layer["heads"]:
            many = f" The {len(layer['shown'])} of {layer['heads']} heads with the largest gradient."
        sign = " Orange is negative: these weights are no averages." if layer["signed"] else ""
        nulls = f" {layer['null_keys']} null keys in front are left out." if layer["null_keys"] else ""
        rows = []
        for place, head in enumerate(layer["shown"]):
            best = ", ".join(f"{j} {c!r}: {_n(v, 3)}" for j, c, v in layer["last_query"][place])
            rows.append((head, _n(layer["mean_distance"][head], 3), _n(layer["reach_90"][head], 3), _n(layer["entropy"][head], 3), best))
        sections.append(Section(
            f"Attention of {name}", f"Row: the byte that looks; column: the byte that is looked at. Times the values these maps give "
            f"what the heads compute, to {_n(found['relative_error'], 1)} of their size. Each head has its own scale; colours grow "
            f"with the square root of an entry, so that small ones show.{sign}{nulls}{many}",
            [figures.maps(name, layer),
             Table(("head", "mean distance", "90 % within", "entropy, nats", "largest entries of the last row"), rows)]))
    rows = [(name, _n(_mean(layer["mean_distance"]), 3), _n(min(layer["mean_distance"]), 3), _n(max(layer["mean_distance"]), 3),
             _n(_mean(layer["reach_90"]), 3)) for name, layer in found["layers"].items()]
    sections.append(Section("Effective context", "How far back each byte looks, averaged over heads by the size of the weights. The dotted "
                            "line is a map that weighs everything before it alike.",
                            [figures.context(found["layers"]),
                             Table(("layer", "mean over heads", "shortest head", "longest head", "90 % within"), rows)]))
    return sections


def _mean(values: list) -> float:
    return sum(values) / len(values)


def _character(found: Mapping) -> list[Section]:
    if "half_life" in next(iter(found.values())):
        rows = [(name, *(_n(v, 3) for v in one["half_life"].values())) for name, one in found.items()]
        return [Section("Decay", "In how many positions a gate forgets half, over all positions and heads of the text: quantiles.",
                        [Table(("layer", *(f"{q} %" for q in next(iter(found.values()))["half_life"])), rows)])]
    rows = [(name, _n(one["variation"], 3), _n(one["largest_score"], 3), _n(one["relative"], 3)) for name, one in found.items()]
    return [Section("Taylor's series", "How far 1 + s + s²/2 is from exp(s) on this text: the distance between the weights that "
                    "they give (0 the same, 1 disjoint), the largest score, and the largest relative error of a weight.",
                    [Table(("layer", "mean distance of weights", "largest |s|", "largest relative error"), rows)])]


def _outliers(found: Mapping) -> list[Section]:
    def rows(entries: list) -> list:
        return [(e["sample"], _n(e["norm"]), _n(e["deviations"], 3), _n(e["loss"]), e["text"]) for e in entries]

    columns = ("sample", "norm", "deviations", "loss", "text")
    return [Section("Samples that stand out", f"Norm of each sample's gradient against its loss; the median norm is {_n(found['median'])}. "
                    f"The five largest are marked by number, and their texts follow.",
                    [figures.norms(found), Table(columns, rows(found["largest"]), text=True)]),
            Section("Samples with the smallest gradients", "What the model has little left to learn from.",
                    [Table(columns, rows(found["smallest"]), text=True)])]
