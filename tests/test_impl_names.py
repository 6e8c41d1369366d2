"""impl= is never ignored: a name that nothing has is a mistake, and a kernel that cannot serve a call says why."""

from __future__ import annotations

import sys

import pytest
import torch
from fnattn_kernels.contracts import KernelUnavailable

from fnattn import attentions, ops, random
from fnattn.attentions import full, gate_loop_full, linformer, simple_gate_loop, sparse_axial, taylor
from fnattn.core import EMPTY
from fnattn.models import dalle, feedforward_coor_descent, linformer_lm, lm, vit
from fnattn.ops import _door
from fnattn.testing.cases import CASES, kernels, modules

KEY = random.key(0)
TYPO = r"impl must be one of 'auto', 'reference'.*; got 'no_such_kernel'"
# Besides the examples: ways through a family that no example takes.
MORE = (
    gate_loop_full.Config(dim=7, dim_head=4, heads=3, softmax_normalize=False),
    gate_loop_full.Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True, compat=True),
    gate_loop_full.Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True, compat=True, softmax_normalize=True),
    gate_loop_full.Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True, ablate_state_transition=True),
    simple_gate_loop.Config(dim=7, use_heinsen=True),
    full.Config(dim=7, seq_len=13, causal=False, heads=3, dim_head=5, dropout=0.25),
)
CONFIGS = [*(cfg for family in attentions.FAMILIES.values() for cfg in family.examples), *MORE]


def ways(cfg):
    """Every kind of call that this config takes: its name and apply(impl) for it."""
    family = attentions.find(cfg)
    params = family.init(KEY, cfg, dtype=torch.float64)
    x = random.normal(random.fold_in(KEY, "x"), (2, 5, cfg.dim), torch.float64)
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, True, True]])
    given = {"plain": {}, "no positions": {"x": x[:, :0]}, "mask": {"mask": mask}, "dropout": {"dropout_key": KEY},
             "context": {"context": x[:, :3]}, "context, mask, dropout": {"context": x, "mask": mask, "dropout_key": KEY}}
    try:
        fresh = family.init_state(params, 2, capacity=13)
        grown = family.apply(params, x, fresh)[1]
        given |= {"fresh state": {"state": fresh}, "state": {"state": grown}, "state, one position": {"state": grown, "x": x[:, :1]},
                  "state, mask, dropout": {"state": grown, "mask": mask, "dropout_key": KEY}}
    except ValueError:  # does not stream
        pass
    found = {}
    for name, options in given.items():
        options = {"x": x, "state": EMPTY, **options}

        def call(impl, options=options):
            return family.apply(params, options["x"], options["state"], impl=impl,
                                **{k: v for k, v in options.items() if k not in ("x", "state")})

        try:
            call("auto")
        except ValueError:  # this config does not take it
            continue
        found[name] = call
    return found


def label(cfg):
    return attentions.find(cfg).name + str(CONFIGS.index(cfg))


@pytest.mark.parametrize("cfg", CONFIGS, ids=label)
def test_a_name_that_no_kernel_has_is_refused_in_every_kind_of_call(cfg):
    calls = ways(cfg)
    assert "plain" in calls and "dropout" in calls
    for name, call in calls.items():
        with pytest.raises(ValueError, match=TYPO):
            call("no_such_kernel")
            raise AssertionError(f"impl was ignored in a call with {name}")


@pytest.fixture
def chosen(monkeypatch):
    """The names of the kernels that operators chose meanwhile."""
    names, choose = [], _door.choose

    def watched(*args):
        kernel = choose(*args)
        names.append(_door.REFERENCE if kernel is None else kernel.name)
        return kernel

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("fnattn.") and getattr(module, "choose", None) is choose:
            monkeypatch.setattr(module, "choose", watched)
    return names


@pytest.mark.parametrize("cfg", CONFIGS, ids=label)
def test_a_kernel_asked_for_by_name_computes_or_the_call_says_why_not(cfg, chosen):
    refused = 0
    for way, call in ways(cfg).items():
        for name in _door.NAMES:
            chosen.clear()
            try:
                call(name)
            except KernelUnavailable as error:
                refused += 1
                assert f"impl={name!r} cannot serve this call.\n  {name}: " in str(error)
            else:
                assert name in chosen, f"{name} was ignored in a call with {way}"
    assert refused


@pytest.mark.parametrize("cfg", CONFIGS, ids=label)
def test_the_reference_is_plain_torch_throughout(cfg, chosen):
    for way, call in ways(cfg).items():
        chosen.clear()
        call("reference")
        assert set(chosen) <= {"reference"}, f"a kernel ran in a call with {way}"


