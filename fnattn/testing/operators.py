"""Whether an operator is right under every transform of torch: `CHECKS`, each against a plain-torch reference.

`torch.library.opcheck` looks at neither torch.func, nor forward mode, nor vmap, nor second derivatives; operators that pass
it return zero tangents without an error. Here every check compares numbers, in float64, and never where the expected
number is zero.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fnattn_kernels.contracts import KernelUnavailable
from torch import Tensor

from . import autograd_checks, transforms
from .apart import died, resolve, run_apart
from .subject import Mismatch, Subject, compare, subject

EXPORT, EXPORT_FREE = autograd_checks.export.__doc__, autograd_checks.export_free.__doc__
APART = (*(f"compile: {name}" for name in transforms.COMPILED), "compile: f, dynamic", "compile: backward", EXPORT, EXPORT_FREE)
CHECKS = (*transforms.EAGER, *autograd_checks.CHECKS, *APART)


class Row(NamedTuple):
    """One check of one operator.

    status: "ok"; "torch" where plain torch fails in the same way; "refused" where a named kernel says that it cannot serve
            the call (KernelUnavailable); "fail".
    detail: what went wrong.
    """

    check: str
    status: str
    detail: str = ""


class Report(NamedTuple):
    """All checks of one operator."""

    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are the operator's own fault."""
        return tuple(row for row in self.rows if row.status == "fail")

    def require(self) -> Report:
        """Itself, if nothing failed.

        Raises:
            AssertionError: names each failed check and what was wrong.
        """
        if self.failures:
            lines = "\n".join(f"  {row.check}: {row.detail}" for row in self.failures)
            raise AssertionError(f"{len(self.failures)} of {len(self.rows)} checks failed:\n{lines}")
        return self

    def __str__(self) -> str:
        width = max((len(row.check) for row in self.rows), default=0)
        return "\n".join(f"{row.check:<{width}}  {row.status:<7}  {row.detail}".rstrip() for row in self.rows)


def check_operator(fn: Callable | str, args: Sequence[Tensor], *, reference: Callable | str,
                   differentiable: Sequence[int] | None = None, rtol: float = 1e-8, compile: bool = True,
                   dynamic: Sequence[dict[int, str]] | None = None, only: Sequence[str] | None = None) -> Report:
    """Runs every check of `CHECKS` on an operator.

    Args:
        fn: the operator: a function of tensors giving a tensor or a tree of tensors. Also "module:function".
        args: small tensors, floating ones in float64. Prime sizes catch mixed-up axes.
        reference: the same mathematics in plain torch operations, readable and slow.
        differentiable: indices of the arguments that are differentiated; default: the floating ones.
        rtol: largest error of an entry, relative to the largest entry of its tensor.
        compile: also run torch.compile (backend aot_eager, fullgraph) and export. They run in a separate process, so fn and
            reference must be importable: top-level functions, functools.partial of such, or "module:function".
        dynamic: per argument, {axis: name} of sizes that an exported program must leave free.
        only: names of checks to run instead of all.
    Returns:
        A Report; `check_operator(...).require()` raises if a check failed. A check that plain torch fails too has the
        status "torch".
    Raises:
        ValueError: the arguments are not float64, or compile=True and a function cannot be sent to another process.
    """
    bad = [str(a.dtype) for a in args if a.is_floating_point() and a.dtype != torch.float64]
    if bad:
        raise ValueError(f"check_operator: expected float64 arguments; got {bad}.\n"
                         f"  Errors of rounding would hide errors of the derivative: use .double().")
    names = [name for name in CHECKS if only is None or name in only]
    if only is not None and len(names) != len(set(only)):
        raise ValueError(f"check_operator: expected names from testing.CHECKS; got {sorted(set(only) - set(CHECKS))}.\n"
                         f"  Known: {', '.join(CHECKS)}.")
    specs = (fn, reference)
    fn, reference = resolve(fn), resolve(reference)
    tested = subject(fn, args, like=reference, diff=differentiable, dynamic=dynamic)
    oracle = tested._replace(fn=reference)
    expected = functools.cache(lambda answer: _quietly(answer, oracle))  # many checks have one answer
    rows = {name: _eager_row(name, tested, oracle, expected, rtol) for name in names if name not in APART}
    apart = [name for name in names if name in APART and (dynamic is not None or name != EXPORT_FREE)]
    if compile:
        rows.update(apart_rows(apart, tested._replace(fn=specs[0]), oracle._replace(fn=specs[1]), rtol))
    return Report(tuple(rows[name] for name in names if name in rows))


