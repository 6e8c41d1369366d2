"""Every law that every family obeys, and `check_family`, which runs them on one family, a stranger's too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fnattn_kernels.contracts import KernelUnavailable
from torch import Tensor

from .. import random
from ..core import Family
from .family import SEED, family_subject
from .laws_derivatives import DERIVATIVE_LAWS
from .laws_options import OPTION_LAWS
from .laws_values import VALUE_LAWS
from .operators import EXPORT, EXPORT_FREE, Report, Row, apart_rows
from .world import NotApplicable, implementations

# name -> law(family, cfg, key, impl): returns None, or raises AssertionError saying what is broken, or NotApplicable.
LAWS: dict[str, Callable[[Family, Any, Tensor, str], None]] = {
    law.__name__: law for law in (*VALUE_LAWS, *OPTION_LAWS, *DERIVATIVE_LAWS)}
# Laws about compiled functions run in a separate process: all of them on the first example, the first on the others.
COMPILED = ("compile: grad(f)", "compile: f", "compile: vmap(grad(f))", "compile: jvp(f)", EXPORT, EXPORT_FREE)


def compiled_rows(family: Family, cfg: Any, key: Tensor, impl: str, names: Sequence[str] = COMPILED) -> dict[str, Row]:
    """compile(f) = f, also for its gradient, per-sample gradients and tangent; export gives a program that equals f."""
    # Two sequences of three: torch specialises on sizes 0 and 1.
    tested = family_subject(family, cfg, impl, key, batch=2)
    return apart_rows(names, tested, family_subject(family, cfg, "reference", key, batch=2), 1e-8)


def check_family(family: Family, *, examples: Sequence[Any] | None = None, impls: Sequence[str] | None = None,
                 key: Tensor | None = None, compile: bool = True) -> Report:
    """Runs every law on a family.

    Args:
        family: the record at the end of the family's file; it need not be registered.
        examples: configs; default: family.examples.
        impls: default: every implementation that can serve the config here.
        key: where params and inputs come from.
        compile: also compile and export, in a separate process; the family must then be importable.
    Returns:
        A Report; a row is named "law [config number, impl]". `check_family(...).require()` raises if a law is broken.
    """
    key = random.key(SEED) if key is None else key
    rows = []
    for number, cfg in enumerate(family.examples if examples is None else examples):
        able = [name for name, reason in implementations(family, cfg, key).items() if reason is None]
        for impl in able if impls is None else impls:
            for name, law in LAWS.items():
                rows.append(_row(f"{name} [{number}, {impl}]", law, family, cfg, key, impl))
            if compile:
                found = compiled_rows(family, cfg, key, impl, COMPILED if number == 0 else COMPILED[:1])
                rows += [row._replace(check=f"{name} [{number}, {impl}]") for name, row in found.items()]
    return Report(tuple(rows))


def _row(label: str, law: Callable, *args: Any) -> Row:
    try:
        with torch.random.fork_rng(devices=[]):
            law(*args)
    except NotApplicable as reason:
        return Row(label, "n/a", str(reason))
    except KernelUnavailable as reason:
        return Row(label, "refused", " ".join(str(reason).split()))
    except Exception as error:
        text = " ".join(str(error).split())
        return Row(label, "fail", (text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}")[:300])
    return Row(label, "ok")
