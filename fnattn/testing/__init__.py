"""Checks that anybody can run on their own operator or family: every transform, every law, every derivative.

    check_operator(fn, args, reference=plain)   is an operator right under every transform of torch?
    check_family(FAMILY)                        does a family obey every law?
    derivative_table()                          which derivative of which family works with which kernel?

Loaded when used: `import fnattn` does not import it.
"""

from .apart import run_apart
from .laws import LAWS, check_family
from .operators import APART, CHECKS, Report, Row, check_operator
from .subject import Mismatch
from .table import Cell, Table, derivative_table
from .world import NotApplicable

__all__ = ["APART", "CHECKS", "LAWS", "Cell", "Mismatch", "NotApplicable", "Report", "Row", "Table", "check_family",
           "check_operator", "derivative_table", "run_apart"]
