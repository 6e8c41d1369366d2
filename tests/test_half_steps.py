"""Steps in one call with weights and caches in bfloat16: rows between them are float32, so they err less than the ordinary way."""

from __future__ import annotations

import pytest
import torch
from fnattn_kernels.native.build import why_not
from test_steps import CAPACITY, MODELS, ORDINARY, STREAMING, WIDE, N, moved, sequence, taken  # noqa: F401

import fnattn
from fnattn import random, tree
from fnattn.models import lm

pytestmark = pytest.mark.skipif(why_not("steps") is not None, reason="needs a C compiler")
BF16 = torch.bfloat16


def wider(t):
    return t.double() if t.is_floating_point() else t


def narrower(t):
    return t.to(BF16) if t.is_floating_point() else t


def walk(apply, params, xs, state, impl):
    outs = []
    for x in xs:
        out, state = apply(params, x, state, impl=impl)
        outs.append(out)
    return torch.cat(outs, 1), state


def error(got, true):
    return float((got.double() - true).norm() / true.norm())


def no_worse(apply, params, xs, state, truth):
    """Results and states of steps err at most as much as those of plain torch in bfloat16, and are of the same kinds."""
    found, after = walk(apply, params, xs, state, "auto")
    plain, expected = walk(apply, params, xs, state, "reference")
    true, last = walk(apply, tree.map(wider, params), [wider(x) for x in xs], truth, "reference")
    assert found.dtype == BF16 and true.norm() > 1e-2
    # Half a unit of rounding: what the last rounding alone may do.
    assert error(found, true) <= max(error(plain, true), 2.0 ** -9), (error(found, true), error(plain, true))
    assert tree.structure(after) == tree.structure(expected)
    for ours, theirs, exact in zip(tree.leaves(after), tree.leaves(expected), tree.leaves(last), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.is_floating_point() and exact.norm() > 0:
            assert error(ours, exact) <= max(1.1 * error(theirs, exact), 2.0 ** -9), (error(ours, exact), error(theirs, exact))
        elif not ours.is_floating_point():
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cfg", [*WIDE, *(c for c in STREAMING if c not in ORDINARY)], ids=str)
def test_layers(cfg, taken):  # noqa: F811
    params, x, _ = sequence(cfg, BF16)
    params = tree.map(narrower, params)
    state = fnattn.init_state(params, 3, capacity=CAPACITY)
    truth = fnattn.init_state(tree.map(wider, params), 3, capacity=CAPACITY)
    no_worse(fnattn.apply, params, x.split(1, 1), state, truth)
    assert len(taken) == N - getattr(cfg, "seq_len", 0) - 1 + cfg.image_size ** 2 if hasattr(cfg, "image_size") else len(taken) == N


@pytest.mark.parametrize("cfg", MODELS, ids=lambda cfg: type(cfg.attention).__module__.rpartition(".")[2])
def test_models(cfg, taken):  # noqa: F811
    params = tree.map(narrower, moved(lm.init(random.key(0), cfg)))
    ids = random.bits(random.key(1), (2, N)).remainder(19).long().split(1, 1)
    truth = lm.init_state(tree.map(wider, params), 2, capacity=CAPACITY)
    no_worse(lm.apply, params, ids, lm.init_state(params, 2, capacity=CAPACITY), truth)
    assert len(taken) == N


@pytest.mark.parametrize("which", range(3), ids=["weights", "norm", "state"])
def test_mixed_precisions_go_the_ordinary_way_or_are_refused(which, taken):  # noqa: F811
    params, x, state = sequence(WIDE[2], BF16)
    if which == 2:
        fnattn.apply(params, x[:, :1], state._replace(sums=state.sums.double()))
    else:
        name = ("to_out", "norm")[which]
        mixed = params._replace(**{name: getattr(params, name).float()})
        try:
            fnattn.apply(mixed, x[:, :1], state)
        except (TypeError, RuntimeError):
            pass
    assert not taken
