"""The command line: `fnattn COMMAND` or `python -m fnattn COMMAND`.

Each command is a module here with HELP, add_arguments(parser) and run(args), imported when it is asked for. A user's mistake
ends in one message on stderr and exit code 2; FNATTN_TRACEBACK=1 shows where it was raised.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a language model over any causal family of attention",
    "generate": "stream text from a checkpoint",
    "inspect": "look inside a checkpoint: gradients, curvature, attention maps",
    "train-images": "train a text-to-image transformer on handwritten digits",
    "generate-images": "draw digits from their names",
    "list": "families of attention, their options, and what each supports",
    "report": "which kernel would run where, and why not the others",
    "check": "verify derivatives and print the derivative table",
    "bench": "time every operator and implementation against its reference",
    "demo": "train on Python's own sources and write a report, all in one",
}
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 fine, 2 a user's mistake, 130 interrupted."""
    argv = [*(sys.argv[1:] if argv is None else argv)]  # list is the name of a command here
    try:
        return _run(argv)
    except SystemExit as stop:  # argparse, after it has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("fnattn: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `fnattn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("FNATTN_TRACEBACK"):
            raise
        print(f"fnattn: error: {_text(error)}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fnattn", description="Functional attention: train, generate, inspect.",
        epilog="Every command explains itself: fnattn COMMAND --help")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=text)
            continue
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        one = commands.add_parser(name, help=text, description=module.__doc__, formatter_class=_Formatter)
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.version:
        from .. import __version__
        print(f"fnattn {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return args.run(args) or 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default in (None, False) or "(default" in (action.help or "")
        return action.help if shown else super()._get_help_string(action)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}\n  Check the name, and who may read and write there."
    return str(error) or type(error).__name__
