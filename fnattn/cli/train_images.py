"""Trains DALLE on scikit-learn's handwritten digits: reads a digit's name, draws the digit, one grey level at a time.

  fnattn train-images
  fnattn train-images --steps 400 --attn-types full axial_row --out runs/small
  fnattn train-images --resume

Leaves in --out: checkpoint.safetensors, metrics.jsonl, grid.png and report.html. The report says how often the digit drawn is
the one asked for, judged by a classifier of real digits, beside the same figure for a control that was trained without text.
`fnattn generate-images` draws from the checkpoint. Ctrl-C saves and stops; --resume continues with the same bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, optim, random, tree
from ..core import check
from ..models import dalle
from . import INTERRUPTED, digits, html, loop, plots

HELP = "train a text-to-image transformer on handwritten digits"
TYPES = ("full", "axial_row", "axial_col", "conv_like")
NULL_CONDITION = 0.1  # share of the texts that are left out in training, so that guidance has something to compare with
DRAWN_PER_DIGIT = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and training settings."""
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the checkpoint and the report")
    parser.add_argument("--steps", type=int, default=500, help="updates")
    parser.add_argument("--batch", type=int, default=32, help="pictures per update")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest rate of the cosine schedule")
    parser.add_argument("--dim", type=int, default=64, help="width of the model")
    parser.add_argument("--depth", type=int, default=4, help="number of layers")
    parser.add_argument("--heads", type=int, default=4, help="heads per attention")
    parser.add_argument("--dim-head", type=int, default=24, help="width of a head")
    parser.add_argument("--attn-types", nargs="+", default=list(TYPES), metavar="TYPE", help="attention types of the layers, in turn")
    parser.add_argument("--reversible", action="store_true", help="activation memory that does not grow with depth")
    parser.add_argument("--cond-scale", type=float, default=2.0, help="guidance when drawing for the report")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--no-control", action="store_true", help="train no control without text")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out, bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="start again although --out holds a checkpoint")


class Run(NamedTuple):
    """A training between two steps."""

    params: dalle.Params
    opt_state: Any
    key: Tensor
    step: int


def config(args: argparse.Namespace) -> dalle.Config:
    """The model that the flags describe."""
    return dalle.Config(dim=args.dim, depth=args.depth, heads=args.heads, dim_head=args.dim_head, reversible=args.reversible,
                        attn_types=tuple(args.attn_types), num_image_tokens=digits.LEVELS, image_fmap_size=digits.SIDE,
                        num_text_tokens=digits.LETTERS, text_seq_len=digits.TEXT_LEN)


