"""Writes the figures of the kept benchmark runs into the tables that quote them: python docs/figures.py

In docs/which_attention.md a row of a table of cases gets the figures of the case that its first cell names; in README.md the
three tables of measured figures are made anew. Everything else stays. The run is the first file that a page names; the README also
names one on two threads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE, README = HERE / "which_attention.md", HERE.parent / "README.md"
RATIOS = "| against upstream, times as fast | shape | forward | forward + backward | two threads: forward | forward + backward |"
STEPS = "| whole training step, times as fast | against | shape | ratio |"
MULTIPLES = "| derivative | shape | costs | goal |"


def runs_of(text: str) -> list[list[dict[str, Any]]]:
    """The rows of the runs that a page names, in its order."""
    paths = dict.fromkeys(re.findall(r"`(benchmarks/results/[^`]+\.json)`", text))
    return [json.loads((HERE.parent / path).read_text())["results"] for path in paths]


def fill(text: str) -> str:
    """docs/which_attention.md with the figures of the run that it names."""
    rows = {(row["case"], row["pass"]): row for row in runs_of(text)[0]}

    def filled(table: re.Match) -> str:
        return re.sub(r"^\| `([^`]+)` \|.*$", lambda m: line(m[1], rows), table[0], flags=re.M)

    return re.sub(r"^\| case \|.*\n(?:\|.*\n)+", filled, text, flags=re.M)


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
    """README.md with its tables made from the runs that it names: on one thread, and on two."""
    for head, rows in tables(*runs_of(text)).items():
        before, after = text.split(head, 1)
        rule = "|" + "---|" * (head.count("|") - 1)
        text = before + "\n".join([head, rule, *rows]) + "\n\n" + after.split("\n\n", 1)[1]
    return text


def tables(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Rows of each table by its head."""
    alone, together = ratios(one), ratios(two)
    against = [f"| {' | '.join((case, shape, *map(number, (*pair, *together.get((case, shape), (None, None))))))} |"
               for (case, shape), pair in alone.items()]
    steps = [f"| {row['case'].removeprefix('training ')} | {row['peer']} | {row['shape']} | {row['ratio']:.2f} |"
             for row in one if row["kind"] == "training" and row.get("ratio") is not None]
    units = {"forward": "forwards", "forward+backward": "forward + backward", "loop": "times as fast as a loop",
             "kernel by kernel": "times as fast as kernel by kernel", "step in float32": "times as fast as in float32"}
    told = [row for row in one if row["kind"] == "transform" and "multiple" in row]
    multiples = [f"| {row['case']} | {row['shape']} | {row['multiple']:.1f} {units[row['pass']]} | {goal(row)} |"
                 for row in told if row["pass"] in units]
    narrow = [row for row in told if row["pass"] == "float32"]
    if narrow:
        least, most = (f"{end(row['multiple'] for row in narrow):.1f}" for end in (min, max))
        multiples.append(f"| bfloat16, {len(narrow) // 2} operators, value and gradient | {narrow[0]['shape']} | {least} to {most} times "
                         f"as fast as float32 | {goal(narrow[0])} |")
    return {RATIOS: against, STEPS: steps, MULTIPLES: multiples}


def ratios(results: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """Forward, and forward with gradients, of each (case, shape) with an other side."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in results:
        if row["kind"] in ("operator", "layer", "decode"):
            found.setdefault((row["case"], row["shape"]), {})[row["pass"]] = row.get("ratio")
    return {key: (passes.get("forward"), passes.get("forward+backward")) for key, passes in found.items()}


def goal(row: dict[str, Any]) -> str:
    return "–" if row["goal"] is None else ("at least " if row["more"] else "at most ") + f"{row['goal']:g}"


def number(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
    README.write_text(fill_readme(README.read_text()))
