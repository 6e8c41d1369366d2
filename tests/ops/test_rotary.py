"""rotary against multiplication by complex numbers, and against rotary-embedding-torch."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build
from torch.autograd import gradcheck, gradgradcheck
from upstream import upstream

from fnattn.ops import lang_freqs, pixel_freqs, rotary, rotate

F64, F32 = torch.float64, torch.float32
PACKAGE = "rotary_embedding_torch"
NO_KERNEL, NO_PACKAGE = build.why_not("rotary") is not None, importlib.util.find_spec(PACKAGE) is None
IMPLS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(NO_KERNEL, reason="the C kernel cannot be built here")),
    pytest.param(PACKAGE, marks=pytest.mark.skipif(NO_PACKAGE, reason="rotary-embedding-torch is not installed")),
]


def normal(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def turned(x, positions, freqs):
    """Each pair as a complex number times exp(i angle)."""
    f = len(freqs)
    pairs = torch.view_as_complex(x[..., :2 * f].unflatten(-1, (f, 2)).contiguous())
    angle = positions[:, None].double() * freqs.double()
    return torch.cat((torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2), x[..., 2 * f:]), -1)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape, f", [((2, 3, 5, 7), 3), ((2, 3, 5, 7), 2), ((5, 4), 2), ((2, 1, 3, 5, 6), 1), ((2, 5, 3), 0),
                                      ((2, 3, 1, 11), 5)], ids=str)
def test_pairs_turn_like_complex_numbers_in_value_gradient_and_tangent(shape, f, impl, dtype):
    x, positions, freqs = normal(*shape, dtype=dtype), torch.arange(shape[-2]) + 3, normal(f, dtype=F64, seed=1)
    weight, move, faster = normal(*shape, dtype=dtype, seed=2), normal(*shape, dtype=dtype, seed=3), normal(f, seed=4)

    def derivatives(fn, x, weight, move):
        out, pull = torch.func.vjp(fn, x, freqs)
        return out, *pull(weight), torch.func.jvp(fn, (x, freqs), (move, faster))[1]

    ours = derivatives(lambda x, freqs: rotary(x, positions, freqs, impl=impl), x, weight, move)
    theirs = derivatives(lambda x, freqs: turned(x, positions, freqs), x.double(), weight.double(), move.double())
    assert ours[0].dtype == ours[1].dtype == dtype
    for a, b in zip(ours, theirs):
        assert f == 0 or b.abs().max() > 0
        assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_derivatives_equal_finite_differences_in_both_modes_and_second_order(impl):
    args = normal(2, 3, 5, 7).requires_grad_(), normal(3, seed=1).requires_grad_()

    def fn(x, freqs):
        return rotary(x, torch.arange(5), freqs, impl=impl)

    assert gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(fn, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_products_depend_on_the_distance_alone(impl):
    q, k, freqs = normal(1, 1, 1, 10), normal(1, 1, 1, 10, seed=1), lang_freqs(10).double()

    def product(i, j):
        return (rotary(q, torch.tensor([i]), freqs, impl=impl) * rotary(k, torch.tensor([j]), freqs, impl=impl)).sum()

    assert_close(product(17, 5), product(1017, 1005))
    assert (product(17, 5) - product(17, 6)).abs() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_beyond_256_are_exact_in_narrow_floats(impl, dtype):
    x, positions, freqs = normal(1, 1, 4001, 8, dtype=dtype), torch.arange(4001), lang_freqs(8)
    exact = turned(x.double(), positions, freqs)
    ours = rotary(x, positions, freqs, impl=impl)
    assert ours.dtype == dtype
    rounding = (exact.to(dtype).double() - exact).abs().max()
    # float32 angles near 4000 are off by up to 1.2e-4
    assert (ours.double() - exact).abs().max() <= 2 * rounding + 1.2e-4 * x.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_position_starts_a_run(impl):
    x, freqs = normal(2, 3, 5, 7), lang_freqs(6).double()
    assert_close(rotary(x, torch.tensor(11), freqs, impl=impl), rotary(x, torch.arange(11, 16), freqs, impl=impl))
    assert rotary(x[:, :, :0], torch.tensor(3), freqs, impl=impl).shape == (2, 3, 0, 7)


@pytest.mark.parametrize("impl", IMPLS)
def test_mapping_over_inputs_positions_or_frequencies_equals_a_loop(impl):
    xs, starts, freqs = normal(3, 2, 5, 7, 8), torch.tensor([0, 7, 301]), normal(3, 4, seed=1)

    def fn(x, start, freqs):
        return torch.func.grad(lambda x, freqs: rotary(x, start, freqs, impl=impl).sin().sum(), (0, 1))(x, freqs)

    for dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (None, 0, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((xs, starts, freqs), dims)]
        loop = [fn(*(a[i] if d == 0 else a for a, d in zip(args, dims))) for i in range(3)]
        for mapped, one in zip(torch.vmap(fn, dims)(*args), zip(*loop)):
            assert_close(mapped, torch.stack(one))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_of_inputs_and_gradients_do_not_matter(impl, poisoned_empty):
    x, positions, freqs = normal(2, 5, 3, 7), torch.arange(5), normal(3, seed=1)
    for view in (x.transpose(1, 2), x.permute(3, 2, 1, 0)[:2].transpose(0, 3)[..., :2].repeat(1, 1, 1, 4)[..., :7],
                 x[:1, :1, :1, :1].expand(2, 3, 5, 7), x[..., ::2].transpose(1, 2).repeat(1, 1, 1, 2)[..., ::1]):
        def fn(x):
            return rotary(x, positions, freqs, impl=impl)
        clone = view.clone(memory_format=torch.contiguous_format)
        assert_close(fn(view), turned(clone, positions, freqs))
        assert_close(torch.func.grad(lambda x: fn(x).sum())(view),
                     torch.func.grad(lambda x: turned(x, positions, freqs).sum())(clone))


def test_all_implementations_agree_with_the_package_and_its_frequencies():
    module = upstream(PACKAGE).RotaryEmbedding
    lang, pixel = module(32, cache_if_possible=False), module(20, freqs_for="pixel", cache_if_possible=False)
    assert torch.equal(lang.freqs, lang_freqs(32)) and torch.equal(pixel.freqs, pixel_freqs(20))
    assert torch.equal(module(7, theta=500.0, cache_if_possible=False).freqs, lang_freqs(7, theta=500.0))
    x = normal(2, 3, 997, 37, dtype=F32)
    for impl in ("reference", "auto", PACKAGE):
        assert_close(rotary(x, torch.tensor(0), lang_freqs(32), impl=impl), lang.rotate_queries_or_keys(x).detach())


def test_a_table_of_angles_may_be_given_instead_of_positions():
    x, angles = normal(2, 3, 5, 7), torch.linspace(-1, 1, 5, dtype=F64)[:, None] * pixel_freqs(6).double()
    assert_close(rotate(x, angles), turned(x, torch.linspace(-1, 1, 5, dtype=F64), pixel_freqs(6).double()))
    assert math.isclose(pixel_freqs(6)[-1], 5 * math.pi, rel_tol=1e-6)


X, POSITIONS, FREQS = torch.ones(2, 3, 5, 7), torch.arange(5), torch.ones(3)
ERRORS = [
    ((X.long(), POSITIONS, FREQS), TypeError, "x must be a floating point tensor; got torch.int64",
     (X.long().float(), POSITIONS, FREQS)),
    ((X[0, 0, 0], POSITIONS, FREQS), ValueError, r"x must be \[..., n, d\]; got \[7\]", (X[0, 0, 0][None], torch.arange(1), FREQS)),
    ((X, POSITIONS.float(), FREQS), TypeError, "positions must be an integer tensor; got torch.float32",
     (X, torch.arange(5), FREQS)),
    ((X, torch.arange(6), FREQS), ValueError, r"positions must be \[5\], one per row of x, or 0-d; got \[6\]",
     (X, POSITIONS, FREQS)),
    ((X, POSITIONS, torch.ones(2, 3)), ValueError, r"freqs must be a tensor \[f\]; got \[2, 3\]", (X, POSITIONS, lang_freqs(6))),
    ((X, POSITIONS, torch.ones(4)), ValueError, r"2 f <= 7 channels; got \[5, 4\]", (X, POSITIONS, lang_freqs(7))),
]


@pytest.mark.parametrize("args, error, text, remedy", ERRORS, ids=[e[2][:25] for e in ERRORS])
def test_a_mistake_is_named_and_its_remedy_works(args, error, text, remedy):
    with pytest.raises(error, match=text):
        rotary(*args)
    rotary(*remedy)


def test_narrow_angles_are_refused():
    with pytest.raises(TypeError, match="angles must be a float32 or float64 tensor; got torch.bfloat16"):
        rotate(X, torch.ones(5, 3).bfloat16())
    rotate(X, torch.ones(5, 3).bfloat16().float())


def test_a_package_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match="pip install rotary-embedding-torch"):
        rotary(X, POSITIONS, FREQS, impl=PACKAGE)
    rotary(X, POSITIONS, FREQS)
