"""The real upstream packages, as oracles of the parity tests; a test skips, saying why, where one is not installed."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

# import name -> (distribution, the version that the parity tests were written against)
PINNED = {
    "taylor_series_linear_attention": ("taylor-series-linear-attention", "0.2.0"),
    "linformer": ("linformer", "0.2.3"),
    "gateloop_transformer": ("gateloop-transformer", "0.2.5"),
    "coordinate_descent_attention": ("coordinate-descent-attention", "0.0.11"),
    "colt5_attention": ("colt5-attention", "0.11.2"),
    "rotary_embedding_torch": ("rotary-embedding-torch", "0.9.1"),
    "dalle_pytorch": ("dalle-pytorch", "1.6.6"),
    "fast_transformers": ("pytorch-fast-transformers", "0.4.0"),
}


def upstream(name: str):
    """The upstream module `name`, or a skip that says what to install."""
    package = name.partition(".")[0]
    distribution, pinned = PINNED[package]
    try:
        found = version(distribution)
    except PackageNotFoundError:
        pytest.skip(f"{distribution}=={pinned} is not installed")
    if found != pinned:
        pytest.skip(f"{distribution} is {found}; the parity tests are written against {pinned}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside upstream are not ours to fix
        if package == "dalle_pytorch" and package not in sys.modules:
            # Its __init__ imports a tokenizer that no longer installs; the sub-modules themselves need only torch.
            shell = types.ModuleType(package)
            shell.__path__ = list(find_spec(package).submodule_search_locations)
            sys.modules[package] = shell
        return importlib.import_module(name)
