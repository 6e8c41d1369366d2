"""Writes the figures of the kept benchmark run into the tables of docs/which_attention.md: python docs/figures.py

A row whose first cell is the name of a case in backticks gets that case's figures; everything else stays. The run is the file that
the page names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "which_attention.md"


def fill(text: str) -> str:
    """The page with the figures of the run that it names."""
    run = PAGE.parent.parent / re.search(r"`(benchmarks/results/[^`]+\.json)`", text)[1]
    rows = {(row["case"], row["pass"]): row for row in json.loads(run.read_text())["results"]}
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


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
