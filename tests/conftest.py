"""What every test shares: strictness, one table of tolerances, keys, poisoned memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import platform
import shutil
import sys
import tempfile

import pytest

# The compile cache on disk knows a custom operator by its name alone: a test must never be served yesterday's gradient.
# Set before torch is imported; worker processes inherit it.
if "FNATTN_TEST_COMPILE_CACHE" not in os.environ:
    cache, owner = tempfile.mkdtemp(prefix="fnattn-tests-"), os.getpid()
    os.environ["FNATTN_TEST_COMPILE_CACHE"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    # A forked child that ends must not take the folder with it.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(cache, ignore_errors=True))

# As it has been: from Triton 3.9 on it warns where this is not said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import hypothesis
import torch
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build
from fnattn_kernels.native.call import function

import fnattn
import fnattn.random

# Two threads on a busy machine make small operators ten times slower, and results must not depend on their number.
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # not everything there needs Triton itself
        import quick_interpreter  # noqa: F401


@functools.cache
def keep_what_is_imported(moment: str) -> None:
    """It stays anyway: collecting garbage need not look at its million objects again and again."""
    gc.collect()
    gc.freeze()


keep_what_is_imported("at the start")

# The same examples in every run, however slow the machine; nothing is left in the checkout.
hypothesis.settings.register_profile("fnattn", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fnattn")

# Where the C kernels make zeros of what would be subnormal: see tests/kernels/test_subnormals.py.
FLUSHES = platform.machine().lower() in ("x86_64", "amd64", "i686")

# dtype -> (rtol, atol) for comparing two correct ways to compute the same thing. One table, which nothing loosens:
# a test that needs more states the measured error and its cause.
TOL = {
    torch.float64: dict(rtol=1e-10, atol=1e-12),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1e-2),
    torch.float16: dict(rtol=2e-3, atol=1e-3),
    torch.complex128: dict(rtol=1e-10, atol=1e-12),
    torch.complex64: dict(rtol=1e-4, atol=1e-5),
}


def assert_close(actual, expected, dtype: torch.dtype | None = None) -> None:
    """Equal to the table's tolerance for `dtype`, by default the coarser of the two dtypes."""
    if dtype is None:
        dtype = max(actual.dtype, expected.dtype, key=lambda d: TOL.get(d, {"rtol": 0.0})["rtol"])
    torch.testing.assert_close(actual, expected, **TOL.get(dtype, dict(rtol=0.0, atol=0.0)), check_dtype=False)


@pytest.fixture
def key():
    """A key for tests that need one and do not care which."""
    return fnattn.random.key(17)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Each test compiles afresh: torch allows eight recompilations of one code object, and all tests share torch.func's."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        keep_what_is_imported("with the compiler")


@pytest.fixture(params=["native", "avx2", "baseline"])
def instructions(request, monkeypatch):
    """The kernels, built for these instructions."""
    monkeypatch.setenv("FNATTN_ISA", request.param)
    try:
        build._extra_flags(request.param)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    function.cache_clear()
    yield
    function.cache_clear()


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills the memory that torch.empty and its kin hand out with NaN (integers: their largest value).

    A kernel that forgets to write part of its output passes most days, when fresh memory happens to hold zeros.
    """
    def poison(t):
        if t.is_floating_point() or t.is_complex():
            return t.fill_(float("nan"))
        return t.fill_(torch.iinfo(t.dtype).max) if t.dtype != torch.bool else t.fill_(True)

    def wrap(fn):
        return lambda *args, **kwargs: poison(fn(*args, **kwargs))

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")),
                         (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@contextlib.contextmanager
def refused(who, error, *texts):
    """An error that names the function, says these texts on its first line, and a remedy below."""
    with pytest.raises(error) as caught:
        yield
    first, _, remedy = str(caught.value).partition("\n  ")
    assert first.startswith(f"{who}: ") and remedy, caught.value
    assert all(text in first for text in texts), first