def settings(args: argparse.Namespace) -> dict:
    """What decides the result of a training, for the checkpoint."""
    return {"steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate, "seed": args.seed}


def optimizer(chosen: dict) -> optim.Optimizer:
    """AdamW under a warmed-up cosine, gradients clipped to norm 1."""
    rate = optim.warmup(optim.cosine(chosen["learning_rate"], chosen["steps"], chosen["learning_rate"] / 50), chosen["steps"] // 20)
    return optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.01))


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    path = args.out / loop.CHECKPOINT
    check(args.steps >= 1 and args.batch >= 1, "train-images: --steps and --batch must be at least 1; got {} and {}.", args.steps,
          args.batch, remedy="Leave them out for the defaults.")
    check(args.resume or args.overwrite or not path.exists(), "train-images: {} holds a checkpoint already.", args.out,
          remedy="Continue it with --resume, start again with --overwrite, or choose another folder with --out.")
    train_set, held_out = digits.load()
    began, chosen = time.perf_counter(), settings(args)
    start = _resume(path, chosen) if args.resume else begin(config(args), chosen, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    entries: list[dict] = []
    with loop.interruptible() as asked, loop.open_metrics(args.out, start.step) as metrics:
        def note(entry: dict) -> None:
            entries.append(entry)
            metrics.write(json.dumps(entry) + "\n")

        end = train(start, chosen, train_set, held_out, note, asked, label="with text")
        save(path, end, chosen)
        if asked():
            print(f"fnattn: interrupted after step {end.step}; saved {path}.\n  Continue with: fnattn train-images --out {args.out} "
                  f"--resume", file=sys.stderr)
            return INTERRUPTED
        control = None
        if not args.no_control:
            blank = digits.Digits(train_set.images, torch.full_like(train_set.labels, -1))
            control = train(begin(end.params.cfg, chosen, args.seed + 1), chosen, blank, held_out, None, asked, label="control")
            if asked():
                control = None
    figures = write(args, end, control, train_set, held_out, time.perf_counter() - began)
    print(f"{figures['asked for']} of the digits drawn are the ones asked for; wrote {args.out / 'report.html'}; "
          f"{time.perf_counter() - began:.0f} s in all")
    return 0


def begin(cfg: dalle.Config, chosen: dict, seed: int) -> Run:
    """A training before its first step."""
    key = random.key(seed)
    params = dalle.init(random.fold_in(key, "params"), cfg)
    return Run(params, optimizer(chosen).init(params), key, 0)


def _resume(path: Path, chosen: dict) -> Run:
    found = checkpoint.load(path)
    before = found.extra.get("images")
    check(isinstance(found.cfg, dalle.Config) and before is not None, "train-images: {} holds no training of pictures.", path,
          remedy="Name the folder of one with --out.")
    check(before == chosen, "train-images: {} was trained with {}; got {}.", path, before, chosen,
          remedy="Give the same --steps, --batch, --learning-rate and --seed.")
    state = checkpoint.opt_state(found, optimizer(chosen).init(found.params))
    return Run(found.params, state, found.key, found.step)


def save(path: Path, state: Run, chosen: dict) -> None:
    """Writes the checkpoint."""
    checkpoint.save(path, state.params, opt_state=state.opt_state, key=state.key, step=state.step, extra={"images": chosen})


def texts(data: digits.Digits) -> Tensor:
    """Names of the digits; padding where the label is -1."""
    return torch.where(data.labels[:, None] < 0, 0, digits.texts(data.labels.clamp(min=0)))


def train(state: Run, chosen: dict, data: digits.Digits, held_out: digits.Digits, note: Callable | None, asked: Callable, *,
          label: str) -> Run:
    """Runs to the last step or until asked to stop."""
    update, words = optimizer(chosen).update, texts(data)
    judged = texts(held_out) if bool((data.labels >= 0).all()) else torch.zeros_like(texts(held_out))
    with _progress(label, chosen["steps"], state.step) as advance:
        while state.step < chosen["steps"] and not asked():
            key = random.fold_in(state.key, state.step)
            rows = random.bits(random.fold_in(key, "rows"), (chosen["batch"],)) % len(words)
            value, grads = tree.value_and_grad(dalle.loss)(state.params, words[rows], data.images[rows],
                                                           null_cond_prob=NULL_CONDITION, dropout_key=random.fold_in(key, "drop"))
            check(bool(value.isfinite()), "train-images: the loss of step {} is {}, no longer a number.", state.step + 1, float(value),
                  remedy="Use a smaller --learning-rate.")
            updates, opt_state = update(grads, state.opt_state, state.params)
            state = Run(optim.apply_updates(state.params, updates), opt_state, state.key, state.step + 1)
            entry = {"step": state.step, "loss": float(value)}
            if state.step % 100 == 0 or state.step == chosen["steps"]:
                with torch.no_grad():
                    entry["valid_loss"] = float(dalle.loss(state.params, judged, held_out.images))
            advance(entry)
            if note is not None:
                note(entry)
    return state


class _progress:
    """A bar on a terminal, a line at every measurement elsewhere."""

    def __init__(self, label: str, total: int, done: int):
        from rich.console import Console
        from rich.progress import Progress

        self.label, self.lines = label, not sys.stderr.isatty()
        self.bar = Progress(console=Console(stderr=True), disable=self.lines)
        self.task = self.bar.add_task(label, total=total, completed=done)

    def __enter__(self) -> Callable[[dict], None]:
        self.bar.start()
        return self._advance

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def _advance(self, entry: dict) -> None:
        text = f"{self.label}: loss {entry['loss']:.3f}"
        self.bar.update(self.task, completed=entry["step"], description=text)
        if self.lines and "valid_loss" in entry:
            print(f"{text}, held-out {entry['valid_loss']:.3f} at step {entry['step']}", file=sys.stderr, flush=True)


def draw(params: dalle.Params, per_digit: int, key: Tensor, cond_scale: float) -> tuple[Tensor, Tensor]:
    """Pictures of all ten digits and the labels that were asked for: [10 per_digit, 64], [10 per_digit]."""
    labels = torch.arange(10).repeat_interleave(per_digit)
    with torch.no_grad():
        return dalle.generate_images(params, digits.texts(labels), key, filter_thres=0.0, cond_scale=cond_scale), labels


def write(args: argparse.Namespace, end: Run, control: Run | None, train_set: digits.Digits, held_out: digits.Digits,
          seconds: float) -> dict:
    """grid.png and report.html. Returns the figures of the report."""
    judge = digits.judge(train_set, held_out)
    pictures, labels = draw(end.params, DRAWN_PER_DIGIT, random.fold_in(end.key, "report"), args.cond_scale)
    seen = judge(pictures)
    figures = {"asked for": f"{float((seen == labels).float().mean()):.0%}", "pictures judged": len(labels)}
    if control is not None:
        others, _ = draw(control.params, DRAWN_PER_DIGIT, random.fold_in(control.key, "report"), 1.0)
        figures["control, trained without text"] = f"{float((judge(others) == labels).float().mean()):.0%}"
    figures["classifier on held-out real digits"] = f"{judge.accuracy:.1%}"
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    image = digits.grid(pictures, DRAWN_PER_DIGIT)
    (args.out / "grid.png").write_bytes(image)
    entries = [json.loads(line) for line in (args.out / loop.METRICS).read_text().splitlines()]
    confusion = "\n".join(f"{digits.NAMES[d]:>6}: " + " ".join(str(int(s)) for s in seen[labels == d]) for d in range(10))
    page = html.page(
        title=f"Digits drawn from their names: {figures['asked for']} as asked",
        intro=f"A DALLE of {args.depth} layers ({', '.join(end.params.cfg.attn_types)}) at width {args.dim}, trained for {end.step} steps "
              f"of {args.batch} pictures in {seconds:.0f} s with its control, on {len(train_set.labels)} real digits.",
        figures=[("Drawn", f"Zero to nine, {DRAWN_PER_DIGIT} of each, guidance {args.cond_scale:g}.", image, image),
                 ("Loss during training", "Weighted nats per token; dark: held-out digits.",
                  plots.losses(entries, plots.LIGHT), plots.losses(entries, plots.DARK))],
        sample=("What the classifier saw in each row.", confusion),
        tables=[("How often the digit drawn is the one asked for", figures), ("Model", vars(end.params.cfg)),
                ("Training", settings(args))])
    checkpoint.replace(args.out / "report.html", page.encode())
    return figures
