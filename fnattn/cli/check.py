"""`fnattn check`: the derivative table of every family on this machine, and every kernel against float64 at real sizes."""

from __future__ import annotations

import argparse
import sys

SECONDS = 200  # that the check of kernels may take; it compiles them
HELP = "print the derivative table: family x implementation x transform; exits 1 if any number is wrong"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--family", action="append", metavar="NAME", help="check this family only (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile and export, which take most of the time")
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, help="first, every kernel at real sizes in every precision: "
                        "value, gradients, tangent (default: with --device cuda)")
    parser.add_argument("--quick", action="store_true", help="of --kernels: small sizes")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table, as in the README")


def run(args: argparse.Namespace) -> int:
    """Prints the table on standard output and progress on standard error.

    Returns:
        0; 1 if a cell holds a wrong number; 2 if the request cannot be served.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import attentions
    from ..testing import table

    try:
        families = [attentions.find(name) for name in args.family or attentions.FAMILIES]
    except ValueError as error:
        print(f"fnattn check: {error}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("fnattn check: --device cuda needs a CUDA GPU and a torch built for it; got neither.\n"
              "  Use --device cpu, or see `fnattn report`.", file=sys.stderr)
        return 2
    wrong = _kernels(args.device, args.quick) if (args.device == "cuda" if args.kernels is None else args.kernels) else 0
    torch.set_num_threads(1)  # the examples are tiny
    count = sum(1 for name in table.TRANSFORMS if not (args.no_compile and name in table.APART))
    rows = sum(len(table.served(family, args.device)) for family in families)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=rows * count)
        found = table.derivative_table(
            families, device=args.device, compile=not args.no_compile,
            progress=lambda cell: bar.update(task, advance=1, description=f"{cell.family}, {cell.impl}: {cell.transform}"))
    print(found.text(markdown=args.markdown))
    for cell in found.wrong:
        print(f"fnattn check: wrong number: {cell.family}, {cell.impl}, {cell.transform}: {cell.detail}", file=sys.stderr)
    return 1 if found.wrong or wrong else 0


def _kernels(device: str, quick: bool) -> int:
    """Prints the errors of every kernel; how many are wrong."""
    from ..bench import numbers
    from ..ops.report import CASES

    wrong = 0
    for _, rows in numbers.everywhere([("numbers", name) for name in CASES], device, quick, SECONDS):
        for row in rows:
            wrong += "wrong" in row
            print(numbers.line(row), flush=True)
    print(f"\nwrong: {wrong}\n", flush=True)
    return wrong
