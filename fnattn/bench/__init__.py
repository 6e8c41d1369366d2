"""How fast, and how lean: every operator and layer against the upstream package that it replaces.

`python -m fnattn bench` prints the table. Each case first has to agree with float64 in value and gradients.
"""

from .case import Case as Case
from .layers import CASES as _LAYERS
from .operators import CASES as _OPERATORS

CASES: dict[str, Case] = {case.name: case for case in (*_OPERATORS, *_LAYERS)}
