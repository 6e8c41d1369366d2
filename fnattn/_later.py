"""Parts of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def later(package: str, names: Sequence[str], there: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose modules `names` come later; `there`: its globals()."""
    def get(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*there, *names})
