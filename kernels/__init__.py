"""Machine operators of fnattn: what a compiler, a GPU or another package can compute, and nothing about derivatives.

Every module here states its operators with `contracts.Operator`: a schema, shapes for tracing, and one function per
device. Derivatives are mathematics and live upstairs in `fnattn.ops`, which hands them to `Operator.derive`. Until that
has happened an operator refuses to be differentiated, loudly.

Installed as `fnattn_kernels`. Imports torch only; compilers and optional packages are touched when a kernel first runs.
"""