def _quietly(run: Callable, s: Subject):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # vmap without a rule runs a slow loop and says so: right numbers, not a batch.
        warnings.filterwarnings("error", message=".*performance drop.*")
        return run(s)


def _run(name: str, s: Subject):
    if name in transforms.EAGER:
        fn, inputs = transforms.EAGER[name](s)
        return fn(*inputs)
    return autograd_checks.CHECKS[name](s)


def _eager(name: str, s: Subject):
    return _quietly(functools.partial(_run, name), s)


def _eager_row(name: str, tested: Subject, oracle: Subject, answer: Callable[[Callable], Any], rtol: float) -> Row:
    try:
        expected = answer(autograd_checks.EXPECTED.get(name) or functools.partial(_run, name))
    except Exception as error:
        return Row(name, "torch", _short(error))
    try:
        compare(_eager(name, tested), expected, rtol)
    except KernelUnavailable as error:
        return Row(name, "fail" if name == "f" else "refused", _short(error))
    except Exception as error:
        own = name not in autograd_checks.EXPECTED or _passes(name, oracle, expected, rtol)
        return Row(name, "fail" if own else "torch", _short(error))
    return Row(name, "ok")


def _passes(name: str, oracle: Subject, expected, rtol: float) -> bool:
    """Whether plain torch passes a check that an operator does not."""
    try:
        compare(_eager(name, oracle), expected, rtol)
    except Exception:
        return False
    return True


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = KernelUnavailable.__name__
    if name in text:  # dynamo wraps what it meets in many words of its own
        return f"{name}: {text.partition(name)[2].lstrip(': (')}"[:300]
    text = text if isinstance(error, Mismatch) else f"{type(error).__name__}: {text}"
    return text[:300]


# ------------------------------------------------------------------------------------------------ in another process


def apart_rows(names: Sequence[str], tested: Subject, oracle: Subject, rtol: float) -> dict[str, Row]:
    worker = f"{__name__}:_apart_worker"
    rows = {name: Row(name, "ok") if answer is None else Row(name, "refused" if "KernelUnavailable" in answer else "fail", answer)
            for name, answer in run_apart(worker, (tested, oracle, rtol), names)}
    failed = [name for name, row in rows.items() if row.status == "fail"]
    # Does plain torch fail there too? Asked only now, because it costs as much as the checks themselves.
    for name, answer in run_apart(worker, (oracle, oracle, rtol), failed):
        if answer is not None and not died(answer) and not died(rows[name].detail):
            rows[name] = Row(name, "torch", answer)
    return rows


def _apart_worker(what: tuple[Subject, Subject, float], name: str) -> str | None:
    tested, oracle, rtol = what
    tested, oracle = tested._replace(fn=resolve(tested.fn)), oracle._replace(fn=resolve(oracle.fn))
    try:
        actual, expected = _APART[name](tested, oracle) if name in _APART else _compiled(name[len("compile: "):], tested, oracle)
        compare(actual, expected, rtol)
    except Exception as error:
        return _short(error)
    return None


def _compiled(name: str, tested: Subject, oracle: Subject, **options):
    torch._dynamo.reset()
    fn, inputs = transforms.EAGER[name](tested)
    plain, _ = transforms.EAGER[name](oracle)
    actual = torch.compile(fn, backend="aot_eager", fullgraph=True, **options)(*inputs)
    try:
        return actual, plain(*inputs)
    except Exception:
        return actual, torch.func.grad(oracle.loss, oracle.diff)(*inputs)


def _backward(tested: Subject, oracle: Subject):
    torch._dynamo.reset()
    args = [a.detach().clone().requires_grad_(i in tested.diff) for i, a in enumerate(tested.args)]
    value = torch.compile(tested.loss, backend="aot_eager", fullgraph=True)(*args)
    return torch.autograd.grad(value, tested.pick(args)), autograd_checks.backward(oracle)


_APART = {
    "compile: f, dynamic": lambda tested, oracle: _compiled("f", tested, oracle, dynamic=True),
    "compile: backward": _backward,
    EXPORT: lambda tested, oracle: (autograd_checks.export(tested), autograd_checks.expected_export(oracle)),
    EXPORT_FREE: lambda tested, oracle: (autograd_checks.export_free(tested), autograd_checks.expected_export_free(oracle)),
}
