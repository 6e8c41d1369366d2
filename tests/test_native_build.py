"""Building C kernels on first use: every way it can fail leaves one warning, the same numbers and nothing behind."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build

REPO = Path(__file__).resolve().parent.parent
HAS_COMPILER = build.why_not("causal_dot") is None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler on this machine")

PROGRAM = """
import warnings, torch
warnings.simplefilter("always")
from fnattn.ops import causal_dot
from fnattn.core import KernelUnavailable
q, k, v = (torch.arange(2. * 3 * 5 * 7).reshape(2, 3, 5, 7).sin() for _ in range(3))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    a, b = causal_dot(q, k, v), causal_dot(q, k, v)
torch.testing.assert_close(a, causal_dot(q, k, v, impl="reference"), rtol=1e-5, atol=1e-5)
assert torch.equal(a, b)
ours = [str(w.message) for w in seen if "fnattn" in str(w.message)]
print("WARNINGS", len(ours), *ours)
try:
    causal_dot(q, k, v, impl="native")
    print("NATIVE runs")
except KernelUnavailable as error:
    print("NATIVE", error)
"""


def run(tmp_path: Path, program: str = PROGRAM, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO), "FNATTN_CACHE": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache folder that PROGRAM has filled."""
    folder = tmp_path_factory.mktemp("built")
    assert "NATIVE runs" in run(folder)
    return folder / "cache"


@pytest.fixture
def cache(built, tmp_path) -> Path:
    """A copy of it, the cache folder of `run(tmp_path)`."""
    return shutil.copytree(built, tmp_path / "cache")


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine")
@pytest.mark.parametrize("source", sorted(path.stem for path in build.SOURCES.glob("*.c")))
def test_every_kernel_compiles_here(source):
    """Tests of a kernel are skipped where it cannot be had: that must not be because it is broken."""
    assert build.why_not(source) is None


@needs_compiler
def test_the_kernel_is_built_once_and_kept(tmp_path, cache):
    files = sorted(cache.iterdir())
    assert len([f for f in files if f.suffix == ".so"]) == len(files) >= 1
    stamps = [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    assert "NATIVE runs" in run(tmp_path)
    assert [(f.stat().st_ino, f.stat().st_mtime_ns) for f in sorted(cache.iterdir())] == stamps


def test_switched_off_it_is_silent_and_plain_torch_serves(tmp_path):
    out = run(tmp_path, FNATTN_NATIVE="0")
    assert "WARNINGS 0" in out and "switched off by FNATTN_NATIVE=0" in out
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_there_is_one_warning_and_a_reason(tmp_path):
    out = run(tmp_path, CC="no-such-compiler")
    assert "WARNINGS 1" in out and "no C compiler found (looked for no-such-compiler)" in out


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path):
    out = run(tmp_path, CC="false")
    assert "WARNINGS 1" in out and "the build with false failed" in out
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_a_cut_library_is_built_again(tmp_path, cache):
    libraries = list(cache.glob("*.so"))
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    out = run(tmp_path)
    assert "NATIVE runs" in out and "WARNINGS 0" in out
    assert libraries and all(library.stat().st_size > 100 for library in libraries)


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_gives_way_to_the_next(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    out = run(tmp_path, FNATTN_CACHE=str(blocked), XDG_CACHE_HOME=str(tmp_path / "home"))
    assert "NATIVE runs" in out
    assert list((tmp_path / "home" / "fnattn").glob("causal_dot-*.so"))


@needs_compiler
def test_a_read_only_cache_that_holds_the_library_is_used(tmp_path, cache):
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "NATIVE runs" in run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "home"))
    finally:
        cache.chmod(stat.S_IRWXU)


