"""Whole models over any family of attention: language models, and how to generate from them."""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from . import block as block
    from . import clip as clip
    from . import dalle as dalle
    from . import dalle_transformer as dalle_transformer
    from . import discrete_vae as discrete_vae
    from . import feedforward_coor_descent as feedforward_coor_descent
    from . import generate as generate
    from . import linformer_lm as linformer_lm
    from . import lm as lm
    from . import reversible as reversible
    from . import token_shift as token_shift
    from . import vit as vit

# Imported when they are first asked for, one model without the others.
_LATER = ("block", "clip", "dalle", "dalle_transformer", "discrete_vae", "feedforward_coor_descent", "generate",
          "linformer_lm", "lm", "reversible", "token_shift", "vit")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
