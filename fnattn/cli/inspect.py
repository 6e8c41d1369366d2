"""Looks inside a trained language model and writes what it finds as a report.

  fnattn inspect runs/demo
  fnattn inspect runs/demo --text "def main(argv):" --samples 256 --out looks
  fnattn inspect runs/ensemble --member 2

Leaves in --out: report.html (one page with everything in it, works offline) and report.json (the same numbers). In it: the loss
curve, gradient norms per layer and head, the gradient noise scale, the spectrum of the Hessian, the exact attention maps of every
layer on a text, how far back each head looks, and the samples whose gradients stand out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .. import attentions, checkpoint, data, ensemble
from ..core import check
from ..models import lm
from . import inspect_page
from .inspect_measure import MEASURES, Subject
from .loop import CHECKPOINT, METRICS

HELP = "look inside a checkpoint: gradients, curvature, attention maps"
TEXT = 64  # bytes of the validation text whose attention maps are shown by default
LONGEST = 1024  # bytes of a text: maps grow with the square


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the text, how much to measure, and where to write."""
    parser.add_argument("checkpoint", type=Path, help="folder of a training, or its checkpoint.safetensors")
    parser.add_argument("--out", type=Path, help="folder to write (default: inspect beside the checkpoint)")
    parser.add_argument("--text", help=f"text whose attention maps are shown (default: the first {TEXT} bytes for validation)")
    parser.add_argument("--data", help="file or folder of text to measure on (default: what the model was trained with)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="windows of the validation text whose gradients are taken")
    parser.add_argument("--curvature-samples", type=int, default=8, metavar="N", help="windows for the Hessian")
    parser.add_argument("--length", type=int, metavar="N", help="bytes per window (default: that of the training)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="Lanczos runs for the spectrum of the Hessian")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="Hessian-vector products per run")
    parser.add_argument("--shown", type=int, default=8, metavar="N", help="heads per layer whose maps are shown, largest gradient first")
    parser.add_argument("--member", type=int, default=0, metavar="I", help="member of an ensemble")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts and probes")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the last line")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    began = time.perf_counter()
    subject = load(args)
    folder = args.out or subject.folder / "inspect"
    found: dict[str, Any] = {"checkpoint": str(subject.path), "step": subject.step, "parameters": subject.count,
                             "text": subject.shown_text}
    for number, (name, (title, measure)) in enumerate(MEASURES.items(), 1):
        with _progress(f"{number}/{len(MEASURES)} {title}", args.quiet):
            result = measure(subject)
        if result is not None:
            found[name] = result
    folder.mkdir(parents=True, exist_ok=True)
    with _progress("drawing", args.quiet):
        page = inspect_page.page(subject, found)
    checkpoint.replace(folder / "report.html", page.encode())
    checkpoint.replace(folder / "report.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    print(f"wrote {folder / 'report.html'} and {folder / 'report.json'}; {time.perf_counter() - began:.0f} s")
    return 0


def load(args: argparse.Namespace) -> Subject:
    """What is looked at: the model, the texts, the metrics of its training."""
    path = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    for name in ("samples", "curvature_samples", "runs", "steps", "shown"):
        low = 2 if name == "samples" else 1
        check(getattr(args, name) >= low, "inspect: --{} must be at least {}; got {}.", name.replace("_", "-"), low, getattr(args, name),
              remedy="Leave it out for the default.")
    found = checkpoint.load(path)
    check(isinstance(found.cfg, lm.Config) and found.cfg.num_tokens == 256, "inspect: {} does not hold a language model over bytes; "
          "got {}.", path, type(found.cfg).__module__, remedy="Train one with `fnattn train`, or use fnattn.inspect in Python.")
    check(0 <= args.member < max(1, found.members), "inspect: {} has {} members; got --member {}.", path, max(1, found.members),
          args.member, remedy="Count from 0.")
    params = ensemble.member(found.params, args.member) if found.members else found.params
    settings = found.extra.get("settings", {})
    torch.set_num_threads(1)  # small operators on a busy machine run faster alone
    exact = attentions.gradient_is_exact(found.cfg.attention)
    text = data.load((settings.get("data") if args.data is None else args.data) or None)
    length = min(args.length or settings.get("length", 128), found.cfg.seq_len or 1 << 30)
    data.check_length("inspect", text.valid, length + 1, f"the validation text of {text.source}")
    windows = data.windows(text.valid, length + 1, args.samples)
    check(windows.shape[0] >= 2, "inspect: {} has room for {} window of {} bytes only; at least 2 are needed.", text.source,
          windows.shape[0], length + 1, remedy="Use a smaller --length or more text.")
    shown = data.encode(args.text) if args.text else text.valid[:TEXT].long()
    check(2 <= shown.shape[0] <= LONGEST, "inspect: --text must have 2 to {} bytes; got {}.", LONGEST, shown.shape[0],
          remedy="Give a few lines of text.")
    limit = getattr(found.cfg.attention, "seq_len", None) or found.cfg.seq_len or shown.shape[0]
    return Subject(params=params if exact else exactly(params), path=path, folder=path.parent, step=found.step, settings=settings,
                   metrics=_metrics(path.parent / METRICS, args.member), windows=windows, source=text.source, shown=shown[:limit],
                   exact=exact, member=args.member if found.members else None, curvature_samples=args.curvature_samples,
                   runs=args.runs, steps=args.steps, heads_shown=args.shown, seed=args.seed)


def exactly(params: lm.Params) -> lm.Params:
    """The same model, whose config scales no gradients: what differentiation returns is then the derivative."""
    cfg = params.cfg.attention
    ones = {name: 1.0 for name in vars(cfg) if name.startswith("frac_gradient")}
    cfg = dataclasses.replace(cfg, **ones)
    blocks = tuple(block._replace(attn=block.attn._replace(cfg=cfg)) for block in params.blocks)
    return params._replace(cfg=dataclasses.replace(params.cfg, attention=cfg), blocks=blocks)


def _metrics(path: Path, member: int) -> list[dict]:
    """The lines of metrics.jsonl, of one member; none if the training left no such file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # the last line of a killed process
            lines.append(json.loads(line))
    return [{key: value[member] if isinstance(value, list) else value for key, value in line.items()} for line in lines]


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[None]:
    """Shows what is being done, and how long it took."""
    if quiet:
        yield
        return
    if sys.stderr.isatty():
        from rich.console import Console
        console = Console(stderr=True)
        began = time.perf_counter()
        with console.status(what):
            yield
        console.print(f"{what} ({time.perf_counter() - began:.1f} s)", highlight=False, markup=False)
        return
    began = time.perf_counter()
    print(f"{what} ...", file=sys.stderr, flush=True)
    yield
    print(f"{what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
