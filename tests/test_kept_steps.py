"""Steps carried out by instructions of the step before: the same numbers, and never where anything but positions has changed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from fnattn_kernels.native import kept_steps
from fnattn_kernels.native.build import why_not
from test_steps import MODELS, ORDINARY, STREAMING, WATCHERS, WIDE, N, moved, sequence
from torch.fx.experimental.proxy_tensor import make_fx

import fnattn
from fnattn import random, tree
from fnattn.attentions import full, gate_loop, gate_loop_full, simple_gate_loop, taylor
from fnattn.models import lm

pytestmark = pytest.mark.skipif(why_not("steps") is not None, reason="needs a C compiler")
CAPACITY = 80  # caches take in the last 8 positions at every eighth
# Families whose instructions do not change from one position to the next, but for numbers that count it.
KEPT = [cfg for cfg in (*WIDE, *(c for c in STREAMING if c not in ORDINARY))
        if isinstance(cfg, (taylor.Config, gate_loop.Config, simple_gate_loop.Config, full.Config))
        or isinstance(cfg, gate_loop_full.Config) and cfg.softmax]
CONFIG = taylor.Config(dim=24, heads=4, dim_head=16, causal=True)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(kept_steps, "_KEPT", {})
    monkeypatch.setattr(kept_steps, "_LAST", [None])


@pytest.fixture
def again(monkeypatch) -> list:
    """One entry for every step by kept instructions."""
    seen, run = [], kept_steps.Kept.run
    monkeypatch.setattr(kept_steps.Kept, "run", lambda self, *args: seen.append(self) or run(self, *args))
    return seen


def steps(apply, params, xs, state):
    outs, states = [], []
    for x in xs:
        out, state = apply(params, x, state)
        outs.append(out)
        states.append(state)
    return outs, states


def expected(monkeypatch, apply, params, xs, state):
    """The same by instructions that are written anew."""
    with monkeypatch.context() as patch:
        patch.setattr(kept_steps, "find", lambda *args: None)
        return steps(apply, params, xs, state)


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def times(cfg):
    """How many of N steps are carried out by kept instructions: not the first two, nor a cache's eighth and the one after it."""
    return N - 4 if isinstance(cfg, (full.Config, gate_loop_full.Config)) else N - 2


def warm(params, x, state):
    """After two steps the third one's instructions are kept."""
    for _ in range(2):
        _, state = fnattn.apply(params, x, state)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cfg", KEPT, ids=str)
def test_layers(cfg, dtype, again, monkeypatch):
    params, x, _ = sequence(cfg, dtype)
    state = fnattn.init_state(params, 3, capacity=CAPACITY)
    xs = [t.contiguous() for t in x.split(1, 1)]
    before = [t.clone() for t in tree.leaves((params, xs, state))]
    ours = steps(fnattn.apply, params, xs, state)
    assert len(again) == times(cfg)
    assert same(ours, expected(monkeypatch, fnattn.apply, params, xs, state))
    assert same(before, tree.leaves((params, xs, state)))
    assert ours[0][-1].abs().max() > 1e-2


@pytest.mark.parametrize("cfg", MODELS, ids=lambda cfg: type(cfg.attention).__module__.rpartition(".")[2])
def test_models(cfg, again, monkeypatch):
    params = moved(lm.init(random.key(0), cfg))
    ids = list(random.bits(random.key(1), (2, N)).remainder(19).long().split(1, 1))
    state = lm.init_state(params, 2, capacity=CAPACITY)
    ours = steps(lm.apply, params, ids, state)
    assert len(again) == times(cfg.attention)
    assert same(ours, expected(monkeypatch, lm.apply, params, ids, state))


def test_states_that_go_back_or_stand_elsewhere(again):
    """Instructions serve the positions that they were written for, whichever state asks."""
    params = moved(fnattn.init(random.key(1), WIDE[3]))
    x = random.normal(random.key(2), (3, 40, 24))
    _, states = steps(fnattn.apply, params, x.split(1, 1), fnattn.init_state(params, 3, capacity=CAPACITY))
    again.clear()
    for t in (31, 3, 2, 30, 0, 7, 8, 9, 9, 10, 8, 14, 15, 38):
        found, truth = (fnattn.apply(params, x[:, t + 1:t + 2], states[t], impl=impl) for impl in ("auto", "reference"))
        torch.testing.assert_close(found, truth)
    assert again


