"""Runs the cases and gives the rows of the table, one at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from . import CASES, check, memory, precision, scaling, timing, training, transforms, upstream
from .case import Case, Contest, Opponent, Side, shape_text
from .peaks import Peaks

CLOSE = 5  # times the rounds, where goals are a few percent away: steps of training, and derivatives in their own units


class Options(NamedTuple):
    """How to run. rounds: of which the median counts, CLOSE times as many for some rows. memory: whether to measure that too, in
    processes of their own.
    """

    device: torch.device
    rounds: int = 7
    quick: bool = False
    memory: bool = True


def names() -> list[str]:
    """Every case, in the order of the table."""
    return [*CASES, *training.CASES, *transforms.CASES, *precision.CASES, *scaling.CASES]


def rows(chosen: list[str], options: Options, peaks: Peaks | None,
         step: Callable[[str], None] = lambda name: None) -> Iterator[dict]:
    """The rows of the chosen cases. step(name) is called before each case. A row with "wrong" has no times."""
    for name in chosen:
        step(name)
        if name in CASES:
            yield from contest_rows(CASES[name], options, peaks)
        elif name in training.CASES:
            yield training_row(training.CASES[name], options)
        elif name in transforms.CASES or name in precision.CASES:
            yield multiple_row((transforms.CASES | precision.CASES)[name], options)
        else:
            yield scaling_row(scaling.CASES[name], options)
        gc.collect()


def contest_rows(case: Case, options: Options, peaks: Peaks | None) -> Iterator[dict]:
    """Forward, and forward with gradients, of one case. Nothing is timed before both sides agree with float64."""
    sizes = case.quick if options.quick else case.sizes
    head: dict[str, Any] = {"case": case.name, "kind": case.kind, "shape": shape_text(sizes), "peer": case.peer}
    contest = case.build(sizes, options.device)
    opponent, missing = _opponent(contest)
    ours, theirs = _verdict(case, contest, sizes, opponent, options)
    if ours or theirs:
        yield {**head, "pass": "all", "wrong": ours or f"upstream: {theirs}"}
        return
    held = memory.extra(case, options.quick) if options.memory and case.memory and options.device.type == "cpu" else None
    mine = Side(contest.ours, contest.args)
    other = None if opponent is None else Side(opponent.fn, contest.args, opponent.parameters, opponent.takes)
    for which, goal, floor in zip(case.passes, case.goal, (contest.forward, contest.both)):
        run = Side.forward if which == "forward" else Side.both
        times = timing.alternate(partial(run, mine), partial(run, other) if other else None, options.rounds, options.device)
        least = peaks.floor(floor) if peaks else None
        theirs_ms = times.theirs and times.theirs / contest.calls
        yield {**head, "pass": which, "ours_ms": times.ours / contest.calls, "upstream_ms": theirs_ms, "ratio": times.ratio,
               "spread": times.spread, "goal": None if options.quick else goal, "floor_ms": least, "missing": missing,
               "memory_ours_mb": (held or {}).get(f"{which} ours"), "memory_upstream_mb": (held or {}).get(f"{which} upstream")}


def _opponent(contest: Contest) -> tuple[Opponent | None, str | None]:
    if contest.theirs is None:
        return None, None
    try:
        return contest.theirs(), None
    except upstream.Missing as reason:
        return None, str(reason)


def _verdict(case: Case, contest: Contest, sizes: dict, opponent: Opponent | None,
             options: Options) -> tuple[str | None, str | None]:
    if case.check and not options.quick:
        contest = case.build({**sizes, **case.check}, options.device)
        opponent, _ = _opponent(contest)
    return check.wrong(contest, len(case.passes) > 1, case.tolerance, opponent)


def training_row(case: training.Training, options: Options) -> dict:
    """A step of training against the same elsewhere, after a first step that must agree."""
    sizes = case.quick if options.quick else case.sizes
    head = {"case": case.name, "kind": "training", "shape": shape_text(sizes), "pass": "step", "peer": training.PEERS[case.peer]}
    none = {"floor_ms": None, "memory_ours_mb": None, "memory_upstream_mb": None, "goal": None if options.quick else case.goal}
    try:
        sides = training.build(case, sizes, options.device)
    except upstream.Missing as reason:
        return {**head, **none, "ours_ms": None, "upstream_ms": None, "ratio": None, "missing": str(reason)}
    wrong = training.wrong(sides)
    if wrong:
        return {**head, "wrong": wrong}
    times = timing.alternate(sides.ours, sides.theirs, CLOSE * options.rounds, options.device)
    return {**head, **none, "ours_ms": times.ours, "upstream_ms": times.theirs, "ratio": times.ratio, "spread": times.spread,
            "missing": None}


def multiple_row(case: transforms.Transform, options: Options) -> dict:
    """What a derivative, an ensemble or another precision costs, in units of something simpler."""
    sizes = case.quick if options.quick else case.sizes
    head = {"case": case.name, "kind": "transform", "shape": shape_text(sizes), "pass": case.unit, "peer": case.peer}
    made = case.build(sizes, options.device)
    wrong = check.difference(*(list(tensors) for tensors in made.check()), tolerance=case.tolerance)
    if wrong:
        return {**head, "wrong": wrong}
    times = timing.alternate(made.cost, made.unit, CLOSE * options.rounds, options.device)
    faster: Any = times.ratio
    row = {**head, "ours_ms": times.ours, "unit_ms": times.theirs, "spread": times.spread, "more": case.more,
           "multiple": faster if case.more else 1 / faster, "goal": None if options.quick else case.goal}
    if made.peer:
        against = timing.alternate(made.cost, made.peer, options.rounds, options.device)
        row |= {"upstream_ms": against.theirs, "ratio": against.ratio}
    return row


def scaling_row(case: scaling.Scaling, options: Options) -> dict:
    """Forward cost per token at growing lengths; "per" says whose growth is told."""
    built = [case.build(n, options.device) for n in (scaling.QUICK if options.quick else scaling.LENGTHS)]
    lengths = [tokens for _, tokens in built]
    times = timing.least([side.forward for side, _ in built], options.rounds, options.device)
    costs = [1e6 * ms / tokens for ms, tokens in zip(times, lengths, strict=True)]
    told = costs if case.pairs is None else [cost * n / case.pairs(n) for cost, n in zip(costs, lengths, strict=True)]
    return {"case": case.name, "kind": "scaling", "shape": f"n{lengths[0]} to n{lengths[-1]}", "pass": "forward", "n": lengths,
            "ns_per_token": costs, "per": "token" if case.pairs is None else "key",
            "growth": max(later / min(told[:i]) for i, later in enumerate(told) if i)}


def failed(row: dict) -> bool:
    """Whether the row says that something computes the wrong thing."""
    return "wrong" in row


def met(row: dict) -> bool | None:
    """Whether the goal is reached; None where there is no goal or nothing to compare with."""
    goal = row.get("goal")
    if goal is None:
        return None
    if "multiple" in row:
        return row["multiple"] >= goal if row["more"] else row["multiple"] <= goal
    return None if row.get("ratio") is None else row["ratio"] >= goal
