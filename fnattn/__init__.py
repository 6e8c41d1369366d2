"""fnattn: attention as pure functions. Every derivative right in every mode, or an error that says why not."""

from ._kernels_path import provide_kernels

provide_kernels()  # before anything that imports fnattn_kernels

from . import core as core
from . import ops as ops
from . import random as random
from . import tree as tree
from .core import EMPTY as EMPTY
from .core import DerivativeUnsupported as DerivativeUnsupported
from .core import Empty as Empty
from .core import Family as Family
from .core import KernelUnavailable as KernelUnavailable

__version__ = "0.1.0"