@needs_compiler
def test_two_processes_may_build_at_the_same_time(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(REPO), "FNATTN_CACHE": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "NATIVE runs" in out, err
    assert all(f.suffix == ".so" for f in (tmp_path / "cache").iterdir())


@needs_compiler
def test_the_result_depends_on_neither_the_process_nor_the_number_of_threads(tmp_path, cache):
    program = """
    import torch
    from fnattn.ops import causal_dot
    x = torch.arange(3. * 5 * 257 * 16).reshape(3, 5, 257, 16).sin()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = causal_dot(x, x, x, impl="native")
        torch.set_num_threads(1)  # torch's own sums do depend on it
        print(out.double().pow(2).sum().item().hex())
    """
    both = [run(tmp_path, program).split() for _ in range(2)]
    assert len(both[0]) == 2 and len({*both[0], *both[1]}) == 1


ISA_PROGRAM = """
import sys, torch
from fnattn_kernels.native import build
# The quickest build that has the same vectors; other flags are other files in the cache.
build.BASE_FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build.BASE_FLAGS)
from fnattn.bench.implementations import disagreement
from fnattn.ops.report import CASES, rows
torch.set_num_threads(1)
for source in sorted(p.stem for p in build.SOURCES.glob("*.c")):
    print("BUILT", source, build.why_not(source))
for name in dict.fromkeys(row.operator for row in rows() if row.impl == "native"):
    for sizes in ({"b": 1, "h": 2, "n": 67, "d": 34}, {"b": 2, "h": 1, "n": 37, "d": 6}):
        print("CHECKED", name, disagreement(name, sizes, "cpu", "native"))
"""
ISAS = ["avx2", "baseline"]


def supported(isa):
    try:
        build._extra_flags(isa)
    except KernelUnavailable as error:
        pytest.skip(str(error))


@needs_compiler
@pytest.mark.parametrize("compiler", [None, "clang"], ids=["default", "clang"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_is_right_when_built_for_fewer_instructions(tmp_path, isa, compiler):
    supported(isa)
    if compiler and not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    out = run(tmp_path, ISA_PROGRAM, FNATTN_ISA=isa, **({"CC": compiler} if compiler else {})).splitlines()
    built, checked = ([line for line in out if line.startswith(word)] for word in ("BUILT", "CHECKED"))
    assert len(built) == len(list(build.SOURCES.glob("*.c"))) and len(checked) >= 20
    assert all(line.endswith(" None") for line in built + checked), "\n".join(out)
    if shutil.which("objdump") and platform.machine() == "x86_64":
        for library in (tmp_path / "cache").glob("*.so"):
            code = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
            assert "%xmm" in code and "%zmm" not in code and ("%ymm" in code) <= (isa == "avx2"), library.name


@needs_compiler
def test_libraries_for_different_instructions_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FNATTN_CACHE", str(tmp_path))
    for count, isa in enumerate(("native", "baseline", "baseline"), 1):
        build._build("rotary", isa)
        assert len(list(tmp_path.iterdir())) == min(count, 2)


@pytest.mark.parametrize("isa, words", [("avx9", "FNATTN_ISA must be one of native, avx2, baseline; got 'avx9'"),
                                        ("avx2", "this processor has no avx2 and no fma")])
def test_instructions_that_are_not_there_are_refused_with_the_reason(monkeypatch, isa, words):
    monkeypatch.setattr(build, "_processor", lambda: "flags : sse sse2 avx512f")
    build._load.cache_clear()
    monkeypatch.setenv("FNATTN_ISA", isa)
    try:
        with pytest.warns(RuntimeWarning, match=words), pytest.raises(KernelUnavailable, match=words):
            build.load("causal_dot")
        assert words in build.why_not("causal_dot")
    finally:
        build._load.cache_clear()


@pytest.mark.parametrize("source", sorted(p.stem for p in build.SOURCES.glob("*.c")))
def test_every_kernel_compiles_for_aarch64(tmp_path, source):
    cross = shutil.which("aarch64-linux-gnu-gcc")
    if not cross:
        pytest.skip("aarch64-linux-gnu-gcc is not installed")
    command = [cross, "-O1", "-std=gnu11", "-fPIC", "-fopenmp", "-c", str(build.SOURCES / f"{source}.c")]
    subprocess.run([*command, "-o", str(tmp_path / "out.o")], check=True, capture_output=True)
