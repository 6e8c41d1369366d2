"""Params, inputs, sizes and dtypes that a family cannot take: the error names the function, what it expected and what came."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import assert_close, refused
from torch.nn import functional as F

import fnattn
from fnattn import EMPTY, random, tree
from fnattn.attentions import FAMILIES, full, linformer, simple_gate_loop, sparse_axial, sparse_conv, taylor

B, N = 3, 5
KEY = random.key(5)
EXAMPLES = [(name, cfg) for name, family in FAMILIES.items() for cfg in family.examples]
each = pytest.mark.parametrize("name, cfg", EXAMPLES, ids=str)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def made(cfg, dtype=torch.float32):
    return fnattn.init(KEY, cfg, dtype=dtype), random.normal(KEY, (B, N, cfg.dim)).to(dtype)


def state_of(family, params):
    try:
        return family.init_state(params, B, capacity=N)
    except ValueError:
        return EMPTY


# ------------------------------------------------------------------------------------------------ params


@each
def test_a_config_or_another_familys_params_in_the_place_of_params(name, cfg):
    family, (params, x) = FAMILIES[name], made(cfg)
    other = fnattn.init(KEY, next(c for n, c in EXAMPLES if n == ("full" if name != "full" else "taylor")))
    for wrong, kind in ((cfg, f"{name}.Config"), (other, type(other).__module__.rpartition(".")[2] + ".Params"), (None, "NoneType"),
                        (params._asdict(), "dict")):
        for length in (1, N):
            with refused(f"{name}.apply", TypeError, f"must come from {name}.init", kind):
                family.apply(wrong, x[:, :length])
            state = state_of(family, params)
            with refused(f"{name}.apply", TypeError, f"must come from {name}.init", kind):
                family.apply(wrong, x[:, :length], state)
        if family.streams:
            with refused(f"{name}.init_state", TypeError, f"must come from {name}.init", kind):
                family.init_state(wrong, 1, capacity=5)


def test_two_families_with_one_form_of_params_tell_them_apart():
    conv = sparse_conv.init(KEY, sparse_conv.Config(dim=7, seq_len=18, image_size=4, heads=2, dim_head=5))
    axial = sparse_axial.init(KEY, sparse_axial.Config(dim=7, seq_len=18, image_size=4, heads=2, dim_head=5))
    x = torch.ones(1, 5, 7)
    with refused("sparse_axial.apply", TypeError, "sparse_axial.init", "sparse_conv.Config"):
        sparse_axial.apply(conv, x)
    with refused("sparse_conv.init_state", TypeError, "sparse_conv.init"):
        sparse_conv.init_state(axial, 1, capacity=5)


@each
def test_init_takes_its_own_config_and_a_floating_dtype(name, cfg):
    family = FAMILIES[name]
    other = linformer.Config(dim=6, seq_len=3, heads=2) if name != "linformer" else taylor.Config(dim=6)
    for wrong in (other, None, family.init(KEY, cfg), {"dim": 3}):
        with refused(f"{name}.init", TypeError, f"must be {name}.Config"):
            family.init(KEY, wrong)
    for dtype in (torch.int32, torch.bool, torch.complex64, "float32", None):
        with refused(f"{name}.init", TypeError, "dtype must be floating point", str(dtype)):
            family.init(KEY, cfg, dtype=dtype)


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each
def test_params_and_input_of_two_dtypes_are_named_with_a_remedy_that_works(name, cfg, dtype):
    family = FAMILIES[name]
    params, x = made(cfg, dtype)
    for length in (1, N):
        for other in FLOATS:
            given = x[:, :length].to(other)
            for state in (EMPTY, state_of(family, params)):
                if other == dtype:
                    continue
                with refused(f"{name}.apply", TypeError, f"x must be {dtype}, as the params are; got {other}"):
                    family.apply(params, given, state)
            if (dtype, other) == (torch.float32, torch.float64):
                assert family.apply(params, given.to(dtype))[0].dtype == dtype
                moved = tree.map(lambda t, other=other: t.to(other) if t.is_floating_point() else t, params)
                assert family.apply(moved, given)[0].dtype == other


@pytest.mark.parametrize("name, cfg", [(n, c) for n, c in EXAMPLES if FAMILIES[n].contexts and not getattr(c, "causal", False)], ids=str)
def test_a_context_of_another_dtype_is_named(name, cfg):
    params, x = made(cfg)
    with refused(f"{name}.apply", TypeError, "context must be torch.float32", "torch.float64"):
        fnattn.apply(params, x, context=x.double())
    with refused(f"{name}.apply", TypeError, "context must be floating point", "torch.int64"):
        fnattn.apply(params, x, context=x.long())


@each
def test_autocast_mixes_dtypes_as_a_linear_map_does(name, cfg):
    params, x = made(cfg)
    half, weight = x.bfloat16(), torch.ones(2, cfg.dim)
    with torch.autocast("cpu", torch.bfloat16):
        out, wide = fnattn.apply(params, half)[0], fnattn.apply(params, half.float())[0]
        streamed = fnattn.apply(params, half, state_of(FAMILIES[name], params))[0]
        assert out.dtype == F.linear(half, weight).dtype or out.dtype == half.dtype
        assert_close(out, wide, torch.bfloat16)
        assert_close(streamed, out, torch.bfloat16)
        # float64 is what autocast leaves alone.
        with pytest.raises(RuntimeError):
            F.linear(x.double(), weight)
        with refused(f"{name}.apply", TypeError, "x must be torch.float32", "torch.float64"):
            fnattn.apply(params, x.double())
    with refused(f"{name}.apply", TypeError, "x must be torch.float32", "torch.bfloat16"):
        fnattn.apply(params, half)


@each
def test_an_input_that_is_no_sequence_is_named(name, cfg):
    params, x = made(cfg)
    state = state_of(FAMILIES[name], params)
    for given in ((), (state,)):
        for wrong, error in ((None, TypeError), (x.tolist(), TypeError), (x.long(), TypeError), (x[0], ValueError), (x[0, 0], ValueError),
                             (x[0, 0, 0], ValueError), (x[..., :-1], ValueError), (x[None], ValueError)):
            with refused(f"{name}.apply", error, "x must be ", "; got "):
                FAMILIES[name].apply(params, wrong, *given)


@each
def test_a_mask_or_context_that_is_no_tensor_is_named(name, cfg):
    params, x = made(cfg)
    state, family = state_of(FAMILIES[name], params), FAMILIES[name]
    for length in (1, N):
        seen = [[True] * length] * B
        with refused(f"{name}.apply", (TypeError, ValueError), "mask"):
            family.apply(params, x[:, :length], mask=seen)
        with refused(f"{name}.apply", (TypeError, ValueError), "mask"):
            family.apply(params, x[:, :length], state, mask=seen)
        with refused(f"{name}.apply", (TypeError, ValueError), "context"):
            family.apply(params, x[:, :length], context=x.tolist())
        if family.masks:
            with refused(f"{name}.apply", TypeError, "mask must be a bool tensor", "list"):
                family.apply(params, x[:, :length], mask=seen)
            floats = torch.ones(B, length)
            with refused(f"{name}.apply", TypeError, "mask must be bool", "torch.float32"):
                family.apply(params, x[:, :length], mask=floats)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.streams])
def test_a_state_has_a_whole_number_of_sequences_and_positions(name):
    family = FAMILIES[name]
    params = fnattn.init(KEY, family.examples[0])
    for batch, capacity, what, error in ((-1, 5, "batch", ValueError), (2.0, 5, "batch", TypeError), (True, 5, "batch", TypeError),
                                         (None, 5, "batch", TypeError), (2, -1, "capacity", ValueError), (2, 5.0, "capacity", TypeError),
                                         (2, False, "capacity", TypeError), (2, "5", "capacity", TypeError)):
        with refused(f"{name}.init_state", error, f"{what} must "):
            family.init_state(params, batch, capacity=capacity)
    assert tree.leaves(family.init_state(params, 0, capacity=5))[0].shape[0] == 0


def sizes(cfg):
    return [field.name for field in dataclasses.fields(cfg) if field.type in ("int", "int | None")]


@each
def test_a_config_has_whole_and_positive_sizes(name, cfg):
    assert "dim" in sizes(cfg)
    for field in sizes(cfg):
        whole = getattr(cfg, field) or 1
        for wrong, error in ((float(whole), TypeError), (True, TypeError), (-3, ValueError), ("3", TypeError)):
            with refused(f"{name}.Config", error, f"{field} must ", str(wrong)):
                dataclasses.replace(cfg, **{field: wrong})
        if field not in ("axis", "attn_null_kv", "text_seq_len", "num_random_blocks"):
            with refused(f"{name}.Config", ValueError, f"{field}"):
                dataclasses.replace(cfg, **{field: 0})


def test_sizes_may_come_from_numpy():
    numpy = pytest.importorskip("numpy", reason="torch, and this library, work without it")
    cfg = full.Config(dim=numpy.int64(7), seq_len=13, heads=3, dim_head=5)
    same = full.Config(dim=7, seq_len=13, heads=3, dim_head=5)
    assert cfg == same and hash(cfg) == hash(same)
    params = fnattn.init(KEY, simple_gate_loop.Config(dim=5))
    assert fnattn.init_state(params, numpy.int32(2), capacity=1).h.shape == (2, 5)
