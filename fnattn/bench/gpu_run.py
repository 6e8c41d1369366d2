"""Runs the races of gpu.py: first whether each side is right, in processes of their own, then how long it takes.

Each row is a pass of one side at one size in one precision; the time is the median of several calls, caches emptied before each.
Nothing here has been run on a GPU; `fnattn bench --suite gpu --quick` runs all of it on a CPU, on small shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..core import KernelUnavailable
from . import check, numbers, upstream
from .case import Side, cast, shape_text
from .gpu import F32, RACES, Race
from .meter import Meter
from .peaks import Peaks

GOAL_JVP = 2.5  # units of a forward, of softmax attention from 2048 positions on
ROUNDED = 2e-2  # largest error in bfloat16, as a part of the largest entry
Verdicts = dict[tuple[str, str, str], str | None]  # case, side, dtype -> why it is not timed


def sides(race: Race) -> list[tuple[str, Callable[[dict], Callable], bool]]:
    """Name, sizes -> function of the tensors, and whether it has the same meaning."""
    ours = [(impl, lambda s, impl=impl: partial(race.ours, s, impl=impl), True) for impl in race.impls]
    return [*ours, *((n, f, True) for n, f in race.peers.items()), *((n, f, False) for n, f in race.yards.items())]


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _side(fn: Callable, args: tuple, dtype: torch.dtype, weigh: Callable[[torch.Tensor], torch.Tensor]) -> Side:
    """weigh: the result -> its cotangent."""
    side = Side(fn, args, dtype=dtype)
    side.cotangent = weigh(side.forward())
    return side


# ------------------------------------------------------------------------------------------------ is it right?


def verdicts(race: Race, device: torch.device, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each side and precision, with the reason if it is "wrong", or cannot serve the call: "unavailable"."""
    sizes = race.quick if quick else {**race.sizes[0], **race.check}
    gradients = len(race.passes) > 1
    for dtype in race.dtypes:
        args = cast(race.inputs(sizes, device), dtype)
        true = None
        for side, fn_of, compared in sides(race):
            row: dict[str, Any] = {"case": race.name, "side": side, "dtype": _label(dtype), "shape": shape_text(sizes)}
            try:
                found = check.found(_side(fn_of(sizes), args, dtype, numbers.uneven), gradients)
                if compared and true is None:
                    plain = partial(race.ours, sizes, impl="reference")
                    true = check.found(_side(plain, args, torch.float64, numbers.uneven), gradients)
                said = check.difference(found, true, race.tolerance if dtype == F32 else ROUNDED) if compared else None
                row |= {"wrong": said} if said else {}
            except (KernelUnavailable, upstream.Missing) as reason:
                row["unavailable"] = " ".join(str(reason).split())[:300]
            except Exception as error:  # a compiler, or a foreign kernel, may refuse in any way; the others go on
                kind = "wrong" if side in race.impls else "unavailable"
                row[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield row


def refused(found: list[dict[str, Any]]) -> Verdicts:
    """What the rows of `verdicts` come to."""
    return {(row["case"], row["side"], row["dtype"]): row.get("wrong") or row.get("unavailable") for row in found if "side" in row}


# ------------------------------------------------------------------------------------------------ how long does it take?


def rows(race: Race, said: Verdicts, meter: Meter, peaks: dict[torch.dtype, Peaks], quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row for each side, precision, size and pass. A row without "ms" says why in "unavailable" or "wrong"."""
    for dtype in race.dtypes:
        for side, fn_of, _ in sides(race):
            head = {"case": race.name, "side": side, "dtype": _label(dtype)}
            reason = said.get((race.name, side, head["dtype"]), "was not checked in time")
            if reason:
                yield {**head, "shape": "", "unavailable": reason}
                continue
            for sizes in (race.quick,) if quick else race.sizes:
                row = {**head, "shape": shape_text(sizes)}
                if sizes["n"] > race.most.get(side, sizes["n"]):
                    yield {**row, "unavailable": f"left out above {race.most[side]} positions"}
                elif meter.left() <= 0:
                    yield {**row, "unavailable": "the time is up"}
                else:
                    yield from _timed(race, row, fn_of(sizes), sizes, dtype, meter, peaks[dtype])


def _timed(race: Race, head: dict, fn: Callable, sizes: dict, dtype: torch.dtype, meter: Meter, peaks: Peaks) -> Iterator[dict]:
    forward, both = race.work(sizes)
    try:
        side = _side(fn, race.inputs(sizes, meter.device), dtype, torch.ones_like)
        plain = tuple(t.detach() for t in side.args)
        moves = tuple(torch.ones_like(t) for t in plain)
        runs = {"forward": side.forward, "forward+backward": side.both, "jvp": lambda: torch.func.jvp(fn, plain, moves)}
        unit = 0.0
        for name in race.passes:
            if name == "jvp" and head["side"] not in race.impls:  # the others have none
                continue
            row = {**head, "pass": name, "ms": meter.time(runs[name]), "mb": meter.memory(runs[name])}
            if name == "jvp":
                goal = GOAL_JVP if race.name == "softmax_attention" and sizes["n"] >= 2048 else None
                row |= {"units": row["ms"] / unit, "goal": goal}
            else:  # work is counted in float32
                least = forward if name == "forward" else both
                row["floor_ms"] = peaks.floor(least._replace(bytes=least.bytes * dtype.itemsize / 4))
                unit = row["ms"] if name == "forward" else unit
            yield row
    except torch.OutOfMemoryError as error:
        yield {**head, "unavailable": f"out of memory: {' '.join(str(error).split())[:120]}"}
    except Exception as error:  # one kernel that the compiler refuses at one size must not end the table
        kind = "wrong" if head["side"] in race.impls else "unavailable"
        yield {**head, kind: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


HEAD = f"{'case':<26}{'shape':<29}{'dtype':<10}{'side':<27}{'pass':<17}{'ms':>10}{'floor ms':>10}{'x floor':>9}{'MB':>9}"


def line(row: dict[str, Any]) -> str:
    """One row as text, of `rows` or of `verdicts`."""
    head = f"{row['case']:<26}{row['shape']:<29}{row['dtype']:<10}{row['side']:<27}{row.get('pass', ''):<17}"
    if "ms" not in row:
        return head + (f"WRONG: {row['wrong']}" if "wrong" in row else row.get("unavailable", "right"))
    floor = row.get("floor_ms")
    over, held = "" if floor is None else f"{row['ms'] / floor:.1f}", "" if row["mb"] is None else f"{row['mb']:.0f}"
    text = f"{head}{row['ms']:>10.3f}{'' if floor is None else format(floor, '.3f'):>10}{over:>9}{held:>9}"
    if "units" not in row:
        return text
    goal = "" if row["goal"] is None else f", goal {row['goal']:g} {'ok' if row['units'] <= row['goal'] else 'MISS'}"
    return f"{text}  {row['units']:.2f} forwards{goal}"


def _main() -> None:
    torch.set_num_threads(1)
    for row in verdicts(RACES[sys.argv[1]], torch.device(sys.argv[2]), "quick" in sys.argv[3:]):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
