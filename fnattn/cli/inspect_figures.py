"""The figures of `fnattn inspect`: each is drawn for wide and narrow pages, light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import plots
from .html import Drawing

WIDE, NARROW = 7.0, 3.5  # inches: what 110 and 100 pixels of a page's width are
LIGHT = plots.LIGHT | {"cold": "#b3400f", "zero": "#f3f5f8"}
DARK = plots.DARK | {"cold": "#ff9a66", "zero": "#1b222c"}
LINES = {"light": ("#0b4f9c", "#b3400f", "#2f7d32", "#7b3fa0", "#9a6b00", "#00798c", "#a8326b", "#5a6570"),
         "dark": ("#9ecbff", "#ff9a66", "#86d68a", "#d3a6f2", "#ecc46a", "#6fd6e4", "#f598c4", "#b6c0ca")}


def drawing(alt: str, draw: Callable[[float, dict], Any]) -> Drawing:
    """draw(width in inches, colours) -> a Figure, in all four forms."""
    return Drawing(alt, *(_png(draw(width, colours)) for width in (WIDE, NARROW) for colours in (LIGHT, DARK)))


def losses(found: Mapping) -> Drawing:
    """Training and validation loss."""
    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, 0.5, colours, "step", "nats per byte")
        axes.plot(found["step"], found["loss"], color=colours["train"], linewidth=1, label="training")
        if found["valid_step"]:
            axes.plot(found["valid_step"], found["valid_loss"], color=colours["valid"], linewidth=2, marker="o", markersize=4,
                      label="validation")
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=9)
        return figure

    return drawing("Loss by step", draw)


def bars(alt: str, values: Mapping[str, float], x: str, log: bool = False) -> Drawing:
    """One horizontal bar per name."""
    names = list(values)

    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, max(0.18, (0.22 * len(names) + 0.7) / width), colours, x, "")
        axes.barh(range(len(names)), [values[name] or 0.0 for name in names], color=colours["valid"], height=0.65)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        if log:
            axes.set_xscale("log")
        return figure

    return drawing(alt, draw)


def heads(values: Mapping[str, Sequence[float]]) -> Drawing:
    """The share of each head in its layer, a row per layer."""
    names = list(values)
    most = max(len(row) for row in values.values())

    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, max(0.22, (0.3 * len(names) + 0.9) / width), colours, "head", "")
        table = [[v or 0.0 for v in values[name]] + [math.nan] * (most - len(values[name])) for name in names]
        shown = axes.imshow(table, aspect="auto", cmap=_map(colours, False), vmin=0.0, interpolation="nearest")
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        if most <= 16:
            axes.set_xticks(range(most))
        axes.grid(False)
        _bar(figure, shown, axes, colours)
        return figure

    return drawing("Gradient norm by layer and head", draw)


def noise(scale: float | None, batch: int | None) -> Drawing:
    """The share of a sample's information that a batch of each size still uses."""
    scale = scale or 1.0
    sizes = [2.0 ** (k / 4) for k in range(0, 4 * max(4, math.ceil(math.log2(max(scale, batch or 1, 2))) + 4))]

    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, 0.45, colours, "batch size in samples", "progress per sample")
        axes.plot(sizes, [scale / (scale + b) for b in sizes], color=colours["valid"], linewidth=2)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.05)
        axes.axvline(scale, color=colours["cold"], linewidth=1, linestyle="--", label="noise scale")
        if batch:
            axes.axvline(batch, color=colours["faint"], linewidth=1.5, label="batch in training")
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=9)
        return figure

    return drawing("Progress per sample by batch size", draw)


def density(found: Mapping) -> Drawing:
    """The spectral density, on a logarithmic scale."""
    top = max(found["density"])

    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, 0.5, colours, "eigenvalue", "density")
        heights = [max(d, 1e-8 * top) for d in found["density"]]
        axes.fill_between(found["grid"], heights, 1e-8 * top, color=colours["train"], alpha=0.6, linewidth=0)
        axes.plot(found["grid"], heights, color=colours["valid"], linewidth=1)
        # A single eigenvalue has a weight that no curve shows.
        axes.plot(found["values"], [1.6e-6 * top] * len(found["values"]), linestyle="none", marker="|", markersize=12,
                  markeredgewidth=1.5, color=colours["cold"])
        axes.set_yscale("log")
        axes.set_ylim(1e-6 * top, 2 * top)
        return figure

    return drawing("Spectral density of the Hessian", draw)


