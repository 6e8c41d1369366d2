"""fnattn: attention as pure functions. Every derivative right in every mode, or an error that says why not."""

from ._kernels_path import provide_kernels

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
