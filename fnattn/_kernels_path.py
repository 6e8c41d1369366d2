"""Finds the package `fnattn_kernels` in a checkout that nobody has installed.

Installing maps the folder `kernels/` to the import name `fnattn_kernels`. In a bare checkout that name leads nowhere,
or, worse, to another version installed elsewhere; there the sibling folder is loaded by its path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "fnattn_kernels"


def provide_kernels() -> None:
    """Makes `import fnattn_kernels` give the kernels of this copy of fnattn. Does nothing once installed."""
    if NAME in sys.modules:
        return
    folder = Path(__file__).resolve().parent.parent / "kernels"
    # In site-packages a sibling `kernels` is somebody else's package: the C sources tell them apart.
    if not (folder / "csrc" / "common.h").is_file():
        return
    spec = importlib.util.spec_from_file_location(NAME, folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
