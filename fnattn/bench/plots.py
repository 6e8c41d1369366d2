"""The table as a picture: ratio per case, and cost per token against the length, on logarithmic axes."""

from __future__ import annotations

import io
from typing import Any

FORWARD, BOTH, STEP, GOAL = "#8fb4dc", "#0b4f9c", "#5a7d5a", "#d1495b"


def picture(rows: list[dict[str, Any]], caption: str) -> bytes:
    """A PNG; panels without rows are left out."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no state shared with whoever else plots
    names = list(dict.fromkeys(row["case"] for row in rows if row.get("ratio") and row["kind"] != "transform"))
    curves = [row for row in rows if row["kind"] == "scaling" and "wrong" not in row]
    panels = [*([_ratios] if names else []), *([_curves] if curves else [])]
    if not panels:
        return b""
    heights = [max(2.2, 0.34 * len(names)) if panel is _ratios else 3.6 for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.8), dpi=120, layout="constrained")
    figure.suptitle(caption, fontsize=8, color="#59636e")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, where in zip(panels, axes, strict=True):
        panel(where, rows, names)
        where.grid(True, axis="both" if panel is _curves else "x", which="major", alpha=0.3, linewidth=0.6)
        where.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ratios(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for shift, which, colour in ((-0.2, "forward", FORWARD), (0.2, "forward+backward", BOTH), (0.0, "step", STEP)):
        here = [row for row in rows if row.get("ratio") and row["kind"] != "transform" and row["pass"] == which]
        places = [names.index(row["case"]) + shift for row in here]
        if not here:
            continue
        axes.barh(places, [row["ratio"] for row in here], height=0.36, color=colour, label=which)
        goals = [(row["goal"], y) for row, y in zip(here, places, strict=True) if row["goal"]]
        if goals:
            axes.scatter(*zip(*goals, strict=True), marker="|", s=90, color=GOAL, zorder=3, label="goal" if shift < 0 else None)
    axes.set_xscale("log")
    axes.axvline(1, color="#59636e", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("times as fast as upstream")
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _curves(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for row in rows:
        if row["kind"] == "scaling" and "wrong" not in row:
            axes.plot(row["n"], row["ns_per_token"], marker="o", markersize=3, label=row["case"].removeprefix("scaling "))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nanoseconds per token, forward")
    axes.legend(frameon=False, fontsize=8)
