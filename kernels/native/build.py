"""Compiles a C source on first use and loads it with ctypes.

A plain C ABI needs neither torch's nor Python's headers: half a second per file, and the library fits every torch and
every Python. Libraries are cached by the hash of source, flags, compiler and processor; a new one is written under a
temporary name and moved into place, so processes that build at the same time cannot see half a file.

Environment: FNATTN_NATIVE=0 switches native kernels off, FNATTN_CACHE names the cache folder, CC the compiler. FNATTN_ISA
says for which instructions to build:
    native    everything that this processor has (the default)
    avx2      x86 with AVX2 and FMA, vectors of 32 bytes; refused on processors without them
    baseline  what every processor of this architecture has, vectors of 16 bytes (SSE2 on x86-64, NEON on aarch64)
Vectors in the sources are as wide as the instructions allow, never wider (csrc/common.h).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from ..contracts import KernelUnavailable

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
COMPILERS = ("cc", "gcc", "clang")
BASE_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno")
ISA_FLAGS = {"native": ("-march=native",), "avx2": ("-mavx2", "-mfma"), "baseline": ()}
BUILD_SECONDS = 300
_NAMES: tuple[Any, ...] = ("FNATTN_NATIVE", "FNATTN_ISA")
_VARIABLES: Any = os.environ
# Every call of a kernel reads these two, and os.environ decodes what it reads, in longer than the call of C takes. Python keeps
# the variables as they are in a dict, which changes with os.environ.
if hasattr(os.environ, "_data") and hasattr(os.environ, "encodekey"):
    _NAMES, _VARIABLES = tuple(map(os.environ.encodekey, _NAMES)), os.environ._data


def load(source: str) -> ctypes.CDLL:
    """The library compiled from csrc/<source>.c.

    Raises:
        KernelUnavailable: switched off, no compiler, no writable cache folder, or the build failed; the text says which.
    """
    library, reason = _load(source, *_switches())
    if library is None:
        raise KernelUnavailable(f"native kernel {source!r}: {reason}")
    return library


def why_not(source: str) -> str | None:
    """None if csrc/<source>.c is, or can be, compiled and loaded here; else the reason. Builds it if need be."""
    return _load(source, *_switches())[1]


# Tracers call this with a constant and must take the answer as one: they cannot look into a compiler run.
why_not._dynamo_marked_constant = True


def narrower_than_torch() -> bool:
    """Whether kernels are built for SSE2 alone while torch's own use wider vectors of this processor."""
    return _switches()[1] == "baseline" and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


narrower_than_torch._dynamo_marked_constant = True


def _switches() -> tuple[str, str]:
    return _decoded(_VARIABLES.get(_NAMES[0]), _VARIABLES.get(_NAMES[1]))


@functools.cache
def _decoded(switch: str | bytes | None, isa: str | bytes | None) -> tuple[str, str]:
    return "1" if switch is None else os.fsdecode(switch), "native" if isa is None else os.fsdecode(isa)


@functools.cache
def _load(source: str, switch: str, isa: str) -> tuple[ctypes.CDLL | None, str | None]:
    if switch == "0":
        return None, "switched off by FNATTN_NATIVE=0"
    try:
        return _build(source, isa), None
    except KernelUnavailable as error:
        # Once per source and process: the call is still served, by plain torch.
        warnings.warn(f"fnattn: native kernel {source!r} is unavailable ({error}); plain torch is used instead.",
                      RuntimeWarning, stacklevel=2)
        return None, str(error)


def _build(source: str, isa: str) -> ctypes.CDLL:
    extras = _extra_flags(isa)
    compiler = _compiler()
    folder = cache_folder()
    code = b"".join(p.read_bytes() for p in sorted(SOURCES.glob("*.h"))) + (SOURCES / f"{source}.c").read_bytes()
    problem = ""
    for extra in extras:
        command = [*compiler, *BASE_FLAGS, *extra]
        stamp = hashlib.sha256(code + repr((command, _compiler_version(tuple(compiler)), _processor())).encode())
        target = folder / f"{source}-{stamp.hexdigest()[:20]}.so"
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:  # cut short by a full disk or a crash: build it again
                target.unlink(missing_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            run = subprocess.run([*command, str(SOURCES / f"{source}.c"), "-o", str(temporary), "-lm"],
                                 capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if run.returncode:
                problem = run.stderr.strip()[-400:]
                continue
            os.replace(temporary, target)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        finally:
            temporary.unlink(missing_ok=True)
    raise KernelUnavailable(f"the build with {compiler[0]} failed: {problem}")


def _extra_flags(isa: str) -> tuple[tuple[str, ...], ...]:
    """Flags to try in order: a compiler without OpenMP or without -march=native still gives a right, slower library."""
    if isa not in ISA_FLAGS:
        raise KernelUnavailable(f"FNATTN_ISA must be one of {', '.join(ISA_FLAGS)}; got {isa!r}")
    if isa == "avx2":
        lacking = [word for word in ("avx2", "fma") if word not in _processor().split()]
        if lacking:
            raise KernelUnavailable(f"FNATTN_ISA=avx2: this processor has no {' and no '.join(lacking)}; use native or baseline")
    flags = ISA_FLAGS[isa]
    with_and_without = ((*flags, "-fopenmp"), flags)
    return (with_and_without[0], ("-fopenmp",), flags, ()) if isa == "native" else with_and_without


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    for command in ([named] if named else COMPILERS):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    looked = named or ", ".join(COMPILERS)
    raise KernelUnavailable(f"no C compiler found (looked for {looked})")


@functools.cache
def _compiler_version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]


@functools.cache
def _processor() -> str:
    """Names the instruction set: a cache folder may be shared between machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> Path:
    """The first folder that can be written: FNATTN_CACHE, the user's cache folder, the system's temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    choices = [os.environ.get("FNATTN_CACHE"), os.path.join(home, "fnattn"),
               os.path.join(tempfile.gettempdir(), f"fnattn-{user}")]
    for choice in filter(None, choices):
        try:
            folder = Path(choice)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise KernelUnavailable(f"no cache folder can be written (tried {', '.join(filter(None, choices))}); set FNATTN_CACHE")
