"""The wheel: everything is in it, and it works in a clean environment, from another folder, beside other packages."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SOURCES = ("fnattn", "kernels")


def run(*command, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building leaves files in the source folder."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for folder in SOURCES:
        shutil.copytree(REPO / folder, copy / folder, ignore=skip)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (REPO / name).exists():
            shutil.copy(REPO / name, copy)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy)
    (built,) = out.glob("fnattn-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment that has the wheel, and sees the packages that the tests run with.

    They are lent by a path file, not installed again: torch is large. The checkout must not be lent with them, so
    path files of editable installs are not followed (a path file in a lent folder is never read).
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return python


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def installed_name(path: Path) -> str:
    return path.relative_to(REPO).as_posix().replace("kernels/", "fnattn_kernels/", 1)


def test_every_folder_of_modules_is_listed_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(REPO / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {path.parent.relative_to(REPO) for root in SOURCES for path in (REPO / root).rglob("*.py")}
    found = {".".join(folder.parts).replace("kernels", "fnattn_kernels", 1) for folder in folders}
    assert listed == found
    assert all((REPO / folder / "__init__.py").exists() for folder in folders)


def test_the_wheel_holds_every_module_every_c_source_and_the_type_marker(wheel):
    held = names(wheel)
    expected = {installed_name(path) for root in SOURCES for path in (REPO / root).rglob("*.py")}
    expected |= {installed_name(path) for path in (REPO / "kernels" / "csrc").iterdir() if path.suffix in (".c", ".h")}
    assert expected | {"fnattn/py.typed"} <= held
    info = wheel.name.partition("-py3")[0] + ".dist-info"
    assert {name.split("/")[0] for name in held} == {"fnattn", "fnattn_kernels", info}
    assert wheel.name.endswith("-py3-none-any.whl"), "the wheel must be pure Python"


def test_the_metadata_names_version_licence_program_and_extras(wheel):
    import fnattn

    with zipfile.ZipFile(wheel) as archive:
        files = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(files["METADATA"]).decode()
        programs = archive.read(files["entry_points.txt"]).decode()
    assert f"Version: {fnattn.__version__}\n" in metadata and "Requires-Dist: torch>=2.11\n" in metadata
    assert "MIT" in metadata and "LICENSE" in files
    assert "fnattn = fnattn.cli:main" in programs
    for extra in ("fast-transformers", "colt5", "triton", "deepspeed", "notebooks", "docs", "dev", "bench"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_installed_wheel_works_in_a_clean_environment_elsewhere(python, tmp_path):
    program = """
import fnattn, fnattn_kernels, importlib.util, pathlib, sys
from fnattn import random
site = pathlib.Path(sys.prefix)
assert site in pathlib.Path(fnattn.__file__).parents, fnattn.__file__
assert site in pathlib.Path(fnattn_kernels.__file__).parents, fnattn_kernels.__file__
assert importlib.util.find_spec("kernels") is None
from fnattn_kernels.native import build
print(build.why_not("random_bits"), random.bits(random.key(0), 1).item())
"""
    env = {"PATH": "/usr/bin:/bin", "FNATTN_CACHE": str(tmp_path / "cache")}
    reason, word = run(python, "-W", "ignore", "-c", program, cwd=tmp_path, env=env).rsplit(maxsplit=1)
    assert reason == "None" or "compiler" in reason
    assert word == "4070199207"
    for program in ([python.parent / "fnattn"], [python, "-m", "fnattn"]):
        assert "usage" in run(*program, "--help", cwd=tmp_path, env=env).lower()


def test_a_bare_checkout_finds_its_own_kernels(python, tmp_path):
    """Nothing installed from it, run from elsewhere; and its kernels win over those of an installed wheel."""
    program = "import fnattn, fnattn_kernels.contracts as c; print(fnattn.__file__); print(c.__file__)"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)}
    found = run(python, "-c", program, cwd=tmp_path, env=env).split()
    assert found == [str(REPO / "fnattn" / "__init__.py"), str(REPO / "kernels" / "contracts.py")]


def test_somebody_elses_package_named_kernels_is_left_alone(python, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('not ours')")
    program = "import fnattn, fnattn_kernels; print(fnattn_kernels.__file__)"
    found = run(python, "-c", program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).strip()
    assert found == str(tmp_path / "fnattn_kernels" / "__init__.py")
