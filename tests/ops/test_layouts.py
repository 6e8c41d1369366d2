"""Sparsity patterns against recorded layouts of DeepSpeed 0.19.6, and what a key adds."""

from __future__ import annotations

import json
import random as python_random
from pathlib import Path

import pytest
import torch

from fnattn import random
from fnattn.ops import layouts

RECORDS = json.loads((Path(__file__).parent.parent / "golden" / "deepspeed_layouts.json").read_text())["layouts"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['name']}-{r['seed']}")
def test_it_equals_deepspeed_for_the_same_random_choices(record):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in record["options"].items()}
    cfg = getattr(layouts, record["name"])(num_heads=4, **options)
    nb = record["seq_len"] // cfg.block
    generator = python_random.Random(record["seed"])
    layout = layouts.make(cfg, record["seq_len"], draw=lambda population, count: generator.sample(range(population), count))
    expected = torch.tensor([[[bit == "1" for bit in f"{int(row, 16):0{nb}b}"] for row in head] for head in record["heads"]])
    assert torch.equal(layout, expected)


@pytest.mark.parametrize("cfg", [layouts.Variable(num_heads=3, num_random_blocks=2, local_window_blocks=(1,)),
                                 layouts.BigBird(num_heads=3, num_random_blocks=2, attention="unidirectional")])
def test_random_blocks_come_from_the_key_alone(cfg):
    a, b, c = (layouts.make(cfg, 16 * 13, key=random.key(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    plain = layouts.make(type(cfg)(**{**vars(cfg), "num_random_blocks": 0}), 16 * 13)
    assert (a >= plain).all() and (a & ~plain).any()
    if cfg.attention == "unidirectional":
        assert not a.triu(1).any()


def test_every_row_draws_as_many_blocks_as_it_can():
    cfg = layouts.BigBird(num_heads=1, num_random_blocks=4, num_sliding_window_blocks=1, num_global_blocks=0,
                          attention="unidirectional")
    drawn = layouts._random(13, 4, True, random.key(0), None)
    assert drawn.sum(-1).tolist() == [min(4, row + 1) for row in range(13)]
    assert layouts.make(cfg, 16 * 13, key=random.key(0)).diagonal(dim1=1, dim2=2).all()


def test_members_of_an_ensemble_get_their_own_layouts():
    cfg = layouts.Variable(num_heads=2, num_random_blocks=2, different_layout_per_head=True)
    keys = random.split(random.key(0), 3)
    many = torch.vmap(lambda key: layouts.make(cfg, 16 * 11, key=key))(keys)
    assert torch.equal(many, torch.stack([layouts.make(cfg, 16 * 11, key=key) for key in keys]))
    assert not torch.equal(many[0], many[1]) and not torch.equal(many[0, 0], many[0, 1])


@pytest.mark.parametrize("wrong, error, text", [
    (lambda: layouts.make(layouts.Dense(num_heads=2), 33), ValueError, r"seq_len must be a multiple of cfg\.block=16; got 33"),
    (lambda: layouts.make(layouts.BigBird(num_heads=2), 64), ValueError, r"key must be given for 1 random blocks per row"),
    (lambda: layouts.make("fixed", 64), TypeError, r"cfg must be one of Dense, Fixed.*got str"),
    (lambda: layouts.make(layouts.BigBird(num_heads=2), 32, key=random.key(0)), ValueError,
     r"num_sliding_window_blocks must be at most the 2 blocks of a row; got 3"),
    (lambda: layouts.Fixed(num_heads=2, attention="causal"), ValueError, r"attention must be 'unidirectional' or 'bidirectional'"),
    (lambda: layouts.Fixed(num_heads=2, num_global_blocks=3), ValueError, r"num_global_blocks must divide num_local_blocks=4; got 3"),
    (lambda: layouts.Fixed(num_heads=2, attention="unidirectional", horizontal_global_attention=True), ValueError,
     r"horizontal_global_attention needs attention='bidirectional'"),
    (lambda: layouts.Fixed(num_heads=2, num_different_global_patterns=2), ValueError, r"need different_layout_per_head=True"),
    (lambda: layouts.Variable(num_heads=2, global_block_indices=[0]), ValueError, r"must be a tuple of ints; got list"),
    (lambda: layouts.BSLongformer(num_heads=2, global_block_end_indices=(0,)), ValueError, r"one later end per start"),
])
def test_bad_input_is_named(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()
