"""The training loop: a pure step, run until the last one, with checkpoints and measurements on the way.

The state of a training is (params, optimiser state, keys, step). Batches and dropout are drawn from the key and the step, so
a training that was stopped continues with the same bits as one that never was.
"""

from __future__ import annotations

import json
import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, data, ensemble, optim, random, tree
from ..core import check
from ..models import lm
from . import settings as settings_module
from .settings import FREE, Settings

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"


class Run(NamedTuple):
    """A training between two steps. With an ensemble every leaf of params, opt_state and keys is stacked."""

    settings: Settings
    params: lm.Params
    opt_state: Any
    keys: Tensor     # [2], or [members, 2]
    step: int


class Report(NamedTuple):
    """What one step found. Lists have one number per member; valid is None where nothing was measured."""

    step: int
    loss: list[float]
    valid: list[float] | None
    grad_norm: list[float]
    seconds: float


# ------------------------------------------------------------------------------------------------ starting


def start(settings: Settings) -> Run:
    """A training before its first step."""
    cfg = settings_module.model_config(settings)
    if settings.ensemble:
        keys = ensemble.keys(settings.seed, settings.ensemble)
        params = ensemble.init(keys, lambda key: lm.init(random.fold_in(key, "params"), cfg))
    else:
        keys = random.key(settings.seed)
        params = lm.init(random.fold_in(keys, "params"), cfg)
    return Run(settings, params, _opt_init(settings, params), keys, 0)


def _opt_init(settings: Settings, params: lm.Params) -> Any:
    optimizer = settings_module.optimizer(settings, 0.0)
    return tree.vmap(optimizer.init)(params) if settings.ensemble else optimizer.init(params)


def resume(path: Path, changes: dict, text: data.Text) -> Run:
    """The training in a checkpoint, with settings from FREE changed.

    Raises:
        ValueError: a setting that decides the result differs, or the text is another one.
    """
    found = checkpoint.load(path)
    check("settings" in found.extra, "train: {} holds weights, but no training to continue.", path,
          remedy="Start a training with `fnattn train`.")
    old = settings_module.make(found.extra["settings"])
    new = settings_module.make(found.extra["settings"], changes)
    differ = [n for n in vars(old) if getattr(old, n) != getattr(new, n) and n not in FREE]
    check(not differ, "train: {} is a checkpoint of another config: {}.", path,
          ", ".join(f"{n} was {getattr(old, n)!r} and is now {getattr(new, n)!r}" for n in differ),
          remedy="Continue with the settings of the first run (leave them out), or train in another folder with --out.")
    check(new.schedule == "constant" or new.steps == old.steps, "train: a {} schedule was made for {} steps; got {}.", new.schedule,
          old.steps, new.steps, remedy="Leave --steps out.")
    check(found.extra["data"] == _fingerprint(text), "train: {} was trained on another text than {}.", path, text.source,
          remedy="Give the same --data.")
    like = _opt_init(new, found.params)
    return Run(new, found.params, checkpoint.opt_state(found, like), found.key, found.step)


def _fingerprint(text: data.Text) -> list[int]:
    return [len(text.train), len(text.valid), zlib.crc32(text.train.numpy()), zlib.crc32(text.valid.numpy())]


def save(folder: Path, run: Run, text: data.Text) -> None:
    """Writes the checkpoint of a run into its folder."""
    checkpoint.save(folder / CHECKPOINT, run.params, opt_state=run.opt_state, key=run.keys, step=run.step,
                    members=run.settings.ensemble,
                    extra={"settings": settings_module.to_dict(run.settings), "data": _fingerprint(text)})


# ------------------------------------------------------------------------------------------------ one step


