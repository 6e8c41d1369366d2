"""Checkpoints: what is saved comes back bit for bit, an interrupted save damages nothing, a damaged file is named."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch

from fnattn import checkpoint, ensemble, optim, random, tree
from fnattn.attentions import gate_loop, taylor
from fnattn.models import lm

CFG = lm.Config(attention=taylor.Config(dim=7, heads=3, dim_head=2, causal=True, rotary_emb=True), depth=2, num_tokens=11)


def same(a, b):
    a, b = tree.to_flat(a), tree.to_flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture
def params(key):
    return lm.init(key, CFG)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "checkpoint.safetensors"


def test_everything_comes_back_bit_for_bit(params, path, key):
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-3))
    grads = tree.map(torch.ones_like, params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    checkpoint.save(path, params, opt_state=state, key=key, step=17, extra={"note": [1, "two"]})
    found = checkpoint.load(path)
    assert same(found.params, params) and found.params.cfg == found.cfg == CFG
    assert same(checkpoint.opt_state(found, optimizer.init(params)), state)
    assert torch.equal(found.key, key) and found.step == 17 and found.extra == {"note": [1, "two"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_parameters_is_kept(dtype, path, key):
    params = lm.init(key, CFG, dtype=dtype)
    checkpoint.save(path, params)
    assert same(checkpoint.load(path).params, params)


def test_the_params_of_a_family_alone_can_be_saved(path, key):
    params = gate_loop.init(key, gate_loop.Config(dim=7))
    checkpoint.save(path, params)
    assert same(checkpoint.load(path).params, params)


def test_an_ensemble_is_saved_stacked(path, key):
    stacked = ensemble.init(random.split(key, 3), CFG)
    checkpoint.save(path, stacked, members=3)
    found = checkpoint.load(path)
    assert found.members == 3 and same(found.params, stacked)


def test_leaves_that_share_memory_or_have_strides_are_saved_too(path, params):
    shared = torch.arange(77.0)
    params = params._replace(embed=shared.view(7, 11).t(), to_logits=shared.view(11, 7))
    checkpoint.save(path, params)
    assert same(checkpoint.load(path).params, params)


def test_the_config_lies_beside_it_as_json_for_people(path, params):
    checkpoint.save(path, params)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["config"]["attention"]["class"] == "fnattn.attentions.taylor.Config"
    assert checkpoint.from_json(about["config"]) == CFG


def test_any_safetensors_reader_finds_the_tensors_by_name(path, params):
    checkpoint.save(path, params)
    flat = safetensors.torch.load_file(path)
    assert torch.equal(flat["params.blocks.1.attn.to_q"], params.blocks[1].attn.to_q)


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_save_that_fails_leaves_the_older_checkpoint_and_no_rubbish(where, path, params, monkeypatch):
    checkpoint.save(path, params, step=1)
    before = path.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt if where == "replace" else OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync" if where == "write" else "replace", fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        checkpoint.save(path, params, step=2)
    monkeypatch.undo()
    assert path.read_bytes() == before and checkpoint.load(path).step == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint.json", "checkpoint.safetensors"]


def test_a_loaded_checkpoint_does_not_depend_on_the_file(path, params):
    checkpoint.save(path, params)
    found = checkpoint.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(found.params, params)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint.load: expected a checkpoint at .*nope.safetensors; got no such file"):
        checkpoint.load(tmp_path / "nope.safetensors")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(part, path, params):
    checkpoint.save(path, params)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * part)])
    with pytest.raises(ValueError,
                       match="expected a whole safetensors file at .*checkpoint.safetensors; got a damaged or truncated"):
        checkpoint.load(path)


def test_a_file_without_our_config_is_refused(path, params):
    path.parent.mkdir()
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of fnattn at .*; got a safetensors file without its config"):
        checkpoint.load(path)


@pytest.mark.parametrize("header, text", [
    ("{", "expected JSON in the header of .*checkpoint.safetensors"), ("[1]", "expected format 1 in .*checkpoint.safetensors; got list"),
    ('{"format": 1}', "the header of .*checkpoint.safetensors lacks .'config', 'step', 'members', 'extra'.")])
def test_a_header_that_was_changed_is_named(header, text, path):
    path.parent.mkdir()
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"fnattn": header})
    with pytest.raises(ValueError, match=f"^checkpoint.load: {text}.*\n  "):
        checkpoint.load(path)


def test_a_name_that_would_be_overwritten_by_the_json_beside_it_is_refused(tmp_path, params):
    with pytest.raises(ValueError, match=r"^checkpoint.save: path must end in .safetensors; got .*x.json\."):
        checkpoint.save(tmp_path / "x.json", params)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_config_is_refused(path, params):
    checkpoint.save(path, params)
    other = lm.Config(attention=CFG.attention, depth=3, num_tokens=11)
    with pytest.raises(ValueError, match=r"checkpoint.load: .*checkpoint.safetensors holds another config.\n  expected .*depth=3"):
        checkpoint.load(path, cfg=other)
    assert checkpoint.load(path, cfg=CFG).cfg == CFG


def rewrite(path, change=lambda about: None, drop=(), add=None):
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fnattn"])
    change(about)
    flat = {n: t for n, t in safetensors.torch.load_file(path).items() if n not in drop} | (add or {})
    safetensors.torch.save_file(flat, path, {"fnattn": json.dumps(about)})


def test_tensors_that_do_not_fit_the_config_are_named(path, params):
    checkpoint.save(path, params)
    rewrite(path, drop=("params.norm.gamma",), add={"params.embed": torch.zeros(2, 2), "params.more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"do not fit its config: embed: expected \[11, 7\], got \[2, 2\]; norm.gamma: expected "
                                         r"\[7\], got nothing; more: unknown"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["os.system", "fnattn.core.check", "fnattn.core.Family", "builtins.dict", "fnattn.nothing.Config"])
def test_nothing_but_configs_is_ever_made(name, path, params):
    checkpoint.save(path, params)
    rewrite(path, lambda about: about["config"].update({"class": name}))
    with pytest.raises(ValueError, match="expected the config of this library or of a registered family; got"):
        checkpoint.load(path)


def test_a_config_with_an_unknown_option_names_the_file(path, params):
    checkpoint.save(path, params)
    rewrite(path, lambda about: about["config"].update(colour="red"))
    with pytest.raises(ValueError, match="cannot make the config in .*checkpoint.safetensors: .*colour"):
        checkpoint.load(path)


def test_a_future_format_is_refused(path, params):
    checkpoint.save(path, params)
    rewrite(path, lambda about: about.update(format=99))
    with pytest.raises(ValueError, match="expected format 1 in .*; got 99"):
        checkpoint.load(path)


def test_the_state_of_another_optimiser_is_refused(path, params):
    checkpoint.save(path, params, opt_state=optim.adamw(1e-3).init(params))
    with pytest.raises(ValueError, match="checkpoint.opt_state: the checkpoint was saved by another optimiser"):
        checkpoint.opt_state(checkpoint.load(path), optim.sgd(0.1, momentum=0.9).init(params))


def test_only_tensors_can_be_saved(path, params):
    with pytest.raises(TypeError, match=r"expected tensors only; got something else at \['opt.lr'\]"):
        checkpoint.save(path, params, opt_state={"lr": 0.1})
    assert not path.exists()
