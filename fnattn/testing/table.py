"""The derivative table: family x implementation x transform. A cell is "ok" or the error that is raised, never a wrong number.

Every number is compared with plain torch on another route (`plainly`): torch.autograd entry by entry, loops instead of vmap.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import func

from .. import attentions, random
from ..core import Family
from . import autograd_checks, plainly, transforms
from .apart import run_apart
from .family import SEED, family_subject
from .subject import Mismatch, Subject, compare
from .transforms import Built
from .world import implementations

RTOL = 1e-8


def _mapped(s: Subject, x_too: bool, params_too: bool) -> Built:
    last = len(s.args) - 1
    args, dims = transforms._many(s, shared=lambda i: not (x_too if i == last else params_too))
    return func.vmap(func.grad(s.loss, s.diff), dims), args


def per_sample(s: Subject) -> Built:
    """Gradients for each x: params shared."""
    return _mapped(s, True, False)


def ensemble(s: Subject) -> Built:
    """Gradients for each member: x shared."""
    return _mapped(s, False, True)


# name -> (how it is computed, the right answer, whether in a separate process)
TRANSFORMS: dict[str, tuple[Callable[[Subject], Built], Callable[[Subject], Any], bool]] = {
    "grad": (transforms.grad, plainly.grad, False),
    "vjp": (transforms.vjp, plainly.vjp, False),
    "jvp": (transforms.jvp, plainly.jvp, False),
    "jacrev": (transforms.jacrev, plainly.jacobian, False),
    "jacfwd": (transforms.jacfwd, plainly.jacobian, False),
    "hessian": (transforms.hessian, plainly.hessian, False),
    "grad(grad)": (transforms.grad_grad, plainly.grad_grad, False),
    "vjp(grad)": (transforms.vjp_grad, plainly.grad_grad, False),
    "grad(vjp(grad))": (transforms.grad_vjp_grad, plainly.grad_grad_grad, False),
    "jvp(grad)": (transforms.jvp_grad, plainly.jvp_grad, False),
    "vmap": (transforms.vmap, plainly.looped(plainly.forward, transforms.vmap), False),
    "vmap(grad)": (transforms.vmap_grad, plainly.looped(plainly.grad, transforms.vmap_grad), False),
    "vmap(vjp(grad))": (transforms.vmap_vjp_grad, plainly.looped(plainly.grad_grad, transforms.vmap_vjp_grad), False),
    "grad(vmap)": (transforms.grad_vmap, plainly.grad_vmap, False),
    "grad(vmap(grad))": (transforms.grad_vmap_grad, plainly.grad_vmap_grad, False),
    "per-sample gradients": (per_sample, plainly.looped(plainly.grad, per_sample), False),
    "ensembles": (ensemble, plainly.looped(plainly.grad, ensemble), False),
    "compile": (transforms.forward, plainly.forward, True),
    "compile(grad)": (transforms.grad, plainly.grad, True),
    "compile(vmap(grad))": (transforms.vmap_grad, plainly.looped(plainly.grad, transforms.vmap_grad), True),
    "compile(jvp)": (transforms.jvp, plainly.jvp, True),
    "export": (transforms.forward, plainly.forward, True),
}
APART = tuple(name for name, row in TRANSFORMS.items() if row[2])


class Cell(NamedTuple):
    """One cell. status: "ok", "error" (the text is in detail) or "wrong" (by how much)."""

    family: str
    impl: str
    transform: str
    status: str
    detail: str = ""


class Table(NamedTuple):
    """All cells, in order."""

    cells: tuple[Cell, ...]

    @property
    def wrong(self) -> tuple[Cell, ...]:
        """The cells that hold a wrong number."""
        return tuple(c for c in self.cells if c.status == "wrong")

    def text(self, *, markdown: bool = False, width: int = 110) -> str:
        """Transforms down, families across; errors as numbered notes below."""
        notes: list[str] = []
        columns = {family: _column([c for c in self.cells if c.family == family], notes)
                   for family in dict.fromkeys(c.family for c in self.cells)}
        transforms = list(dict.fromkeys(c.transform for c in self.cells))
        parts, families = [], list(columns)
        while families:
            count = len(families) if markdown else _fitting(families, columns, width)
            parts.append(_grid(transforms, {f: columns[f] for f in families[:count]}, markdown))
            families = families[count:]
        served = [f"{family}: {', '.join(dict.fromkeys(c.impl for c in self.cells if c.family == family))}" for family in columns]
        parts.append("Implementations: " + "; ".join(served) + '. "ok" alone: all of them.')
        parts += [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
        return "\n\n".join(parts) if markdown else "\n".join(parts)


def _column(cells: Sequence[Cell], notes: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for transform in dict.fromkeys(c.transform for c in cells):
        here = [c for c in cells if c.transform == transform]
        if all(c.status == "ok" for c in here):
            found[transform] = "ok"
            continue
        words = []
        for c in here:
            word = c.status
            if c.status != "ok":
                note = f"{c.status}: {c.detail}"
                if note not in notes:
                    notes.append(note)
                word = f"{c.status} [{notes.index(note) + 1}]"
            words.append(word if len(here) == 1 else f"{c.impl}: {word}")
        found[transform] = ", ".join(words)
    return found


def _wide(family: str, column: dict[str, str]) -> int:
    return max(len(family), *(len(text) for text in column.values())) + 2


def _fitting(families: Sequence[str], columns: dict[str, dict[str, str]], width: int) -> int:
    used, count = max(map(len, TRANSFORMS)) + 2, 0
    while count < len(families) and (count == 0 or used + _wide(families[count], columns[families[count]]) <= width):
        used += _wide(families[count], columns[families[count]])
        count += 1
    return count


def _grid(rows: Sequence[str], columns: dict[str, dict[str, str]], markdown: bool) -> str:
    if markdown:
        lines = ["| transform | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        return "\n".join(lines + [f"| `{row}` | " + " | ".join(c.get(row, "") for c in columns.values()) + " |" for row in rows])
    first = max(map(len, rows)) + 2
    sizes = [_wide(family, column) for family, column in columns.items()]
    lines = [" " * first + "".join(f"{family:<{size}}" for family, size in zip(columns, sizes))]
    lines += [f"{row:<{first}}" + "".join(f"{c.get(row, ''):<{size}}" for c, size in zip(columns.values(), sizes)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def derivative_table(families: Sequence[Family | str] | None = None, *, device: str = "cpu", compile: bool = True,
                     progress: Callable[[Cell], None] | None = None) -> Table:
    """Tries every transform on the first example of every family, with every implementation that can serve it there.

    Args:
        families: Family records or names; default: all.
        device: "cpu" or "cuda".
        compile: also the compiled and exported ones, which take most of the time.
        progress: called with each cell as it is found.
    Returns:
        A Table; `table.wrong` must be empty.
    """
    families = attentions.FAMILIES.values() if families is None else families
    chosen = [attentions.find(f) if isinstance(f, str) else f for f in families]
    cells = []
    for family in chosen:
        for cell in _cells(family, device, compile):
            cells.append(cell)
            if progress is not None:
                progress(cell)
    return Table(tuple(cells))


def served(family: Family, device: str) -> list[str]:
    """Implementations that can serve the family's first example on this device."""
    found = implementations(family, family.examples[0], random.key(SEED), device)
    return [impl for impl, reason in found.items() if reason is None]


