"""What must not grow: instructions of the C kernels, counted by valgrind, and operators and bytes of a call, counted by torch.

Counts are the same on a busy machine as on an idle one, which times are not. Each call of a kernel is recorded as Python makes
it and written down as a C program around the kernel's source; valgrind counts the instructions of the call alone.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build
from torch.utils._python_dispatch import TorchDispatchMode

import fnattn
from fnattn import attentions, ops
from fnattn.testing.memory import peak_bytes

REASON = build.why_not("taylor")
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_valgrind = pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
C_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.int64: "int64_t", torch.bool: "uint8_t"}


def qkv(n, d, h=2):
    make = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, h, n, d, generator=make, requires_grad=True) for _ in range(3))


def gates(n):
    return torch.randn(1, 2, n, 2, generator=torch.Generator().manual_seed(n), requires_grad=True)


class Case(NamedTuple):
    """call(n): the operator on n positions. products(n): multiply-adds of value and of gradient, counted from the algorithm.

    growth: how many times as much a call of twice the length may take.
    bound: instructions for each multiply-add of a whole AVX2 vector; half again of what GCC 12 made with -O1.
    short: the shorter length.
    """

    call: Callable[[int], torch.Tensor]
    products: Callable[[int], tuple[float, float]]
    growth: float
    bound: float
    short: int = 96


F = 1 + 16 + 16 * 17 // 2  # features of a head of Taylor attention
CASES = {
    "taylor": Case(lambda n: ops.taylor(*qkv(n, 16))[0], lambda n: (2 * n * 2 * F * 17, 2 * n * 5 * F * 17), 2.2, 9.5, 320),
    "gate_loop": Case(lambda n: ops.gate_loop(*qkv(n, 16), gates(n))[0], lambda n: (2 * n * 4 * 256, 2 * n * 14 * 256), 2.2, 14),
    "softmax": Case(lambda n: ops.softmax_attention(*qkv(n, 32), causal=True), lambda n: (n * n * 64, n * n * 160), 4.1, 18),
    "coor_descent": Case(lambda n: ops.coor_descent(qkv(n, 64)[0], 4.0, n_iters=5), lambda n: (2 * n * 64 * 20,) * 2, 2.2, 11),
    # A window of 5 x 5 and a text of 16 that all pixels see.
    "segment_attention": Case(lambda n: ops.conv_attention(*qkv(n, 32), text_len=16, image_size=16),
                              lambda n: (2 * n * 41 * 64, 2 * n * 41 * 160), 2.5, 26),
}


class Recorder:
    """Remembers the calls of C functions and the memory that they point to, and writes them as a C program."""

    def __init__(self, monkeypatch, source):
        self.source, self.calls, self.buffers, self.doubles = source, [], {}, {}
        module = importlib.import_module(f"fnattn_kernels.native.{source}")
        function, data_ptr = module.function, torch.Tensor.data_ptr

        def recorded_function(source, name, dtype, arguments):
            def call(*args):
                self.calls.append((name, args))
                return function(source, name, dtype, arguments)(*args)
            return call

        def recorded_pointer(t):
            at = data_ptr(t)
            size = t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()
            if at and size > self.buffers.get(at, (0,))[0]:
                self.buffers[at] = (size, t)
            return at

        monkeypatch.setattr(module, "function", recorded_function)
        monkeypatch.setattr(torch.Tensor, "data_ptr", recorded_pointer)
        if source == "coor_descent":
            schedule = module.c_schedule

            def recorded_schedule(*args):
                values = schedule(*args)
                self.doubles[ctypes.addressof(values)] = list(values)
                return values

            monkeypatch.setattr(module, "c_schedule", recorded_schedule)

    def program(self):
        """C code: main() makes the recorded calls, each in a function measured_<i>."""
        names, lines, fill = {}, [f'#include "{self.source}.c"'], []
        for i, (at, (size, t)) in enumerate(self.buffers.items()):
            kind, count = C_TYPES[t.dtype], size // t.element_size()
            if t.is_floating_point():
                lines.append(f"static {kind} buffer_{i}[{count}];")
                fill.append(f"for (int i = 0; i < {count}; i++) buffer_{i}[i] = (float)(i * 7919 % 1021) / 1021 - 0.5f;")
            else:
                numbers = torch.as_strided(t, (count,), (1,)).tolist()
                lines.append(f"static {kind} buffer_{i}[] = {{{', '.join(str(int(x)) for x in numbers)}}};")
            names[at] = f"buffer_{i}"
        for i, (at, values) in enumerate(self.doubles.items()):
            lines.append(f"static double doubles_{i}[] = {{{', '.join(map(repr, values))}}};")
            names[at] = f"doubles_{i}"
        for i, (name, args) in enumerate(self.calls):
            texts = []
            for arg in args:
                if isinstance(arg, bytes):  # a struct of int64: `numbers`
                    words = struct.unpack(f"{len(arg) // 8}q", arg)
                    texts.append(f"(void *)(int64_t[]){{{', '.join(word(x, names, '(int64_t)') for x in words)}}}")
                else:
                    texts.append("NULL" if arg is None else word(arg, names, "(void *)"))
            lines.append(f"__attribute__((noinline)) void measured_{i}(void) {{ fnattn_{name}_f32({', '.join(texts)}); }}")
        calls = " ".join(f"measured_{i}();" for i in range(len(self.calls)))
        return "\n".join([*lines, "int main(void) {", *fill, calls, "return 0; }"])


def word(x, names, cast):
    return cast + names[x] if x in names else repr(x)


def instructions(program, count, folder):
    """How many instructions each measured call takes, in order."""
    isa = "avx2"
    try:
        build._extra_flags(isa)
    except KernelUnavailable:
        isa = "baseline"
    code, binary = folder / "calls.c", folder / "calls"
    code.write_text(program)
    subprocess.run([*build._compiler(), "-O1", "-std=gnu11", "-w", *build.ISA_FLAGS[isa], f"-I{build.SOURCES}", str(code),
                    "-o", str(binary), "-lm"], check=True, capture_output=True)
    done = subprocess.run(["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=measured_*",
                           *(f"--dump-after=measured_{i}" for i in range(count)), f"--callgrind-out-file={folder / 'out'}",
                           str(binary)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dumps = [(folder / f"out.{i + 1}").read_text() for i in range(count)]
    return [int(re.search(r"^totals: (\d+)", dump, re.M)[1]) for dump in dumps], {"avx2": 8, "baseline": 4}[isa]


@needs_native
@needs_valgrind
@pytest.mark.parametrize("source", CASES)
def test_a_kernel_takes_no_more_instructions_than_its_algorithm_needs(monkeypatch, tmp_path, source):
    case = CASES[source]
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, source)
        for n in (case.short, 2 * case.short):
            out = case.call(n)
            out.backward(torch.ones_like(out))
    assert len(recorder.calls) == 4, [name for name, _ in recorder.calls]  # one call of C each for value and gradient
    counts, lanes = instructions(recorder.program(), len(recorder.calls), tmp_path)
    short, long = counts[:2], counts[2:]
    for few, many in zip(short, long):
        assert 1.5 * few < many <= case.growth * few
    for n, numbers in ((case.short, short), (2 * case.short, long)):
        for count, products in zip(numbers, case.products(n)):
            fused = 1 if lanes == 8 else 2  # the baseline multiplies and adds in two instructions
            assert count / (products / lanes) <= case.bound * fused


# ------------------------------------------------------------------------------------ operators and bytes, as torch counts


class Dispatched(TorchDispatchMode):
    """Counts the operators that are dispatched, views aside."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def dispatched(fn):
    with Dispatched() as seen:
        fn()
    return seen.names


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_one_operator_each_and_bytes_grow_with_the_length(name):
    def both(n):
        out = CASES[name].call(n)
        out.backward(torch.ones_like(out))

    n = CASES[name].short
    both(n)
    short, long = (dispatched(lambda n=n: both(n)) for n in (n, 2 * n))
    assert short == long and sum(count for op, count in short.items() if op.startswith("fnattn::")) == 2
    assert sum(short.values()) <= 16, short  # inputs and the layout of gradients among them
    assert peak_bytes(lambda: both(2 * n)) <= 2 * peak_bytes(lambda: both(n))


# How many operators one step of generation may dispatch, views aside: projections and one kernel.
STEPS = {"taylor": (attentions.taylor.Config(dim=32, causal=True), 10), "gate_loop": (attentions.gate_loop.Config(dim=32), 22),
         "simple_gate_loop": (attentions.simple_gate_loop.Config(dim=32), 12),
         "full": (attentions.full.Config(dim=32, seq_len=256, causal=True), 24)}


@needs_native
@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_generation_takes_few_operators_whatever_the_capacity(name, key):
    cfg, most = STEPS[name]
    params, x, counts = fnattn.init(key, cfg), torch.randn(2, 1, 32), []
    with torch.no_grad():
        for capacity in (64, 256):
            _, state = fnattn.apply(params, x, fnattn.init_state(params, 2, capacity=capacity))
            counts.append(dispatched(lambda state=state: fnattn.apply(params, x, state)))
    assert counts[0] == counts[1] and sum(counts[0].values()) <= most, counts[0]
