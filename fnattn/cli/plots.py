"""The figures of a report, as PNG, for light and for dark pages."""

from __future__ import annotations

import io
from typing import Any

# ink, faint ink, one colour for training and one for validation: readable on the page's own background, told apart by
# lightness too
LIGHT = {"paper": "none", "ink": "#1f2328", "faint": "#8c959f", "train": "#8fb4dc", "valid": "#0b4f9c"}
DARK = {"paper": "none", "ink": "#e6edf3", "faint": "#6e7681", "train": "#3d6ea5", "valid": "#9ecbff"}
ALONE = LIGHT | {"paper": "white"}  # a file that is shown on whatever background


def losses(entries: list[dict], colours: dict) -> bytes:
    """Training and validation loss by step, from the lines of metrics.jsonl. An ensemble is one line per member."""
    figure, axes = _axes(colours, "step", "nats per byte")
    steps = [entry["step"] for entry in entries]
    for i, line in enumerate(_members([entry["loss"] for entry in entries])):
        axes.plot(steps, line, color=colours["train"], linewidth=1, label="training" if i == 0 else None)
    measured = [entry for entry in entries if "valid_loss" in entry]
    lines = _members([entry["valid_loss"] for entry in measured])
    for i, line in enumerate(lines):
        axes.plot([entry["step"] for entry in measured], line, color=colours["valid"], linewidth=2, marker="o", markersize=4,
                  label="validation" if i == 0 else None)
    if lines:
        best = min(line[-1] for line in lines)
        axes.annotate(f"{best:.3f}", (measured[-1]["step"], best), textcoords="offset points", xytext=(-4, 10), ha="right",
                      color=colours["valid"], fontweight="bold")
    axes.legend(frameon=False, labelcolor=colours["ink"])
    return _png(figure)


def positions(values: list[float], colours: dict) -> bytes:
    """Loss by position in the window."""
    figure, axes = _axes(colours, "bytes seen before", "nats per byte")
    axes.plot(range(1, len(values) + 1), values, color=colours["valid"], linewidth=1.5)
    return _png(figure)


def _members(values: list[Any]) -> list[list[float]]:
    """[step][member] or [step] -> [member][step]"""
    rows = [value if isinstance(value, list) else [value] for value in values]
    return [list(column) for column in zip(*rows)]


def _axes(colours: dict, x: str, y: str) -> tuple[Any, Any]:
    # Figure without pyplot: no window system, no state shared with whoever else plots.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.6), dpi=144, layout="constrained")
    figure.set_facecolor(colours["paper"])
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x, color=colours["ink"])
    axes.set_ylabel(y, color=colours["ink"])
    axes.tick_params(colors=colours["ink"])
    axes.grid(True, color=colours["faint"], alpha=0.3, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["faint"])
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
