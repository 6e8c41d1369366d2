"""Ensembles: stacked trees, each member the same as alone."""

from __future__ import annotations

import pytest
import torch

from fnattn import ensemble, random, tree
from fnattn.attentions import taylor

CFG = taylor.Config(dim=5, heads=2, dim_head=3, causal=True)


def test_keys_are_those_of_the_seeds_one_by_one():
    assert torch.equal(ensemble.keys(7, 3)[2], random.key(9))


def test_each_member_is_drawn_as_alone():
    keys = ensemble.keys(0, 3)
    stacked = ensemble.init(lambda key: taylor.init(key, CFG), keys)
    assert stacked.cfg == CFG and ensemble.size(stacked) == 3
    for i, key in enumerate(keys):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), ensemble.member(stacked, i), taylor.init(key, CFG))


def test_what_it_refuses_it_refuses_with_the_reason(key):
    with pytest.raises(ValueError, match="ensemble.keys: members must be at least 1; got 0."):
        ensemble.keys(0, 0)
    with pytest.raises(ValueError, match=r"ensemble.init: member_keys must be \[members, 2\]; got \[2\]."):
        ensemble.init(lambda k: taylor.init(k, CFG), key)
    with pytest.raises(ValueError, match=r"ensemble.size: expected one leading size for all leaves; got \[2, 3\]."):
        ensemble.size((torch.zeros(2), torch.zeros(3)))
