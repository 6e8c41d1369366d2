"""The table as text and as JSON."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fnattn

from . import scaling, upstream
from .peaks import Peaks
from .table import met

HEAD = (f"{'case':<23} {'shape':<31} {'pass':<5}{'upstream ms':>12}{'ours ms':>10}{'ratio':>8}{'goal':>7} {'':<4}"
        f"{'floor ms':>9}{'x floor':>8}  extra MB: ours, upstream")
SHORT = {"forward": "fwd", "forward+backward": "f+b", "step": "step"}


def machine(device: torch.device, peaks: Peaks | None, quick: bool, rounds: int) -> dict[str, Any]:
    """What a reader must know to compare the numbers: kind of processor and versions, no names of machines or folders."""
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "fnattn": fnattn.__version__,
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
            "processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type, "threads": torch.get_num_threads(),
            "clock": "processor time" if torch.get_num_threads() == 1 and device.type == "cpu" else "wall",
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None, "quick": quick, "rounds": rounds,
            "upstream": upstream.versions(), "peaks": peaks._asdict() if peaks else None}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def preface(about: dict[str, Any]) -> str:
    """What stands above the table."""
    text = (f"fnattn {about['fnattn']}, torch {about['torch']}, {about['processor']} ({about['instructions']}), "
            f"device {about['device']}, "
            f"{about['threads']} of {about['cores']} cores, {about['clock']}, load {about['load']}, float32, "
            f"median of {about['rounds']} rounds")
    if about["peaks"]:
        p = about["peaks"]
        text += (f"\npeaks: {p['flops'] / 1e9:.0f} Gflop/s, {p['exps'] / 1e9:.1f} Gexp/s, {p['bytes'] / 1e9:.0f} GB/s ({p['how']})")
    gone = sorted(name for name, version in about["upstream"].items() if version == "missing")
    if gone:
        text += f"\nnot installed, so their columns are empty: {', '.join(gone)}"
    return text


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['case']:<23} {row['shape']:<31} "
    if "wrong" in row:
        return f"{head}WRONG: {row['wrong']}"
    if row["kind"] == "scaling":
        costs = " ".join(f"{cost:.3g}" for cost in row["ns_per_token"])
        flat = "flat" if row["growth"] <= scaling.FLAT else "NOT flat"
        return f"{head}ns per token: {costs}; growth per {row['per']} {row['growth']:.2f}, {flat}"
    mark = {True: "ok", False: "MISS", None: ""}[met(row)]
    if row["kind"] == "transform":
        sign = ">=" if row["more"] else "<="
        goal = "" if row["goal"] is None else f"{sign}{row['goal']:g}"
        what = (f"{row['pass']} {row['unit_ms']:.3g} ms, this {row['ours_ms']:.3g} ms: {row['multiple']:.2f} "
                f"{'times as fast' if row['more'] else 'units'}")
        peer = f"; {row['peer']} {row['upstream_ms']:.3g} ms, {row['ratio']:.2f} times ours" if row.get("upstream_ms") else ""
        return f"{head}{what} {goal} {mark}{peer}"
    ratio, goal = _number(row["ratio"], ".1f"), "" if row["goal"] is None else f"{row['goal']:g}"
    over = "" if row["floor_ms"] is None else f"{row['ours_ms'] / row['floor_ms']:.1f}"
    held = ""
    if row["memory_ours_mb"] is not None:
        held = f"  {row['memory_ours_mb']:.1f}, {_number(row['memory_upstream_mb'], '.0f') or '-'}"
    text = (f"{head}{SHORT[row['pass']]:<5}{_number(row['upstream_ms'], '.3f'):>12}{_number(row['ours_ms'], '.3f'):>10}{ratio:>8}{goal:>7} "
            f"{mark:<4}{_number(row['floor_ms'], '.3f'):>9}{over:>8}{held}")
    return text + (f"  ({row['missing']})" if row["missing"] else "")


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def tail(rows: list[dict[str, Any]]) -> str:
    """How many goals are reached."""
    marks = [met(row) for row in rows]
    wrong = sum("wrong" in row for row in rows)
    text = f"goals reached: {marks.count(True)} of {marks.count(True) + marks.count(False)}"
    return text + (f"; WRONG: {wrong} case(s), not timed" if wrong else "")
