"""`fnattn bench --suite gpu`: whether every kernel is right, then how fast it is, within a budget of time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from ..core import check
from ..ops.report import CASES

CHECKING = 0.55  # part of the budget after which checks that are not done are given up


def run(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> int:
    """Prints every row as it comes, and writes all of them again after each. Returns the exit code."""
    from ..bench import gpu_run, meter, numbers, report
    from ..bench.gpu import RACES

    began, device = time.perf_counter(), torch.device(args.device)
    chosen = _chosen(args.case, list(RACES))
    if args.list:
        print("\n".join(RACES))
        return 0
    watch = meter.Meter(device, args.seconds)
    about: dict[str, Any] = report.machine(device, None, args.quick, meter.MOST)
    results: dict[str, Any] = {"machine": about, "numbers": [], "verdicts": [], "results": []}

    def add(kind: str, row: dict[str, Any], text: str) -> None:
        results[kind].append(row)
        print(text, flush=True)
        write(results)

    print(report.preface(about) + "\n\nIs it right? Errors as parts of the largest entry\n", flush=True)
    # All at once: what takes time here is compiling, on one core each. It is done before anything is timed.
    jobs = [("gpu_run", name) for name in chosen] + ([] if args.case else [("numbers", name) for name in CASES])
    for module, found in numbers.everywhere(jobs, args.device, args.quick, CHECKING * args.seconds):
        for row in found:
            if module == "numbers" or "case" not in row:
                add("numbers", row, numbers.line(row))
            else:
                add("verdicts", row, gpu_run.line(row))
    peaks = watch.peaks()
    about["peaks"] = {str(dtype).removeprefix("torch."): p._asdict() for dtype, p in peaks.items()}
    print("\npeaks: " + ", ".join(f"{dtype} {p['flops'] / 1e12:.1f} Tflop/s" for dtype, p in about["peaks"].items())
          + f", {peaks[torch.float32].exps / 1e9:.0f} Gexp/s, {peaks[torch.float32].bytes / 1e9:.0f} GB/s\n\n" + gpu_run.HEAD, flush=True)
    said = gpu_run.refused(results["verdicts"])
    for name in chosen:
        for row in gpu_run.rows(RACES[name], said, watch, peaks, args.quick):
            add("results", row, gpu_run.line(row))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    wrong = sum("wrong" in row for kind in ("numbers", "verdicts", "results") for row in results[kind])
    about["seconds"] = round(time.perf_counter() - began)
    print(f"\nwrong, or not checked to the end: {wrong}; {about['seconds']} s")
    write(results)
    return 1 if wrong else 0


def _chosen(asked: list[str] | None, known: list[str]) -> list[str]:
    found = [name for name in known if not asked or any(word in name for word in asked)]
    check(bool(found), "bench: expected a case of the GPU's suite; got {}.", asked, remedy="Choose from: " + ", ".join(known) + ".")
    return found