def _cells(family: Family, device: str, compile: bool) -> Iterator[Cell]:
    cfg = family.examples[0]
    plain = family_subject(family, cfg, "reference", batch=2, device=device)
    for impl in served(family, device):
        tested = family_subject(family, cfg, impl, batch=2, device=device)
        for name, (_, _, apart) in TRANSFORMS.items():
            if not apart:
                yield _cell(family.name, impl, name, _try(name, tested, plain))
        if compile:
            for name, answer in run_apart(f"{__name__}:_worker", (tested, plain), APART):
                yield _cell(family.name, impl, name, answer)


def _cell(family: str, impl: str, name: str, answer: str | None) -> Cell:
    if answer is None:
        return Cell(family, impl, name, "ok")
    status, _, detail = answer.partition("|")
    return Cell(family, impl, name, status, detail) if detail else Cell(family, impl, name, "error", answer)


def _try(name: str, tested: Subject, plain: Subject) -> str | None:
    build, answer, _ = TRANSFORMS[name]
    if name in ("hessian", "jacrev", "jacfwd"):  # tables of all params by all params would be large
        few = (0, len(tested.args) - 1)
        tested, plain = (s._replace(diff=tuple(i for i in s.diff if i in few)) for s in (tested, plain))
    expected = answer(plain)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "export":
                actual = autograd_checks.export(tested)
            else:
                fn, inputs = build(tested)
                fn = torch.compile(fn, backend="aot_eager", fullgraph=True) if name in APART else fn
                actual = fn(*inputs)
        compare(actual, expected, RTOL)
    except Mismatch as error:
        return f"wrong|{error}"
    except Exception as error:
        return f"error|{what(error)}"
    return None


def what(error: Exception) -> str:
    """An exception on one line: its type and what it says. Where torch.compile met it, the one of the code that was compiled."""
    kind, text = type(error).__name__, str(error)
    # torch 2.11 wraps the message once more: Name((ConstantVariable(str: 'text'),))
    if inner := re.search(r"raised exception (\w+)\((?:\(ConstantVariable\(str: )?(['\"].*['\"])\)(?:,\)\))?$", text, re.MULTILINE):
        kind, text = inner[1], str(ast.literal_eval(inner[2]))
    return textwrap.shorten(f"{kind}: {text}", 240, placeholder=" ...")


def _worker(what: tuple[Subject, Subject], name: str) -> str | None:
    torch._dynamo.reset()
    return _try(name, *what)
