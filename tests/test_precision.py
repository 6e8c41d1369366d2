"""How far every kernel is from float64, beside plain torch in the same precision: at most twice as far.

Errors are measured against the largest entry of what is exact, for the value and for every gradient. One rounding of the
result is always allowed on top: plain torch may be lucky.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from conftest import assert_close

from fnattn import ops
from fnattn.bench import implementations
from fnattn.ops.report import CASES
from fnattn.random import fold_in, key, normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 63, 64, 65, 1000, 8192)
# A table of all pairs of 8192 positions is not worth its time here.
QUADRATIC = {"softmax_attention", "masked_softmax", "coor_descent_attention", "block_sparse_attention", "conv_attention", "axial_attention"}
PAIRS = [(name, kernel) for name, case in CASES.items() for kernel in importlib.import_module(f"fnattn.ops.{case.module}").KERNELS]


def situations(name, dtype):
    """(length, badly scaled): all in float32; low precision, which is rounded at the ends only, skips the dear ones."""
    found = [(n, bad) for n in LENGTHS for bad in (False, True) if n <= 1000 or name not in QUADRATIC]
    if dtype == torch.float32:
        return found
    return [(n, bad) for n, bad in found if (n <= 1000 or not bad) and (n <= 65 or name != "coor_descent_attention")]


def sizes(n):
    return {"b": 1, "h": 2, "n": n, "d": 4}


def draw(bad, count, *shape):
    """Normal numbers; badly scaled: channels between a twentieth and twenty, about a mean far from 0."""
    here = fold_in(key(0), next(count))
    x = normal(here, shape, torch.float64)
    return x if not bad else (x + 1) * normal(fold_in(here, 1), shape[-1:], torch.float64).clamp(-3, 3).exp()


def inputs(name, n, bad, dtype):
    """The arguments in float64, rounded to dtype; floating ones only are to be differentiated."""
    count = iter(range(100))
    args = CASES[name].call(functools.partial(draw, bad, count), sizes(n))
    return [a.to(dtype).double() if a.is_floating_point() else a for a in args]


def value_and_gradients(name, impl, n, args):
    args = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
    out = implementations.function(name, impl, sizes(n))(*args)
    weights = torch.arange(out.numel()).cos().reshape(out.shape).to(torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [a for a in args if a.requires_grad], allow_unused=True,
                                                 materialize_grads=True)]


@functools.cache
def exact(name, n, bad, dtype):
    return value_and_gradients(name, "reference", n, inputs(name, n, bad, dtype))


def errors(name, impl, n, bad, dtype):
    """Of the value and of each gradient, as a part of the largest exact entry; None where dtype cannot hold that."""
    found = value_and_gradients(name, impl, n, [a.to(dtype) if a.is_floating_point() else a for a in inputs(name, n, bad, dtype)])
    truths = exact(name, n, bad, dtype)
    most = max(t.abs().max() for t in truths if t.numel())
    result = []
    for ours, truth in zip(found, truths, strict=True):
        top = truth.abs().max() if truth.numel() else torch.zeros(())
        if truth.numel() and top < 1e-6 * most:  # it cancels: what is left is a rounding of terms larger than any result
            top = 100 * most
        held = 0 < top < torch.finfo(ours.dtype).max / 2
        result.append(((ours.double() - truth).abs().max() / top).item() if held else None)
    return result


@functools.cache
def plain(name, n, bad, dtype):
    return errors(name, "reference", n, bad, dtype)


def able(name, kernel):
    reason = kernel.why_not(*CASES[name].asked(*inputs(name, 64, False, torch.float32)))
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, kernel", PAIRS, ids=lambda p: getattr(p, "name", p))
def test_errs_at_most_twice_as_much_as_plain_torch(name, kernel, dtype):
    able(name, kernel)
    unit, far, seen = torch.finfo(dtype).eps, [], 0
    for n, bad in situations(name, dtype):
        pairs = zip(errors(name, kernel.name, n, bad, dtype), plain(name, n, bad, dtype), strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            seen += ours is not None
            if ours is not None and not ours <= 2 * theirs + unit:
                far.append(f"n {n}, {'badly' if bad else 'well'} scaled, {f'gradient {i}' if i else 'value'}: {ours:.1e}, plain "
                           f"{theirs:.1e}")
    assert seen > 10
    assert not far, "\n" + "\n".join(far)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name, kernel", PAIRS, ids=lambda p: getattr(p, "name", p))
def test_any_memory_will_do(name, kernel, dtype, poisoned_empty):
    """Arguments in another order of memory, and some that are one row seen many times; fresh memory is NaN."""
    able(name, kernel)
    plain_args = [a.to(dtype) if a.is_floating_point() else a for a in inputs(name, 65, False, dtype)]
    turned = [a.permute(*reversed(range(a.ndim))).contiguous().permute(*reversed(range(a.ndim))) for a in plain_args]
    spread = [a.narrow(1, 0, 1).expand_as(a) if a.is_floating_point() and a.ndim > 2 and a.shape[1] else a for a in plain_args]
    for strange, usual in ((turned, plain_args), (spread, [a.contiguous() for a in spread])):
        for a, b in zip(value_and_gradients(name, kernel.name, 65, strange), value_and_gradients(name, kernel.name, 65, usual)):
            assert_close(a, b, dtype)


@pytest.mark.parametrize("name, kernel", PAIRS, ids=lambda p: getattr(p, "name", p))
def test_nothing_gives_nothing(name, kernel):
    able(name, kernel)
    if name in ("cached_attention", "linear"):
        pytest.skip("the case has a row whatever n")
    args = [a.float() if a.is_floating_point() else a for a in inputs(name, 0, False, torch.float32)]
    for given, found in zip([None, *[a for a in args if a.is_floating_point()]], value_and_gradients(name, kernel.name, 0, args)):
        assert found.isfinite().all() and (given is None or (found.shape == given.shape and not found.any()))


@pytest.mark.parametrize("bad", (False, True), ids=("well scaled", "badly scaled"))
@pytest.mark.parametrize("queries, keys", ((1, 1000), (7, 8192)))
def test_few_queries_of_many_keys_err_at_most_twice_as_much_as_plain_torch(queries, keys, bad):
    count = iter(range(9))
    given = [draw(bad, count, 1, 2, n, 4).float() for n in (queries, keys, keys)]

    def found(impl, dtype):
        args = [x.to(dtype).requires_grad_() for x in given]
        out = ops.softmax_attention(*args, impl=impl)
        return [out.detach(), *torch.autograd.grad((out * torch.arange(out.numel()).cos().reshape(out.shape)).sum(), args)]

    for ours, plain, truth in zip(found("native", torch.float32), found("reference", torch.float32), found("reference", torch.float64)):
        far, theirs = ((x - truth).abs().max() / truth.abs().max() for x in (ours, plain))
        assert far <= 2 * theirs + torch.finfo(torch.float32).eps