def test_blocks_at_positions_of_their_own(again):
    cfg = lm.Config(attention=full.Config(dim=16, seq_len=40, heads=2, dim_head=8, rotary_emb=True), depth=2, num_tokens=19)
    params = moved(lm.init(random.key(0), cfg, dtype=torch.float64))
    ids = random.bits(random.key(1), (1, 12)).remainder(19).long()
    _, states = steps(lm.apply, params, ids.split(1, 1), lm.init_state(params, 1, capacity=CAPACITY))
    again.clear()
    for i, j in ((0, 3), (1, 4), (2, 5), (2, 4), (3, 3)):
        state = states[i]._replace(blocks=(states[i].blocks[0], states[j].blocks[1]))
        found, truth = (lm.apply(params, ids[:, :1], state, impl=impl) for impl in ("auto", "reference"))
        torch.testing.assert_close(found, truth)
    assert again


def test_a_full_cache_is_still_an_error(again):
    params, x, _ = sequence(WIDE[3])
    state = fnattn.init_state(params, 3, capacity=7)
    for t in range(7):
        _, state = fnattn.apply(params, x[:, t:t + 1], state)
    with pytest.raises(ValueError, match="init_state"):
        fnattn.apply(params, x[:, 7:8], state)


def test_a_token_that_is_not_there_is_still_an_error(again):
    params = lm.init(random.key(0), MODELS[0])
    ids, state = torch.tensor([[3]]), lm.init_state(params, 1, capacity=4)
    for _ in range(3):
        lm.apply(params, ids, state)
    assert len(again) == 1
    with pytest.raises(ValueError, match="ids must lie in"):
        lm.apply(params, torch.tensor([[19]]), state)


def test_batches_and_layouts_of_the_input_have_their_own(again):
    params, x, state = sequence(CONFIG)
    one = fnattn.init_state(params, 1, capacity=1)
    for _ in range(3):
        turned = x[:, :1].transpose(0, 2).contiguous().transpose(0, 2)
        for part, before in ((x[:, :1], state), (x[:1, :1], one), (x[:, :1].contiguous(), state), (turned, state)):
            torch.testing.assert_close(fnattn.apply(params, part, before)[0], fnattn.apply(params, part, before, impl="reference")[0])
    assert again


def change_in_place(params):
    params.to_q.mul_(2)


def other_memory(params):
    params.to_q.data = params.to_q.clone().mul_(2)


@pytest.mark.parametrize("change", [change_in_place, other_memory])
def test_weights_that_change(change, again):
    params, x, state = sequence(CONFIG)
    state = warm(params, x[:, :1], state)
    change(params)
    found = fnattn.apply(params, x[:, :1], state)[0]
    torch.testing.assert_close(found, fnattn.apply(params, x[:, :1], state, impl="reference")[0])
    assert len(again) == (change is change_in_place)


def test_weights_that_change_their_layout(again):
    cfg = taylor.Config(dim=16, heads=2, dim_head=8, causal=True)
    params, x, state = sequence(cfg)
    state = warm(params, x[:, :1], state)
    params.to_q.data = params.to_q.data.t()  # the same memory and shape
    torch.testing.assert_close(fnattn.apply(params, x[:, :1], state)[0], fnattn.apply(params, x[:, :1], state, impl="reference")[0])
    params.to_q.data = params.to_q.data.t().reshape(8, 32)
    with pytest.raises((ValueError, RuntimeError)):
        fnattn.apply(params, x[:, :1], state)
    assert not again


def test_weights_that_come_where_others_were(again):
    for i in range(40):
        params, x, state = sequence(CONFIG)
        params = tree.map(lambda t, times=1 + i: t * times, params)
        state = warm(params, x[:, :1], state)
        torch.testing.assert_close(fnattn.apply(params, x[:, :1], state)[0],
                                   fnattn.apply(params, x[:, :1], state, impl="reference")[0])
    assert len(again) >= 40  # more where a weight has the address of one that is gone


def test_nothing_is_kept_of_the_weights(again):
    params, x, state = sequence(CONFIG)
    warm(params, x[:, :1], state)
    gone = weakref.ref(params.to_q)
    torch.utils.swap_tensors(params.to_out, params.to_out.clone())  # which no other reference allows
    del params
    gc.collect()
    assert gone() is None


def test_weights_that_change_their_sign_where_they_lie(again):
    params, x, state = sequence(CONFIG)
    state = warm(params, x[:, :1], state)
    before = fnattn.apply(params, x[:, :1], state)[0]
    params.to_out.data = torch._neg_view(params.to_out.data)
    torch.testing.assert_close(fnattn.apply(params, x[:, :1], state)[0], -before)


