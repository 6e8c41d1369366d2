"""What torch and Triton themselves cannot do depends on their versions."""

from __future__ import annotations

import importlib.metadata

import torch


def version(package: str) -> tuple[int, ...]:
    """The first two numbers; (0, 0) if it is not installed."""
    try:
        return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return 0, 0


OLD = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 13)
# Triton's interpreter makes Python numbers of arrays with one axis, which NumPy refuses from 2.4 on; Triton minds that from 3.7 on.
INTERPRETER_TOO_OLD = version("triton") < (3, 7) and version("numpy") >= (2, 4)
