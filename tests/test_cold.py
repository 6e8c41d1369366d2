"""Fresh processes: what an import brings in, and first calls that nothing has warmed up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
OPTIONAL = ("triton", "deepspeed", "fast_transformers", "colt5_attention", "coordinate_descent_attention", "jax",
            "torchopt")
# Besides these, parts of torch and what the program needs: slow to import, and not needed to compute anything.
HEAVY = (*OPTIONAL, "matplotlib", "rich", "safetensors", "torch._dynamo", "torch._inductor", "sympy", "torch.testing",
         "torch.utils.flop_counter", "pytest", "hypothesis")


def fresh(program: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_torch_einops_optree_and_little_else():
    brought = json.loads(fresh("""
import json, sys
import torch
before = set(sys.modules)
import fnattn
print(json.dumps(sorted(set(sys.modules) - before)))"""))
    assert not [m for m in brought if m in HEAVY or m.startswith(tuple(f"{h}." for h in HEAVY))]
    known = {"fnattn", "fnattn_kernels", "torch", "einops", "optree", "numpy"}
    others = {m.split(".")[0] for m in brought} - known - set(sys.stdlib_module_names)
    assert not {m for m in others if not m.startswith("_")}


def test_import_builds_nothing_and_writes_nothing(tmp_path):
    cache = tmp_path / "cache"
    fresh("import fnattn", FNATTN_CACHE=str(cache))
    assert not cache.exists()


def test_import_prints_nothing_and_leaves_torch_as_it_was():
    out = fresh("""
import torch
def settings():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
before = settings()
import fnattn
assert settings() == before""")
    assert out == ""


def test_import_is_light_beside_torch():
    """Compared with torch's own import in the same process, so that a busy machine slows both."""
    ratio = float(fresh("""
import time
a = time.process_time()
import torch
b = time.process_time()
import fnattn
print((time.process_time() - b) / (b - a))"""))
    assert ratio < 1


def test_every_part_is_there_after_a_bare_import_and_none_before_it_is_asked_for():
    fresh("""
import pkgutil, sys
import fnattn
parts = ["convert", "models", "optim", "ensemble", "testing"]
assert not [p for p in parts if f"fnattn.{p}" in sys.modules]
assert {*parts, "ops", "init"} <= set(dir(fnattn))
assert callable(fnattn.models.lm.apply) and "fnattn.models.vit" not in sys.modules and "vit" in dir(fnattn.models)
assert callable(fnattn.convert.load)
for package in (fnattn, fnattn.models):
    for name in [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]:
        assert getattr(package, name) is sys.modules[f"{package.__name__}.{name}"], name
    assert not hasattr(package, "nothing")
try:
    fnattn.nothing
except AttributeError as error:
    assert str(error) == "module 'fnattn' has no attribute 'nothing'"
""")


@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_first_call_of_a_process_may_be_a_compiled_one(switch, tmp_path):
    """Every operator exists before a tracer meets it, with the native kernels not built yet and without them."""
    fresh("""
import torch, fnattn
from fnattn import random
key = random.key(0)
q, k, v = random.normal(random.fold_in(key, "x"), (3, 1, 2, 7, 5))
def f(q):
    return fnattn.ops.causal_dot(q, k, v).sum()
got = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(q)
torch.testing.assert_close(got, torch.func.grad(f)(q))
assert got.abs().max() > 0""", FNATTN_NATIVE=switch, FNATTN_CACHE=str(tmp_path))


def test_every_module_can_be_imported_without_the_optional_packages():
    folders = ((REPO / "fnattn", "fnattn"), (REPO / "kernels", "fnattn_kernels"))
    names = [".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
             for folder, name in folders for path in sorted(folder.rglob("*.py")) if path.name != "__main__.py"]
    fresh(f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it now raises ImportError
import fnattn
for name in {names!r}:
    importlib.import_module(name)""")
    assert len(names) > 20
