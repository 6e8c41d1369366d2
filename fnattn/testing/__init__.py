"""Checks that anybody can run on their own operator or family: every transform, every law, every derivative.

    check_operator(fn, args, reference=plain)   is an operator right under every transform of torch?
"""

from .apart import run_apart
from .operators import APART, CHECKS, Report, Row, check_operator
from .subject import Mismatch

__all__ = ["APART", "CHECKS", "Mismatch", "Report", "Row", "check_operator", "run_apart"]