def test_lists_of_weights_and_weights_in_other_places(again):
    cfg = MODELS[0]
    params = moved(lm.init(random.key(0), cfg))
    ids, state = torch.tensor([[3]]), lm.init_state(params, 1, capacity=9)
    listed = params._replace(blocks=list(params.blocks))
    for _ in range(4):
        lm.apply(listed, ids, state)
    listed.blocks[0] = tree.map(lambda t: t * 2, listed.blocks[0])
    torch.testing.assert_close(lm.apply(listed, ids, state)[0], lm.apply(listed, ids, state, impl="reference")[0])
    for _ in range(3):
        lm.apply(params, ids, state)
    assert again
    tied = params._replace(to_logits=fnattn.EMPTY, positions=params.to_logits)
    torch.testing.assert_close(lm.apply(tied, ids, state)[0], lm.apply(tied, ids, state, impl="reference")[0])


def test_the_switch_of_native_kernels(again, monkeypatch):
    params, x, state = sequence(CONFIG)
    state = warm(params, x[:, :1], state)
    monkeypatch.setenv("FNATTN_NATIVE", "0")
    fnattn.apply(params, x[:, :1], state)
    assert not again
    monkeypatch.delenv("FNATTN_NATIVE")
    fnattn.apply(params, x[:, :1], state)
    assert again


@pytest.mark.parametrize("kept", [False, True])
def test_sizes_that_are_symbols(kept, again):
    params, x, state = sequence(CONFIG)
    if kept:
        warm(params, x[:, :1], state)
    program = make_fx(lambda x: fnattn.apply(params, x, state)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True)(x[:, :1])
    torch.testing.assert_close(program(x[:, :1]), fnattn.apply(params, x[:, :1], state)[0])


def test_so_many_are_kept(again):
    every = [sequence(CONFIG) for _ in range(kept_steps.MOST + 5)]
    for params, x, state in every:
        warm(params, x[:, :1], state)
    assert len(kept_steps._KEPT) == kept_steps.MOST
    for params, x, state in every[-kept_steps.MOST:]:
        fnattn.apply(params, x[:, :1], state)
    assert len(again) == kept_steps.MOST


def test_gradients_that_are_wanted_later(again):
    params, x, state = sequence(CONFIG)
    state = warm(params, x[:, :1], state)
    params.to_q.requires_grad_()
    out = fnattn.apply(params, x[:, 3:4], state)[0]
    assert torch.autograd.grad(out.sum(), params.to_q)[0].abs().max() > 1e-3
    assert not again
    with torch.no_grad():
        fnattn.apply(params, x[:, :1], state)
    assert len(again) == 1


@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_whoever_watches_gets_the_ordinary_way(watch, again):
    params, x, state = sequence(CONFIG, torch.float32)
    state = warm(params, x[:, :1], state)
    assert watch(lambda x: fnattn.apply(params, x, state)[0], x[:, 5:6]).abs().max() > 0
    assert not again


def test_states_of_another_kind_shape_or_layout(again):
    params, x, state = sequence(CONFIG)
    one, state = x[:, :1], warm(params, x[:, :1], state)
    truth = fnattn.apply(params, one, state, impl="reference")[0]
    slices = state._replace(sums=torch.cat((state.sums, state.sums), 3)[..., :state.sums.shape[3]])
    torch.testing.assert_close(fnattn.apply(params, one, slices)[0], truth)
    for wrong in (state._replace(sums=state.sums[:, :1].contiguous()), state._replace(sums=state.sums[..., :-1].contiguous())):
        with pytest.raises(ValueError, match="state must have"):
            fnattn.apply(params, one, wrong)
    assert not again
    with pytest.raises(TypeError, match="state"):
        fnattn.apply(params, one, simple_gate_loop.State(state.sums))
    with pytest.raises(TypeError, match="state"):
        fnattn.apply(params, one, tuple(state)[:1])
    assert not again


def test_an_input_that_lies_in_a_weight(again):
    params, _, state = sequence(CONFIG)
    for row in (*range(5), 3, 2):
        x = params.to_q[row].expand(3, 1, 24)
        torch.testing.assert_close(fnattn.apply(params, x, state)[0], fnattn.apply(params, x, state, impl="reference")[0])
    assert not again  # which of the addresses are the input's cannot be told


def test_two_threads_at_once(again):
    params, x, state = sequence(taylor.Config(dim=64, heads=8, dim_head=16, causal=True))
    state = warm(params, x[:, :1], state)
    truth = [fnattn.apply(params, x[:, i:i + 1], state, impl="reference")[0] for i in range(N)]
    wrong = []

    def work(i):
        for _ in range(100):
            if not torch.allclose(fnattn.apply(params, x[:, i:i + 1], state)[0], truth[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(again) == 400
