"""Memory and time of a gradient through sequential and reversible Linformer stacks, by depth.

    python benchmarks/reversible_memory.py

Memory is counted exactly (fnattn.testing.memory) and includes the gradients of the params, which grow with depth for
both; `activations` is the rest. Time is the best of three, one thread.
"""

from __future__ import annotations

import time

import torch

from fnattn import random, tree
from fnattn.models import linformer_lm as lm
from fnattn.testing.memory import peak_bytes

BATCH, SEQ, DIM = 4, 512, 64


def measure(depth: int, reversible: bool) -> tuple[float, float]:
    """(MiB of activations at the peak, seconds) of one gradient."""
    cfg = lm.Config(dim=DIM, seq_len=SEQ, depth=depth, k=32, heads=4, reversible=reversible)
    params = lm.init(random.key(0), cfg)
    x = random.normal(random.key(1), (BATCH, SEQ, DIM))
    gradient = tree.grad(lambda p: lm.encode(p, x).square().mean())
    own = sum(t.nbytes for t in tree.leaves(params))
    peak = peak_bytes(gradient, params) - own
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        gradient(params)
        seconds.append(time.perf_counter() - start)
    return peak / 2**20, min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, float32, batch {BATCH}, {SEQ} positions, dim {DIM}; best of 3")
    print(f"{'depth':>5} {'sequential':>22} {'reversible':>22}")
    for depth in (2, 4, 8, 16, 32):
        row = [measure(depth, reversible) for reversible in (False, True)]
        print(f"{depth:>5} " + " ".join(f"{mib:>9.1f} MiB {sec * 1e3:>6.0f} ms" for mib, sec in row))


if __name__ == "__main__":
    main()
