"""fnattn.distributed in two and three processes on this machine, against one process: every exchange, every transform."""

from __future__ import annotations

import importlib.util
import json

import pytest
import spawned
from distributed_worker import CHECKS, COLLECTIVES, work

# Everything else is float64. The sums of two and three numbers, rounded once, against numbers that were never rounded.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0 ** -7}
PLAIN = tuple(name for name in CHECKS if name not in ("engine", "alone"))


def run(folder, world: int, names: tuple[str, ...]) -> list[dict]:
    """What every process found; see distributed_worker."""
    spawned.run(work, world, world, str(folder), names)
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(world)]


def agree(found: list[dict], name: str) -> None:
    for rank, of_rank in enumerate(found):
        assert isinstance(of_rank[name], dict), f"process {rank}:\n{of_rank[name]}"
        for what, error in of_rank[name].items():
            assert error < TOLERANCE.get(what, 1e-10), (rank, what, error)


@pytest.fixture(scope="module", params=(2, 3), ids=lambda world: f"{world} processes")
def found(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"), request.param, PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_processes_find_what_one_finds(found, name):
    agree(found, name)


def test_every_exchange_is_seen_under_every_transform(found):
    transforms = {"value", "vmap", "backward", "grad", "vmap(grad)", "jvp", "jvp(grad)", "grad(grad)", "jvp(jvp)", "vmap(jvp(grad))",
                  "compile(grad)"}
    for of_rank in found:
        for name in COLLECTIVES:
            assert transforms <= set(of_rank[f"collective {name}"])


def test_one_process_needs_no_other(tmp_path):
    agree(run(tmp_path, 1, ("alone",)), "alone")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_trains_a_pure_loss_at_every_stage_as_adamw_does(tmp_path):
    for of_rank in run(tmp_path, 2, ("engine",)):
        assert isinstance(of_rank["engine"], dict), of_rank["engine"]
        # float32: four updates, each by sums over two halves of a batch.
        assert set(of_rank["engine"]) == {f"stage {i}" for i in range(4)} and max(of_rank["engine"].values()) < 1e-5
