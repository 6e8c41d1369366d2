"""Trains a small language model on the sources of Python's standard library, samples from it, and writes a report.

  fnattn demo
  fnattn demo --family taylor --out runs/taylor
  fnattn demo --data book.txt --steps 1000

Leaves in --out: checkpoint.safetensors, metrics.jsonl, loss.png, sample.txt, and report.html, one page with everything in it.
With the default settings a validation loss of about 1.7 nats per byte (GateLoop) or 2.0 (Taylor) is to be expected; a model
that knows nothing has ln 256 = 5.55.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from .. import data, random
from . import html, loop, plots
from .generate import load_member
from .settings import make as make_settings
from .settings import merge
from .train import add_settings, given, train

HELP = "train on Python's own sources and write a report, all in one"
PROMPT = "def "
SAMPLE = 600  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and every setting of `train`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write; an older demo there is replaced")
    parser.add_argument("--prompt", default=PROMPT, help="text that the sample continues")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    changes = merge({"eval_every": 60, "schedule": "cooldown"}, given(args))
    settings = make_settings(changes)
    began = time.perf_counter()
    code = train(args.out, settings, changes, overwrite=True)
    if code:
        return code
    trained = time.perf_counter() - began
    write(args.out, args.prompt, trained)
    print(f"wrote {args.out / 'report.html'}; {time.perf_counter() - began:.0f} s in all")
    return 0


def write(folder: Path, prompt: str, seconds: float) -> None:
    """The plot, the sample and the page, from what a training left in its folder."""
    threads = torch.get_num_threads()
    found = loop.checkpoint.load(folder / loop.CHECKPOINT)
    settings = make_settings(found.extra["settings"])
    text = data.load(settings.data or None)
    entries = [json.loads(line) for line in (folder / loop.METRICS).read_text().splitlines()]
    state = loop.Run(settings, found.params, (), found.key, found.step)
    by_position = loop.evaluate(state, text, settings.eval_windows).reshape(-1, settings.length)
    by_position = by_position.unflatten(0, (max(1, settings.ensemble), -1)).mean((0, 1)).tolist()
    sample = _sample(folder, prompt)
    (folder / "sample.txt").write_text(sample + "\n")
    (folder / "loss.png").write_bytes(plots.losses(entries, plots.ALONE))
    page = html.page(
        title=f"{settings.family}: {_last(entries):.3f} nats per byte",
        intro=f"A byte-level language model of {settings.depth} blocks of {settings.family} attention at width {settings.dim}, "
              f"trained for {found.step} steps of {settings.batch} x {settings.length} bytes in {seconds:.0f} s on "
              f"{threads} CPU thread{'s' * (threads > 1)}. Text: {text.source}, {len(text.train) / 1e6:.1f} MB, and "
              f"{len(text.valid) / 1e6:.1f} MB of other files for validation.",
        figures=[
            ("Loss during training", "Nats per byte; a model that knows nothing has ln 256 = 5.55.",
             plots.losses(entries, plots.LIGHT), plots.losses(entries, plots.DARK)),
            ("Loss by position", "Validation loss of each byte in its window: it falls as far as the model uses what came before.",
             plots.positions(by_position, plots.LIGHT), plots.positions(by_position, plots.DARK))],
        sample=(f"Drawn at temperature 0.8 through the model's state, after the prompt {prompt!r}.", sample),
        tables=[("Model", vars(found.cfg) | {"attention": found.cfg.attention}), ("Training", vars(settings))])
    loop.checkpoint.replace(folder / "report.html", page.encode())


def _last(entries: list[dict]) -> float:
    value = [entry["valid_loss"] for entry in entries if "valid_loss" in entry][-1]
    return min(value) if isinstance(value, list) else value


def _sample(folder: Path, prompt: str) -> str:
    from ..models.generate import generate
    params = load_member(folder, 0)
    tokens = generate(params, data.encode(prompt)[None], SAMPLE, key=random.key(0), temperature=0.8)
    return prompt + data.decode(tokens[0])