@pytest.mark.parametrize("module", modules())
def test_an_operator_lists_its_kernels_and_says_of_another_ones_that_it_lacks_them(module):
    case, own = next(case for case in CASES if case.module == module), kernels(module)
    listed = ", ".join(map(repr, ("auto", "reference", *own)))
    with pytest.raises(ValueError, match=f"impl must be one of {listed}; got 'no_such_kernel'"):
        case.call("no_such_kernel")(*case.args())
    others = [name for name in _door.NAMES if name not in own]
    for name in others:
        with pytest.raises(KernelUnavailable, match=f"{name}: .* has no such kernel, only {', '.join(map(repr, own))}\n"):
            case.call(name)(*case.args())
    assert others


def test_every_name_of_a_kernel_is_known_and_every_known_name_is_one():
    assert {name for module in modules() for name in kernels(module)} == set(_door.NAMES)


WORDS = torch.arange(10).view(2, 5) % 7
DALLE = {"dim": 6, "depth": 1, "num_image_tokens": 5, "image_fmap_size": 2, "num_text_tokens": 7, "text_seq_len": 3, "heads": 2,
         "dim_head": 6}
MODELS = {
    "lm": lambda impl: lm.apply(lm.init(KEY, lm.Config(attention=taylor.Config(dim=4, causal=True), depth=1, num_tokens=7)), WORDS,
                                impl=impl),
    "linformer_lm": lambda impl: linformer_lm.apply(
        linformer_lm.init(KEY, linformer_lm.Config(num_tokens=7, dim=4, seq_len=5, depth=1, k=3, heads=2, dropout=0.25)), WORDS,
        dropout_key=KEY, impl=impl),
    "linformer_lm, reversible": lambda impl: linformer_lm.apply(
        linformer_lm.init(KEY, linformer_lm.Config(num_tokens=7, dim=4, seq_len=5, depth=1, k=3, heads=2, reversible=True)), WORDS,
        impl=impl),
    **{f"dalle, {kind}": lambda impl, kind=kind: dalle.loss(dalle.init(KEY, dalle.Config(**DALLE, attn_types=kind)), WORDS[:, :3],
                                                            WORDS[:, :4] % 5, impl=impl)
       for kind in ("full", "axial_row", "conv_like", "sparse")},
    "vit": lambda impl: vit.apply(vit.init(KEY, vit.Config(dim=8, depth=1, image_size=4, patch_size=2, heads=2, dim_head=3,
                                                           num_classes=3)), torch.zeros(1, 3, 4, 4), impl=impl),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_pass_the_name_on(name):
    MODELS[name]("reference")
    with pytest.raises(ValueError, match=TYPO):
        MODELS[name]("no_such_kernel")


PLAIN = {
    "routing where all are chosen": lambda impl: ops.route(torch.zeros(1, 3, 5), torch.zeros(1, 5), num_tokens=3, impl=impl),
    "top k without a gradient": lambda impl: ops.topk(torch.arange(5.0), 2, non_differentiable=True, impl=impl),
    "a feed-forward with a GELU": lambda impl: feedforward_coor_descent.apply(
        feedforward_coor_descent.init(KEY, feedforward_coor_descent.Config(dim=3)), torch.zeros(1, 3, 3), impl=impl),
}


@pytest.mark.parametrize("name", PLAIN)
def test_where_there_is_nothing_for_a_kernel_to_do_a_name_is_refused(name):
    for impl in ("auto", "reference"):
        PLAIN[name](impl)
    with pytest.raises(ValueError, match=TYPO):
        PLAIN[name]("no_such_kernel")
    with pytest.raises(KernelUnavailable, match="impl='native' cannot serve this call"):
        PLAIN[name]("native")


def test_the_reason_names_what_is_plain_torch():
    x, cfg = torch.zeros(1, 3, 6), linformer.Config(dim=6, seq_len=3, k=2, heads=2, dropout=0.25)
    with pytest.raises(KernelUnavailable, match="linformer.apply: .*\n  native: dropping entries of the attention matrix is plain torch"):
        linformer.apply(linformer.init(KEY, cfg), x, dropout_key=KEY, impl="native")
    with pytest.raises(KernelUnavailable, match="sparse_axial.apply with a state has no such kernel, only 'native', 'bands'"):
        cfg = sparse_axial.Config(dim=6, seq_len=6, image_size=2, heads=2, dim_head=3)
        params = sparse_axial.init(KEY, cfg)
        state = sparse_axial.apply(params, x, sparse_axial.init_state(params, 1, capacity=7))[1]
        sparse_axial.apply(params, x, state, impl="triton")
    with pytest.raises(KernelUnavailable, match="scores without softmax are plain torch"):
        gate_loop_full.apply(gate_loop_full.init(KEY, MORE[0]), torch.zeros(1, 3, 7), impl="native")
