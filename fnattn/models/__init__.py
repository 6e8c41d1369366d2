"""Whole models over any family of attention: language models, and how to generate from them."""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .._later import later as _later

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
__getattr__, __dir__ = _later(__name__, _LATER, globals())
