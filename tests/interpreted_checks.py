"""What the files of tests/kernels/interpreted share: checks that a slow interpreter can bear."""

from __future__ import annotations

from fnattn.testing import check_operator
from fnattn.testing.cases import CASES

# The transforms that reach a kernel in different ways; the interpreter is too slow for all of testing.CHECKS.
SOME = ["f", "grad(f)", "jvp(f)", "grad(grad(f))", "jvp(grad(f))", "grad(jvp(f))", "vmap(f), in_dims with None", "vmap(grad(f))",
        "grad(vmap(f))", "functionalize(grad(f))", "autograd: backward", "autograd: double backward", "autograd: forward_ad duals",
        "autograd: is_grads_batched", "FakeTensor: backward", "make_fx(grad), symbolic"]
FEW = ["f", "grad(f)", "jvp(f)", "vmap(grad(f))", "autograd: double backward"]


def case(name: str):
    """The case of this name in fnattn.testing.cases."""
    return next(c for c in CASES if c.name == name)


def check(name: str, impl: str, only=SOME):
    """The case under transforms, against brute force."""
    c = case(name)
    report = check_operator(c.call(impl), c.args(), reference=c.brute(), differentiable=c.diff, compile=False, only=only)
    assert {row.check for row in report.require().rows if row.status == "ok"} == set(only)
