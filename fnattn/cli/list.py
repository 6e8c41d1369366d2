"""Lists the families of attention: what each is, what it supports, and which options it takes.

  fnattn list            all families
  fnattn list taylor     the options of one, with defaults and meanings
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from typing import Any

from .. import attentions
from ..core import Family
from .settings import RECIPES

HELP = "families of attention, their options, and what each supports"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which family, and in which form."""
    parser.add_argument("family", nargs="?", help="show the options of this family")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    chosen = [attentions.find(args.family)] if args.family else [f for _, f in sorted(attentions.FAMILIES.items())]
    if args.json:
        print(json.dumps([describe(family) for family in chosen], indent=2))
    elif args.family:
        _show(chosen[0])
    else:
        _table(chosen)
    return 0


def describe(family: Family) -> dict:
    """A family as JSON values."""
    texts = option_texts(family.config)
    return {
        "name": family.name, "about": about(family), "source": family.source, "streams": family.streams, "masks": family.masks,
        "contexts": family.contexts, "combines": family.combine is not None,
        "options": [{"name": f.name, "type": str(f.type), "default": _default(f), "about": texts.get(f.name, "")}
                    for f in dataclasses.fields(family.config)],
        "train": RECIPES.get(family.name, {})}


def about(family: Family) -> str:
    """The first line of the family's file."""
    text = inspect.getdoc(sys.modules[family.init.__module__]) or inspect.getdoc(family.config) or ""
    return text.partition("\n")[0]


def option_texts(config: type) -> dict[str, str]:
    """What the docstring of a Config says about each field: `name: text`, at the start of a line or after a full stop.

    A field without an entry has that of the field which mentions it.
    """
    names = [f.name for f in dataclasses.fields(config)]
    one = "|".join(names)
    heads = rf"(?:^\s*|(?<=[.;] ))((?:{one})(?:,\s+(?:{one}))*):\s"
    pieces = re.split(heads, inspect.getdoc(config) or "", flags=re.MULTILINE)[1:]
    found = {name: " ".join(text.split()) for given, text in zip(pieces[::2], pieces[1::2]) for name in re.split(r",\s+", given)}
    return {name: found.get(name) or next((f"see {other}" for other, text in found.items() if name in text), "") for name in names}


def _default(f: dataclasses.Field) -> Any:
    return "required" if f.default is dataclasses.MISSING else f.default


def _words(family: Family) -> dict[str, str]:
    facts = {"state": family.streams, "mask": family.masks, "context": family.contexts, "combine": family.combine is not None}
    return {name: "yes" if there else "no" for name, there in facts.items()}


def _console() -> Any:
    from rich.console import Console
    # Piped output has no width of its own.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def _table(families: list[Family]) -> None:
    from rich.table import Table
    table = Table(box=None, pad_edge=False)
    for column in ("family", "state", "mask", "context", "combine", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for family in families:
        table.add_row(family.name, *_words(family).values(), about(family))
    console = _console()
    console.print(table)
    console.print("\nstate: streams, so `fnattn train --family` takes it; mask, context: apply accepts it; combine: states of "
                  "segments add up.\n`fnattn list FAMILY` shows the options of one.", soft_wrap=True)


def _show(family: Family) -> None:
    from rich.table import Table
    facts = describe(family)
    console = _console()
    console.print(f"{family.name}: {facts['about']}\n\nsource: {family.source}", soft_wrap=True)
    console.print("  ".join(f"{name}: {word}" for name, word in _words(family).items()) + "\n")
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for option in facts["options"]:
        table.add_row(option["name"], option["type"], str(option["default"]), option["about"])
    console.print(table)
    if facts["train"]:
        console.print("\n`fnattn train` starts from " + ", ".join(f"{k}={v}" for k, v in facts["train"].items()) + ".",
                      soft_wrap=True)
