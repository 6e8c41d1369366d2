"""Trains a byte-level language model over any causal family of attention, as a pure function of its settings.

  fnattn train --family taylor --steps 300 --out runs/taylor
  fnattn train --family gate_loop --attention heads=32 frac_gradient_state_transition=1 --data book.txt
  fnattn train --config settings.toml --ensemble 4
  fnattn train --out runs/taylor --resume --steps 600

Leaves checkpoint.safetensors (with checkpoint.json, its config for people) and metrics.jsonl in the folder --out. Ctrl-C saves
and stops; --resume then continues with the same bits as if nothing had happened. Settings come from defaults, then the TOML
file (tables [model], [attention], [optimizer], [train], names as below with _ for -), then flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from .. import data
from ..core import check
from . import INTERRUPTED, loop
from . import settings as settings_module
from .settings import TABLES, Settings, parse_value

HELP = "train a language model over any causal family of attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for every setting, grouped as in the TOML file."""
    parser.add_argument("--out", type=Path, help="folder of the checkpoint and the metrics (default: runs/FAMILY)")
    parser.add_argument("--config", type=Path, help="TOML file with settings")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out, bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="start again although --out holds a checkpoint")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the last line")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of Settings; what is not given does not appear in the result."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    groups = {table: parser.add_argument_group(table) for table in TABLES}
    groups["attention"].add_argument("--attention", nargs="+", metavar="NAME=VALUE", default=argparse.SUPPRESS,
                                     help="options of the family, such as heads=4; `fnattn list FAMILY` explains each")
    for table, names in TABLES.items():
        for name in names:
            default, flag = fields[name].default, "--" + name.replace("_", "-")
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text = fields[name].metadata["help"] + (f" (default: {shown})" if shown != "" else "")
            keywords: dict = {"help": text, "default": argparse.SUPPRESS, "dest": name}
            if isinstance(default, bool):
                groups[table].add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
            elif name == "learning_rate":
                groups[table].add_argument(flag, type=float, nargs="+", metavar="RATE", **keywords)
            elif isinstance(default, tuple):
                groups[table].add_argument(flag, type=float, nargs=len(default), metavar="B", **keywords)
            else:
                kind = {"int": int, "float": float, "str": str}[fields[name].type]
                groups[table].add_argument(flag, type=kind, metavar=kind.__name__.upper(), **keywords)


def given(args: argparse.Namespace) -> dict:
    """The settings that were given as flags."""
    names = {f.name for f in dataclasses.fields(Settings)}
    found = {name: value for name, value in vars(args).items() if name in names}
    if len(found.get("learning_rate", ())) == 1:
        found["learning_rate"] = found["learning_rate"][0]
    if "attention" in found:
        pairs = [text.partition("=") for text in found["attention"]]
        wrong = [name for name, equals, _ in pairs if not equals]
        check(not wrong, "train: --attention must be NAME=VALUE; got {}.", " ".join(wrong),
              remedy="For example --attention heads=4.")
        found["attention"] = {name: parse_value(value) for name, _, value in pairs}
    return found


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    layers = ([settings_module.from_toml(args.config)] if args.config else []) + [given(args)]
    wanted = settings_module.make(*layers)
    folder = args.out or Path("runs") / wanted.family
    return train(folder, wanted, settings_module.merge(*layers), resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)


def train(folder: Path, wanted: Settings, changes: dict, *, resume: bool = False, overwrite: bool = False,
          quiet: bool = False) -> int:
    """Trains in a folder until the last step or Ctrl-C. `changes` are the settings that were given, for --resume."""
    path = folder / loop.CHECKPOINT
    if resume and not path.is_file():
        raise FileNotFoundError(f"train: --resume expects a checkpoint at {path}; got no such file.\n"
                                f"  Start without --resume, or name the folder with --out.")
    check(resume or overwrite or not path.exists(), "train: {} holds a checkpoint already.", folder,
          remedy="Continue it with --resume, start again with --overwrite, or choose another folder with --out.")
    if resume:
        source = changes.get("data", loop.checkpoint.load(path).extra.get("settings", {}).get("data", ""))
        text = data.load(source or None)
        first = loop.resume(path, changes, text)
    else:
        settings_module.model_config(wanted)  # before anything is read or written
        text = data.load(wanted.data or None)
        first = loop.start(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    if settings_module.threads(first.settings):
        torch.set_num_threads(settings_module.threads(first.settings))
    show = _Silent() if quiet else _display(first.settings)
    with loop.interruptible() as asked, loop.open_metrics(folder, first.step) as metrics, show:
        show.say(f"{describe(first)}; text: {text.source}, {len(text.train) / 1e6:.1f} MB and {len(text.valid) / 1e6:.1f} MB "
                 f"for validation")
        began, state, last = time.perf_counter(), first, None
        for state, report in loop.steps(first, text):
            metrics.write(loop.metrics_line(report, state.settings))
            show.step(report, state.settings)
            last = report.valid or last
            if state.step % state.settings.save_every == 0 or state.step == state.settings.steps or asked():
                loop.save(folder, state, text)
            if asked():
                break
    if asked() and state.step < state.settings.steps:
        print(f"fnattn: interrupted after step {state.step}; saved {path}.\n"
              f"  Continue with: fnattn train --out {folder} --resume", file=sys.stderr)
        return INTERRUPTED
    if last is None:
        print(f"nothing to do: {path} is of step {state.step}, and --steps is {state.settings.steps}")
        return 0
    print(f"validation loss {', '.join(f'{x:.4f}' for x in last)} nats/byte after {state.step} steps, "
          f"{time.perf_counter() - began:.0f} s; saved {path}")
    return 0


def describe(state: loop.Run) -> str:
    """The model in a few words."""
    count = sum(p.numel() for p in loop.tree.leaves(state.params)) // max(1, state.settings.ensemble)
    many = f"{state.settings.ensemble} x " if state.settings.ensemble else ""
    return f"{many}{state.settings.family}, {count:,} parameters"


# ------------------------------------------------------------------------------------------------ progress


class _Silent:
    """Shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def say(self, text: str) -> None:
        pass

    def step(self, report: loop.Report, settings: Settings) -> None:
        pass


class _Lines(_Silent):
    """One line at every measurement, for logs."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, report: loop.Report, settings: Settings) -> None:
        every = max(1, settings.steps // 20)
        if report.step % every == 0 or report.valid:
            self.say(_numbers(report, settings))


class _Bar(_Silent):
    """A bar that moves, with the latest numbers."""

    def __init__(self, settings: Settings):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                            TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(settings.family, total=settings.steps)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def step(self, report: loop.Report, settings: Settings) -> None:
        self.bar.update(self.task, completed=report.step, description=f"loss {_mean(report.loss):.3f}")
        if report.valid:
            self.say(_numbers(report, settings))


def _display(settings: Settings) -> _Silent:
    return _Bar(settings) if sys.stderr.isatty() else _Lines()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _numbers(report: loop.Report, settings: Settings) -> str:
    valid = f", validation {_mean(report.valid):.4f}" if report.valid else ""
    rate = settings.batch * settings.length * max(1, settings.ensemble) / report.seconds
    speed = "" if valid else f", {rate:,.0f} bytes/s"  # a step with a measurement says nothing about it
    return f"step {report.step}/{settings.steps}: loss {_mean(report.loss):.4f}{valid}{speed}"
