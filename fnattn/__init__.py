"""fnattn: attention as pure functions. Every derivative right in every mode, or an error that says why not."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._kernels_path import provide_kernels
from ._later import later as _later

provide_kernels()  # before anything that imports fnattn_kernels

from . import attentions as attentions
from . import core as core
from . import ops as ops
from . import random as random
from . import taps as taps
from . import tree as tree
from .attentions import apply as apply
from .attentions import gradient_is_exact as gradient_is_exact
from .attentions import init as init
from .attentions import init_state as init_state
from .attentions import register as register
from .core import EMPTY as EMPTY
from .core import DerivativeUnsupported as DerivativeUnsupported
from .core import Empty as Empty
from .core import Family as Family
from .core import KernelUnavailable as KernelUnavailable

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from . import bench as bench
    from . import checkpoint as checkpoint
    from . import cli as cli
    from . import convert as convert
    from . import data as data
    from . import distributed as distributed
    from . import ensemble as ensemble
    from . import inspect as inspect
    from . import models as models
    from . import optim as optim
    from . import testing as testing

# Imported when they are first asked for: computing an attention needs none of them.
_LATER = ("bench", "checkpoint", "cli", "convert", "data", "distributed", "ensemble", "inspect", "models", "optim", "testing")
__getattr__, __dir__ = _later(__name__, _LATER, globals())
