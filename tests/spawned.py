"""Processes of a test that exchange something, none of which is left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch.multiprocessing

SECONDS = 150


def run(work: Callable, count: int, *args: object) -> None:
    """work(rank, *args) in `count` processes at once; raises if one failed."""
    processes = torch.multiprocessing.spawn(work, args, nprocs=count, join=False)
    try:
        if not processes.join(timeout=SECONDS):  # true once all have ended well; raises if one failed
            processes.join(timeout=SECONDS)
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
