"""What the files of tests/kernels/interpreted share: checks that a slow interpreter can bear."""

from __future__ import annotations

from fnattn.testing import CHECKS, check_operator
from fnattn.testing.cases import CASES

# The transforms that reach a kernel in different ways; all of testing.CHECKS run in all_checks.py, on smaller arguments.
# Of a package that computes in float32: numeric differences of it mean nothing.
ROUNDED = [name for name in CHECKS if not name.startswith(("gradcheck", "gradgradcheck", "compile", "export"))]
FEW = ["f", "grad(f)", "jvp(f)", "vmap(grad(f))", "autograd: double backward"]


def case(name: str):
    """The case of this name in fnattn.testing.cases."""
    return next(c for c in CASES if c.name == name)


def check(name: str, impl: str, only=FEW):
    """The case under transforms, against brute force."""
    c = case(name)
    report = check_operator(c.call(impl), c.args(), reference=c.brute(), differentiable=c.diff, compile=False, only=only)
    assert {row.check for row in report.require().rows if row.status == "ok"} == set(only)
