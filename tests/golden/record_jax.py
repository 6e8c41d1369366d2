"""Records what the real jax.random gives into jax_random.json: python tests/golden/record_jax.py (needs jax)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

SEEDS = (0, 1, 42, 2**31, 2**32 - 1)
WIDE_SEEDS = (-1, 2**40 + 3, -(2**63))
FOLDS = (0, 1, 7, 2**31 + 5, 2**32 - 1)
SHAPES = ((), (1,), (17,), (3, 5), (0, 2), (2, 3, 5))
BOUNDS = ((-0.3, 0.7), (1.5, 9.1), (-1 / 3, 1 / 3), (0.1, 0.4), (-1e-3, 1e3))
RANGES = ((0, 10), (-5, 7), (0, 65536), (3, 100003), (-(2**31), 2**31 - 1), (0, 2))
LOGITS = np.random.default_rng(3).normal(size=(5, 7)).astype(np.float32) * 3


def plain(x) -> list:
    return np.asarray(x).tolist()


def record() -> dict:
    data = jax.random.key_data
    out: dict = {"jax": jax.__version__, "logits": plain(LOGITS), "seeds": {}, "wide_seeds": {}}
    for seed in SEEDS:
        key = jax.random.key(np.uint32(seed))
        out["seeds"][str(seed)] = {
            "key": plain(data(key)),
            "split_2": plain(data(jax.random.split(key))),
            "split_5": plain(data(jax.random.split(key, 5))),
            "fold_in": [[n, plain(data(jax.random.fold_in(key, n)))] for n in FOLDS],
            "bits": [[list(s), plain(jax.random.bits(key, s))] for s in SHAPES],
            "uniform": [[list(s), plain(jax.random.uniform(key, s))] for s in SHAPES],
            "bounds": [[a, b, plain(jax.random.uniform(key, (31,), minval=a, maxval=b))] for a, b in BOUNDS],
            "randint": [[a, b, plain(jax.random.randint(key, (31,), a, b))] for a, b in RANGES],
            "normal": plain(jax.random.normal(key, (101,))),
            "bernoulli": plain(jax.random.bernoulli(key, 0.3, (31,))),
            "categorical": plain(jax.random.categorical(key, LOGITS)),
            "categorical_axis": plain(jax.random.categorical(key, LOGITS, axis=0)),
            "categorical_draws": plain(jax.random.categorical(key, LOGITS, shape=(3, 5))),
        }
    with jax.enable_x64(True):
        for seed in WIDE_SEEDS:
            key = jax.random.key(np.int64(seed))
            out["wide_seeds"][str(seed)] = {
                "key": plain(data(key)),
                "uniform": plain(jax.random.uniform(key, (17,), dtype=np.float64)),
                "normal": plain(jax.random.normal(key, (17,), dtype=np.float64)),
            }
    return out


if __name__ == "__main__":
    target = Path(__file__).parent / "jax_random.json"
    target.write_text(json.dumps(record(), separators=(",", ":")).replace('},"', '},\n"').replace(',"', ',\n"') + "\n")