def make_step(settings: Settings) -> Callable[..., tuple]:
    """step(params, opt_state, key, ids, step, rate) -> (params, opt_state, loss, norm of the gradient), for one model."""

    def step_one(params, opt_state, key, ids, step, rate):
        dropout_key = random.fold_in(random.fold_in(key, "dropout"), step) if lm.dropout_chances(params.cfg) else None
        loss, grads = tree.value_and_grad(lm.loss)(params, ids, dropout_key=dropout_key, impl=settings.impl)
        updates, opt_state = settings_module.optimizer(settings, rate).update(grads, opt_state, params)
        return optim.apply_updates(params, updates), opt_state, loss, optim.global_norm(grads)

    return step_one


def steps(run: Run, text: data.Text) -> Iterator[tuple[Run, Report]]:
    """Runs to the last step, yielding the run and what was found after each.

    Raises:
        ValueError: the loss is no longer a number.
    """
    settings, members = run.settings, run.settings.ensemble
    need = settings.length + 1
    data.check_length("train", text.train, need, f"the training text of {text.source}")
    data.check_length("train", text.valid, need, f"the validation text of {text.source}")
    one = make_step(settings)
    rates = torch.tensor(settings_module.learning_rates(settings), dtype=torch.float64)

    def draw(key: Tensor) -> Tensor:
        return data.batch(text.train, random.fold_in(key, "data"), run.step, settings.batch, need)

    while run.step < settings.steps:
        began = time.perf_counter()
        if members:
            ids = torch.stack([draw(key) for key in run.keys])
            new = tree.vmap(one, in_axes=(0, 0, 0, 0, None, 0))(run.params, run.opt_state, run.keys, ids, run.step,
                                                                rates.expand(members))
        else:
            new = one(run.params, run.opt_state, run.keys, draw(run.keys), run.step, rates[0])
        params, opt_state, loss, norm = new
        losses = loss.reshape(-1).tolist()
        check(all(math.isfinite(x) for x in losses), "train: the loss of step {} is {}, no longer a number.", run.step + 1,
              losses if members else losses[0], remedy="Use a smaller --learning-rate; the last checkpoint is as it was.")
        run = run._replace(params=params, opt_state=opt_state, step=run.step + 1)
        windows = settings.final_windows if run.step == settings.steps else settings.eval_windows
        measured = run.step % settings.eval_every == 0 or run.step == settings.steps
        valid = evaluate(run, text, windows).mean((-2, -1)).reshape(-1).tolist() if measured else None
        yield run, Report(run.step, losses, valid, norm.reshape(-1).tolist(), time.perf_counter() - began)


def evaluate(run: Run, text: data.Text, windows: int) -> Tensor:
    """-log p of every byte in evenly spaced validation windows: [windows, length], with members in front for an ensemble."""
    settings = run.settings
    ids = data.windows(text.valid, settings.length + 1, windows)

    def one(params, part):
        return lm.nll(params, part, impl=settings.impl)

    measure = tree.vmap(one, in_axes=(0, None)) if settings.ensemble else one
    with torch.no_grad():
        return torch.cat([measure(run.params, part) for part in ids.split(32)], -2)


# ------------------------------------------------------------------------------------------------ around the loop


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C sets the flag that this yields, a second one interrupts as always."""
    asked: list[int] = []

    def note(signum, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: Ctrl-C goes elsewhere
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def open_metrics(folder: Path, step: int) -> Any:
    """metrics.jsonl, open for the lines after `step`; what a training that was cut short wrote beyond it is dropped."""
    path = folder / METRICS
    kept = []
    if step and path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed process
                continue
            if entry["step"] <= step:
                kept.append(line)
    checkpoint.replace(path, "".join(f"{line}\n" for line in kept).encode())
    return open(path, "a", buffering=1)


def metrics_line(report: Report, settings: Settings) -> str:
    """One line of metrics.jsonl. An ensemble has lists."""

    def one(values: list[float]) -> Any:
        return values if settings.ensemble else values[0]

    entry = {"step": report.step, "loss": one(report.loss), "grad_norm": one(report.grad_norm), "seconds": round(report.seconds, 4)}
    if report.valid is not None:
        entry["valid_loss"] = one(report.valid)
    return json.dumps(entry) + "\n"
