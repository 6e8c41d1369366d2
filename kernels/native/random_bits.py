"""Threefry random numbers in C: `csrc/random_bits.c` as dispatcher operators with one leading batch axis of keys.

Integer mathematics throughout, so there is nothing to differentiate, and the numbers are those of every other machine.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..contracts import DerivativeUnsupported, Operator
from . import build

SOURCE = "random_bits"
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


def _fill(symbol: str, keys: Tensor, out: Tensor, n: int) -> Tensor:
    fn = getattr(build.load(SOURCE), symbol)
    fn.argtypes, fn.restype = [_POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_int], None
    keys = keys.contiguous()
    fn(keys.data_ptr(), out.data_ptr(), keys.shape[0], n, torch.get_num_threads())
    return out


def _bits(keys: Tensor, n: int) -> Tensor:
    return _fill("fnattn_random_bits", keys, _bits_fake(keys, n), n)


def _pairs(keys: Tensor, n: int) -> Tensor:
    return _fill("fnattn_random_pairs", keys, _pairs_fake(keys, n), n)


def _unit32(keys: Tensor, n: int) -> Tensor:
    return _fill("fnattn_random_unit_f32", keys, _unit32_fake(keys, n), n)


def _unit64(keys: Tensor, n: int) -> Tensor:
    return _fill("fnattn_random_unit_f64", keys, _unit64_fake(keys, n), n)


def _fold(keys: Tensor, data: Tensor) -> Tensor:
    fn = build.load(SOURCE).fnattn_random_fold
    fn.argtypes, fn.restype = [_POINTER, _POINTER, _POINTER, _SIZE], None
    keys, data = keys.contiguous(), data.contiguous()
    out = torch.empty_like(keys)
    fn(keys.data_ptr(), data.data_ptr(), out.data_ptr(), keys.shape[0])
    return out


def _bits_fake(keys: Tensor, n: int) -> Tensor:
    return keys.new_empty(keys.shape[0], n)


def _pairs_fake(keys: Tensor, n: int) -> Tensor:
    return keys.new_empty(keys.shape[0], n, 2)


def _unit32_fake(keys: Tensor, n: int) -> Tensor:
    return keys.new_empty(keys.shape[0], n, dtype=torch.float32)


def _unit64_fake(keys: Tensor, n: int) -> Tensor:
    return keys.new_empty(keys.shape[0], n, dtype=torch.float64)


def _fold_fake(keys: Tensor, data: Tensor) -> Tensor:
    return keys.new_empty(keys.shape)


def _operator(name: str, schema: str, fake, cpu) -> Operator:
    def refuse(*_):
        raise DerivativeUnsupported(f"fnattn::{name}: random numbers have no derivative with respect to a key.")

    operator = Operator(name, 1, schema, fake=fake, cpu=cpu, autocast=None)
    operator.derive(vjp=refuse, jvp=refuse, save_outputs=False)
    return operator


# keys int64 [batch, 2] with values in [0, 2^32); n numbers for each
_SCHEMA = "(Tensor keys, SymInt n) -> Tensor"
bits = _operator("random_bits_native", _SCHEMA, _bits_fake, _bits)  # int64 [batch, n]
pairs = _operator("random_pairs_native", _SCHEMA, _pairs_fake, _pairs)  # int64 [batch, n, 2]
unit32 = _operator("random_unit32_native", _SCHEMA, _unit32_fake, _unit32)  # float32 [batch, n]
unit64 = _operator("random_unit64_native", _SCHEMA, _unit64_fake, _unit64)  # float64 [batch, n]
# data int64 [batch] -> int64 [batch, 2]
fold = _operator("random_fold_native", "(Tensor keys, Tensor data) -> Tensor", _fold_fake, _fold)
for _one in (bits, pairs, unit32, unit64, fold):
    _one.flops(lambda *args, **kwargs: 0)  # integers throughout
