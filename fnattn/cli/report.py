"""Prints which kernel would serve each operator on this machine, and why the others would not.

  fnattn report
  fnattn report --json
"""

from __future__ import annotations

import argparse
import json

from ..ops.report import report, rows

HELP = "which kernel would run where, and why not the others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """In which form."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    if args.json:
        print(json.dumps([answer._asdict() for answer in rows()], indent=2))
    else:
        report()
    return 0
