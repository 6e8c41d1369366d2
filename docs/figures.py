"""Writes the figures of the kept benchmark runs into the tables that quote them: python docs/figures.py

In docs/which_attention.md a row whose first cell is the name of a case in backticks gets that case's figures; in README.md the
three tables of measured figures are made anew. Everything else stays. The run is the first file that a page names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE, README = HERE / "which_attention.md", HERE.parent / "README.md"
RATIOS = "| against upstream, times as fast | shape | forward | forward + backward |"
STEPS = "| whole training step, times as fast | against | shape | ratio |"
MULTIPLES = "| derivative | shape | costs | goal |"


def run_of(text: str) -> list[dict[str, Any]]:
    """The rows of the run that a page names first."""
    return json.loads((HERE.parent / re.search(r"`(benchmarks/results/[^`]+\.json)`", text)[1]).read_text())["results"]


def fill(text: str) -> str:
    """docs/which_attention.md with the figures of the run that it names."""
    rows = {(row["case"], row["pass"]): row for row in run_of(text)}
    return re.sub(r"^\| `([\w -]+)` \|.*$", lambda m: line(m[1], rows) if (m[1], "forward") in rows else m[0], text, flags=re.M)


def line(case: str, rows: dict) -> str:
    row = rows[case, "forward"]
    if row["kind"] == "scaling":
        cells = [f"{cost:.0f}" for cost in row["ns_per_token"]] + [f"{row['growth']:.1f}"]
    elif row["kind"] == "decode":
        cells = [row["shape"], f"{row['ours_ms']:.2f}"]
    else:
        times = (row["ours_ms"], rows[case, "forward+backward"]["ours_ms"])
        cells = [f"{time:.1f}" if time < 100 else f"{time:.0f}" for time in times]
    return " | ".join([f"| `{case}`", *cells]) + " |"


def fill_readme(text: str) -> str:
    """README.md with its tables made from the run that it names."""
    for head, rows in tables(run_of(text)).items():
        before, after = text.split(head, 1)
        rule = "|" + "---|" * (head.count("|") - 1)
        text = before + "\n".join([head, rule, *rows]) + "\n\n" + after.split("\n\n", 1)[1]
    return text


def tables(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Rows of each table by its head."""
    every: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results:
        if row["kind"] in ("operator", "layer", "decode"):
            every.setdefault((row["case"], row["shape"]), {})[row["pass"]] = row.get("ratio")
    ratios = [f"| {case} | {shape} | {number(found.get('forward'))} | {number(found.get('forward+backward'))} |"
              for (case, shape), found in every.items()]
    steps = [f"| {row['case'].removeprefix('training ')} | {row['peer']} | {row['shape']} | {row['ratio']:.2f} |"
             for row in results if row["kind"] == "training" and row.get("ratio") is not None]
    units = {"forward": "forwards", "forward+backward": "forward + backward", "loop": "times as fast as a loop"}
    multiples = [f"| {row['case']} | {row['shape']} | {row['multiple']:.1f} {units[row['pass']]} | {goal(row)} |"
                 for row in results if row["kind"] == "transform" and "multiple" in row]
    return {RATIOS: ratios, STEPS: steps, MULTIPLES: multiples}


def goal(row: dict[str, Any]) -> str:
    return "–" if row["goal"] is None else ("at least " if row["more"] else "at most ") + f"{row['goal']:g}"


def number(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
    README.write_text(fill_readme(README.read_text()))