def maps(name: str, layer: Mapping) -> Drawing:
    """The maps of the shown heads of one layer, each on its own scale."""
    def draw(width: float, colours: dict) -> Any:
        columns = min(4 if width > 5 else 2, len(layer["maps"]))
        rows = -(-len(layer["maps"]) // columns)
        figure = _figure(width, rows * width / columns * 1.04 + 0.1, colours)
        for i, (head, table) in enumerate(zip(layer["shown"], layer["maps"])):
            axes = figure.add_subplot(rows, columns, i + 1, facecolor="none")
            size = max(max((abs(v) for v in row), default=0.0) for row in table) or 1.0
            shown = [[math.copysign(math.sqrt(abs(v) / size), v) for v in row] for row in table]
            axes.imshow(shown, cmap=_map(colours, layer["signed"]), vmin=-1.0 if layer["signed"] else 0.0, vmax=1.0,
                        interpolation="nearest")
            axes.set_title(f"head {head}", color=colours["ink"], fontsize=9, pad=3)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(colours["faint"])
        return figure

    return drawing(f"Attention maps of {name}", draw)


def context(layers: Mapping[str, Mapping]) -> Drawing:
    """Mean distance of what is attended, by position, one line per layer."""
    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, 0.5, colours, "position of the query", "mean distance back")
        palette = LINES["dark" if colours is DARK else "light"]
        for i, (name, layer) in enumerate(layers.items()):
            axes.plot(layer["context_by_position"], color=palette[i % len(palette)], linewidth=1.5, label=_short(name))
        count = len(next(iter(layers.values()))["context_by_position"])
        axes.plot([0, count - 1], [0, (count - 1) / 2], color=colours["faint"], linewidth=1, linestyle=":", label="all alike")
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=9)
        return figure

    return drawing("Effective context by position", draw)


def norms(found: Mapping) -> Drawing:
    """Gradient norm against loss, a dot per sample; the largest are marked."""
    marked = {entry["sample"] for entry in found["largest"]}

    def draw(width: float, colours: dict) -> Any:
        figure, axes = _axes(width, 0.5, colours, "loss of the sample, nats per byte", "norm of its gradient")
        rest = [i for i in range(len(found["norms"])) if i not in marked]
        axes.scatter([found["losses"][i] for i in rest], [found["norms"][i] for i in rest], s=14, color=colours["valid"], alpha=0.7,
                     linewidths=0)
        axes.scatter([found["losses"][i] for i in marked], [found["norms"][i] for i in marked], s=26, color=colours["cold"], linewidths=0)
        for i in marked:
            axes.annotate(str(i), (found["losses"][i], found["norms"][i]), textcoords="offset points", xytext=(5, 2), fontsize=8,
                          color=colours["ink"])
        return figure

    return drawing("Gradient norm and loss of each sample", draw)


# ------------------------------------------------------------------------------------------------ shared


def _short(name: str) -> str:
    return name.removesuffix(".attn")


def _figure(width: float, height: float, colours: dict) -> Any:
    # Figure without pyplot: no window system, no state shared with whoever else plots.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=144 if width > 5 else 220, layout="constrained")
    figure.set_facecolor(colours["paper"])
    return figure


def _axes(width: float, ratio: float, colours: dict, x: str, y: str) -> tuple[Any, Any]:
    figure = _figure(width, width * (ratio if width > 5 else min(1.6 * ratio, max(ratio, 0.7))), colours)
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x, color=colours["ink"], fontsize=9)
    axes.set_ylabel(y, color=colours["ink"], fontsize=9)
    axes.tick_params(colors=colours["ink"], labelsize=9)
    axes.grid(True, color=colours["faint"], alpha=0.3, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["faint"])
    return figure, axes


def _map(colours: dict, signed: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    ends = [colours["cold"], colours["zero"], colours["valid"]] if signed else [colours["zero"], colours["valid"]]
    return LinearSegmentedColormap.from_list("fnattn", ends)


def _bar(figure: Any, shown: Any, axes: Any, colours: dict) -> None:
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.ax.tick_params(colors=colours["ink"], labelsize=8)
    bar.outline.set_visible(False)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
