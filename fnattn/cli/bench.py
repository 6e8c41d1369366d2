"""Times every operator and layer against the upstream package that it replaces.

  fnattn bench                                  the whole table, some minutes on one core
  fnattn bench --case "taylor d16" "decode"     some of it; a word takes every case that contains it
  fnattn bench --quick                          small shapes, three rounds: does everything run?
  fnattn bench --op taylor --n 1024 4096        each implementation of an operator against plain torch
  fnattn bench --device cuda --out FILE.json    all of it at the sizes of a GPU, with every kernel checked first, within --seconds
  fnattn bench --crossovers                     where one implementation overtakes another, and the table of what is taken

Before a number is printed, value and gradients must agree with float64; a case that does not is reported as WRONG and the
command fails. Both sides run in one process, taking turns. One thread is measured in processor time, several on the wall
clock. Upstream packages are optional: pip install fnattn[bench]; a missing one leaves its column empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..core import check
from ..ops.report import CASES as OPERATORS
from ..ops.report import devices

HELP = "time every operator and layer against upstream"
# glibc gives large blocks back at once and faults every page in again at the next call. That is most of the time of what
# makes large tables, and depends on what ran before; kept memory makes the comparison fair and repeatable.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "100000000"}
# of one operator; what the cases of the whole table look like is fixed
SIZES = {"b": (2, "batch"), "h": (8, "heads"), "n": ([256, 1024], "lengths"), "d": (16, "width of a head"),
         "repeats": (5, "runs of which the median counts")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases, at which sizes."""
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases, or parts of their names (default: all); see --list")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds, no memory")
    parser.add_argument("--rounds", type=int, help="rounds of which the median counts (default: 7, or 3 with --quick); "
                        "training, derivatives and bfloat16, where a few percent decide, take five times as many")
    parser.add_argument("--no-memory", action="store_true", help="leave the column of memory empty")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--suite", choices=("upstream", "gpu"), help="the published table against upstream, or all kernels at the sizes of "
                        "a GPU (default: gpu on cuda)")
    parser.add_argument("--seconds", type=float, default=420, help="of --suite gpu: after so long nothing more is measured")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; several are worth it on an idle machine only")
    parser.add_argument("--out", type=Path, help="write the results as JSON, and a plot beside it")
    single = parser.add_argument_group("each implementation of an operator against plain torch")
    single.add_argument("--op", nargs="+", metavar="NAME", help=f"operators, or all of them: {', '.join(OPERATORS)}")
    single.add_argument("--crossovers", action="store_true", help="all implementations at short and long sequences, and the table of "
                        'thresholds by which impl="auto" chooses; with --op, of these operators')
    for name, (default, what) in SIZES.items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        single.add_argument(f"--{name}", type=int, help=f"{what} (default: {default})", **several)


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    for name, (default, _) in SIZES.items():
        given = getattr(args, name)
        check(given is None or args.op and not args.crossovers, "bench: --{} is for --op alone; got --{} {}.", name, name, given,
              remedy="Name operators, or all: --op all. The table and --crossovers have sizes of their own, or small ones with --quick.")
        setattr(args, name, default if given is None else given)
    for name, least in (("b", 1), ("h", 1), ("d", 2), ("repeats", 1), ("threads", 1), ("rounds", 1), ("seconds", 1)):
        value = getattr(args, name)
        check(value is None or value >= least, "bench: --{} must be at least {}; got {}.", name, least, value,
              remedy="Give a larger number.")
    check(all(n >= 1 for n in args.n), "bench: --n must be at least 1; got {}.", args.n, remedy="Give positive lengths.")
    rotary = args.op and {"all", "rotary"}.intersection(args.op)
    check(args.d % 2 == 0 or not rotary, "bench: --d must be even, for rotary; got {}.", args.d, remedy="Give an even width.")
    check(args.device in devices(), "bench: this machine has {}; got --device {}.", ", ".join(devices()), args.device,
          remedy="Choose one of those.")
    if args.crossovers:
        return _crossovers(args)
    if args.op:
        return _implementations(args)
    if args.suite == "gpu" or args.suite is None and args.device == "cuda":
        from . import bench_gpu
        return bench_gpu.run(args, lambda found: _write(args.out, found) if args.out else None)
    from ..bench import table
    if args.list:
        print("\n".join(table.names()))
        return 0
    chosen = _chosen(args.case, table.names())
    if platform.system() == "Linux" and args.device == "cpu" and any(os.environ.get(k) != v for k, v in KEEP.items()):
        return subprocess.run(_command(args), env={**os.environ, **KEEP}, check=False).returncode
    torch.set_num_threads(args.threads)
    return _table(args, chosen)


def _chosen(asked: list[str] | None, known: list[str]) -> list[str]:
    """The cases whose name is asked for, or contains it."""
    found: list[str] = []
    for word in asked or known:
        hits = [name for name in known if name == word] or [name for name in known if word in name]
        check(bool(hits), "bench: expected a case; got {!r}.", word, remedy="Choose from: " + ", ".join(known) + ".")
        found += [name for name in hits if name not in found]
    return found


def _command(args: argparse.Namespace) -> list[str]:
    """This command again, for a process with other settings of its memory."""
    flags = [f"--{name.replace('_', '-')}" for name in ("quick", "no_memory") if getattr(args, name)]
    values = [word for name in ("rounds", "device", "threads", "out") if getattr(args, name) is not None
              for word in (f"--{name}", str(getattr(args, name)))]
    python = [sys.executable, "-W", "ignore::UserWarning", "-m", "fnattn"]  # upstream's warnings are not ours to fix
    return [*python, "bench", *flags, *values, *(["--case", *args.case] if args.case else [])]


def _table(args: argparse.Namespace, chosen: list[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench import peaks, plots, report, table
    device = torch.device(args.device)
    options = table.Options(device, args.rounds or (3 if args.quick else 7), args.quick, not (args.quick or args.no_memory))
    limits = peaks.measure(args.threads) if device.type == "cpu" else None
    about = report.machine(device, limits, args.quick, options.rounds)
    print(report.preface(about) + "\n\n" + report.HEAD, flush=True)
    # Drawn at every row, not by a thread of its own: it would take turns with what is measured.
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
                   console=Console(stderr=True), transient=True, redirect_stdout=False, auto_refresh=False)
    results: list[dict[str, Any]] = []
    with bar:
        task = bar.add_task("", total=len(chosen), completed=-1)
        for row in table.rows(chosen, options, limits, lambda name: bar.update(task, description=name, advance=1, refresh=True)):
            results.append(row)
            print(report.line(row), flush=True)
            if args.out:  # after every row: a run of many minutes may be interrupted
                _write(args.out, {"machine": about, "results": [{**row, "met": table.met(row)} for row in results]})
    print("\n" + report.tail(results))
    if args.out:
        print(f"wrote {args.out}")
        drawn = plots.picture(results, f"fnattn {about['fnattn']}, torch {about['torch']}, {about['processor']}, "
                                       f"{about['threads']} thread(s), {about['date']}")
        if drawn:
            checkpoint.replace(args.out.with_suffix(".png"), drawn)
            print(f"wrote {args.out.with_suffix('.png')}")
    return 1 if any(map(table.failed, results)) else 0


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(path, (json.dumps(content, indent=1) + "\n").encode())


def _operators(asked: list[str] | None) -> list[str]:
    names = list(OPERATORS) if asked in (None, ["all"]) else list(asked or ())
    for name in names:
        check(name in OPERATORS, "bench: expected an operator; got {!r}.", name,
              remedy="Choose from: all, " + ", ".join(OPERATORS) + ".")
    return names


def _crossovers(args: argparse.Namespace) -> int:
    from ..bench import crossovers, report
    names = _operators(args.op)
    torch.set_num_threads(args.threads)
    rounds, lengths = args.rounds or (3 if args.quick else 7), crossovers.QUICK if args.quick else crossovers.LENGTHS
    about = report.machine(torch.device(args.device), None, args.quick, rounds)
    print(report.preface(about) + "\n\n" + crossovers.HEAD, flush=True)
    results = []
    for row in crossovers.rows(names, lengths, args.device, rounds):
        results.append(row)
        print(crossovers.line(row), flush=True)
    print('\n"<": another choice is faster. What impl="auto" goes by, in fnattn_kernels/crossovers.py:\n\n' + crossovers.table())
    if args.out:
        _write(args.out, {"machine": about, "results": results})
        print(f"wrote {args.out}")
    return 0


def _implementations(args: argparse.Namespace) -> int:
    from ..bench import implementations
    names = _operators(args.op)
    torch.set_num_threads(args.threads)
    about = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine(),
             "device": args.device, "threads": torch.get_num_threads(), "dtype": "float32", "repeats": args.repeats}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(implementations.HEAD)
    results = []
    for name in names:
        for n in args.n:
            for row in implementations.measure(name, {"b": args.b, "h": args.h, "n": n, "d": args.d}, args.device, args.repeats):
                results.append(row)
                print(implementations.line(row), flush=True)
    if args.out:
        _write(args.out, {"machine": about, "results": results})
        print(f"wrote {args.out}")
    return 1 if any("wrong" in row for row in results) else 0
