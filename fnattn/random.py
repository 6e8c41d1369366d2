"""Random numbers as pure functions of a key: the same key, the same bits, on every device and under every transform.

    word(key, i) = threefry2x32(key, (i >> 32, i mod 2^32))        20 rounds, integer arithmetic only

A key is an int64 tensor [2] that holds two 32-bit words. Nothing is ever advanced: `split` and `fold_in` make new keys,
and a key is used for one draw only. An ensemble draws under vmap over a [members, 2] tensor of keys.

The bits are those of `jax.random` in its partitionable form (the default since jax 0.5): equal for `key`, `split`,
`fold_in`, `bits` and `randint`, and for `uniform` in float32 and float64; `normal` differs in the last places, because
torch's erfinv is the more accurate one (which itself may differ in the last place between devices and compilers). As in
jax, fold_in(key, i) is split(key, n)[i], so do not use both on one key.

On the CPU a C kernel makes the words (10 million uniforms in about 0.03 s); elsewhere, and without a compiler, plain
torch makes the same ones. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
import numbers
import operator
import zlib
from collections.abc import Callable, Sequence

import torch
from fnattn_kernels.native import build, random_bits
from torch import Tensor

__all__ = ["Key", "bernoulli", "bits", "categorical", "dropout", "fold_in", "key", "normal", "randint", "split",
           "uniform"]

Key = Tensor
_MASK = 0xFFFFFFFF
_BLOCK = 1 << 16  # plain torch works on so many words at a time, so that its temporaries stay in the cache


# ------------------------------------------------------------------------------------------------ keys


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Key:
    """A key from a number.

    Args:
        seed: an integer in [-2^63, 2^64), or a 0-d integer tensor (map over it for many keys). Numbers from 0 to
            2^32 - 1 give the key of jax.random.key; others do so where jax has 64-bit integers enabled.
        device: where the key lives and hence where numbers are drawn; every device draws the same.
    Returns:
        int64 [2].
    """
    if isinstance(seed, Tensor):
        if seed.ndim or seed.is_floating_point() or seed.dtype == torch.bool:
            raise ValueError(f"random.key: seed must be an integer or a 0-d integer tensor; got {seed.dtype} "
                             f"{list(seed.shape)}.\n"
                             f"  For many keys map over the seeds: torch.vmap(fnattn.random.key)(seeds).")
        wide = seed.to(device=device, dtype=torch.int64)
        return torch.stack([(wide >> 32) & _MASK, wide & _MASK])
    number = _integer("random.key: seed", seed, -(1 << 63), 1 << 64)
    return torch.tensor([(number >> 32) & _MASK, number & _MASK], dtype=torch.int64, device=device)


def split(key: Key, n: int = 2) -> Key:
    """n new keys that share nothing with each other: int64 [n, 2]. Unpack them: `a, b = split(key)`."""
    _check_key("split", key)
    return _draw(key, (_integer("random.split: n", n, 0, 1 << 62),), random_bits.pairs, _as_pairs)


def fold_in(key: Key, data: int | str | Tensor) -> Key:
    """A new key from a key and a name or number.

    Naming beats splitting where things are added later: a parameter drawn from fold_in(key, "to_q") keeps its values
    whatever else is drawn.

    Args:
        data: an integer in [0, 2^32), a 0-d integer tensor (its low 32 bits count), or a string (its crc32 counts).
    Returns:
        int64 [2].
    """
    _check_key("fold_in", key)
    if isinstance(data, str):
        data = _crc32(data)
    if isinstance(data, Tensor):
        if data.ndim or data.is_floating_point() or data.dtype == torch.bool:
            raise ValueError(f"random.fold_in: data must be an integer, a string or a 0-d integer tensor; got "
                             f"{data.dtype} {list(data.shape)}.\n"
                             f"  Map over a tensor of numbers: torch.vmap(fold_in, (None, 0))(key, numbers).")
        counter = data.to(device=key.device, dtype=torch.int64) & _MASK
    else:
        number = _integer("random.fold_in: data", data, 0, 1 << 32)
        counter = torch.full((), number, dtype=torch.int64, device=key.device)
    if _native(key):
        return random_bits.fold(key[None], counter[None])[0]
    k0, k1 = _lane(key)
    return _as_pairs(*_threefry(k0, k1, torch.zeros_like(k0), _lane(counter)))


# ------------------------------------------------------------------------------------------------ numbers


def bits(key: Key, shape: int | Sequence[int] = ()) -> Tensor:
    """Uniform 32-bit integers: int64 tensor of `shape` with values in [0, 2^32), equal to jax.random.bits."""
    _check_key("bits", key)
    return _draw(key, _shape("bits", shape), random_bits.bits, _as_bits)


def uniform(key: Key, shape: int | Sequence[int] = (), dtype: torch.dtype = torch.float32,
            minval: float | Tensor = 0.0, maxval: float | Tensor = 1.0) -> Tensor:
    """Uniform numbers in [minval, maxval).

        minval + (maxval - minval) * m / 2^23,  m = 23 random bits (52 in float64)

    Args:
        shape: of the result.
        dtype: float32 and float64 equal jax.random.uniform; bfloat16 and float16 are the float32 numbers rounded.
        minval, maxval: numbers, or tensors that broadcast to `shape`, through which derivatives flow.
    Returns:
        `shape` in `dtype`. With bounds other than 0 and 1 rounding can reach maxval, in jax as here.
    """
    _check_key("uniform", key)
    shape, wide = _shape("uniform", shape), _wide("uniform", dtype)
    unit = _unit(key, shape, wide)
    if isinstance(minval, Tensor) or isinstance(maxval, Tensor) or (minval, maxval) != (0.0, 1.0):
        low, high = (torch.as_tensor(bound, dtype=wide, device=key.device) for bound in (minval, maxval))
        for name, bound in (("minval", low), ("maxval", high)):
            _fits("uniform", name, bound, shape)
        # One rounding, as in the fused multiply-add of jax's compiled code.
        scaled = (unit.double() * (high - low).double() + low.double()).to(wide)
        return torch.maximum(scaled, low).to(dtype)
    # Rounding to few digits must not produce 1.
    return unit if dtype == wide else unit.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)


def normal(key: Key, shape: int | Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers.

        sqrt(2) erfinv(u),  u uniform in (-1, 1)

    Returns:
        `shape` in `dtype`; bfloat16 and float16 are the float32 numbers rounded. Made from the bits of
        jax.random.normal and equal to it to about 5 units in the last place for |x| < 2, to 1e-5 of x beyond, where
        jax's erfinv is that far off; in float64 to 1e-13 of x.
    """
    _check_key("normal", key)
    shape, wide = _shape("normal", shape), _wide("normal", dtype)
    # The unit numbers belong to nobody else: transforming them in place halves the time.
    u = _unit(key, shape, wide).mul_(2).add_(torch.finfo(wide).eps / 2 - 1)
    return u.erfinv_().mul_(math.sqrt(2)).to(dtype)


def randint(key: Key, shape: int | Sequence[int], minval: int, maxval: int) -> Tensor:
    """Integers in [minval, maxval): int64 of `shape`, equal to jax.random.randint. Bounds are 32-bit integers."""
    _check_key("randint", key)
    low = _integer("random.randint: minval", minval, -(1 << 31), 1 << 31)
    high = _integer("random.randint: maxval", maxval, -(1 << 31), (1 << 31) + 1)
    if not isinstance(high, torch.SymInt) and high <= low:
        raise ValueError(f"random.randint: maxval must lie above minval; got {low} and {high}.\n  maxval itself never comes out.")
    span = high - low
    first, second = (bits(k, shape) for k in split(key))
    # 64 random bits modulo the span, in 32-bit arithmetic: 2^32 mod span, with jax's wrap-around.
    multiplier = (((1 << 16) % span) ** 2 & _MASK) % span
    return low + (((first % span * multiplier & _MASK) + second % span) & _MASK) % span


def bernoulli(key: Key, p: float | Tensor = 0.5, shape: int | Sequence[int] | None = None) -> Tensor:
    """True with probability p, a number or a tensor: bool of `shape`, by default p's. Equal to jax.random.bernoulli."""
    _check_key("bernoulli", key)
    if not isinstance(p, Tensor):
        _chance("bernoulli", p, "Clamp it: min(max(p, 0), 1).")
    dtype = torch.float64 if isinstance(p, Tensor) and p.dtype == torch.float64 else torch.float32
    chance = torch.as_tensor(p, dtype=dtype, device=key.device)
    sizes = chance.shape if shape is None else _shape("bernoulli", shape)
    _fits("bernoulli", "p", chance, sizes)
    return uniform(key, sizes, dtype) < chance


def categorical(key: Key, logits: Tensor, axis: int = -1, shape: int | Sequence[int] | None = None) -> Tensor:
    """Indices drawn with probability softmax(logits, axis), by the largest of logits plus Gumbel noise.

    Args:
        logits: floating point, unnormalised; -inf never comes out.
        axis: which axis holds one distribution.
        shape: of the result; must end in logits' shape without `axis`, which is also the default. More leading axes
            mean more independent draws.
    Returns:
        int64 of `shape`. The choices of jax.random.categorical for float32 and float64 (up to ties in the last place);
        half precision is widened to float32 first.
    """
    _check_key("categorical", key)
    if not isinstance(logits, Tensor):
        raise TypeError(f"random.categorical: logits must be a floating tensor; got {type(logits).__name__}.\n"
                        f"  Convert it: torch.as_tensor(logits).")
    if not logits.is_floating_point():
        raise TypeError(f"random.categorical: logits must be a floating tensor; got {logits.dtype}.\n  Cast it: logits.float().")
    wide = _wide("categorical", logits.dtype)
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"random.categorical: axis must be one of logits' {logits.ndim} axes; got {axis}.\n"
                         f"  Give logits at least one axis.")
    if logits.shape[axis] == 0:
        raise ValueError(f"random.categorical: logits must hold at least one choice along axis {axis}; got {list(logits.shape)}.\n"
                         f"  There is nothing to draw from.")
    axis = axis % logits.ndim - logits.ndim
    rest = [size for i, size in enumerate(logits.shape) if i - logits.ndim != axis]
    shape = tuple(rest) if shape is None else _shape("categorical", shape)
    prefix = shape[:len(shape) - len(rest)]
    if list(shape[len(prefix):]) != rest:
        raise ValueError(f"random.categorical: shape must end in {rest}, logits' shape without axis {axis}; got "
                         f"{list(shape)}.\n  Put the number of draws in front: shape=(draws, *rest).")
    u = _unit(key, (*prefix, *logits.shape), wide).clamp(min=torch.finfo(wide).tiny)
    return (logits.to(wide) - (-u.log()).log()).argmax(axis)


def dropout(key: Key, x: Tensor, p: float) -> Tensor:
    """x with each entry zeroed with probability p and the others divided by 1 - p, so that the mean stays.

    Linear in x and differentiable in it any number of times. Under vmap with one key for all, every member drops the
    same entries; map over split(key, n) for independent ones.

    Args:
        x: floating point, any shape.
        p: a number in [0, 1]; 0 returns x itself, 1 zeros.
    """
    _check_key("dropout", key)
    _chance("dropout", p, "p is the chance of zeroing, such as 0.1.")
    if p == 0:
        return x
    if p == 1:
        return torch.zeros_like(x)
    keep = bernoulli(key.to(x.device), 1 - p, x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0)


# ------------------------------------------------------------------------------------------------ words


def _unit(key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1), float32 or float64, in memory of their own."""
    if dtype == torch.float64:
        return _draw(key, shape, random_bits.unit64, _as_unit64)
    return _draw(key, shape, random_bits.unit32, _as_unit32)


def _draw(key: Key, shape: tuple[int, ...], native: Callable, finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Numbers 0, 1, 2, ... of a key, from the C kernel or from the two words of each index, given to `finish`."""
    n = math.prod(shape)
    if _native(key):
        flat = native(key[None], n)[0]
    elif torch.compiler.is_compiling() or n <= _BLOCK:
        flat = finish(*_words(key, 0, n))
    else:
        flat = torch.cat([finish(*_words(key, i, min(i + _BLOCK, n))) for i in range(0, n, _BLOCK)])
    return flat.reshape((*shape, *flat.shape[1:]))


def _native(key: Key) -> bool:
    return key.device.type == "cpu" and build.why_not(random_bits.SOURCE) is None


def _crc32(name: str) -> int:
    return zlib.crc32(name.encode())


# Tracers cannot look into zlib; the answer is a constant (torch.compiler's decorator would import the compiler).
_crc32._dynamo_marked_constant = True


def _words(key: Key, start: int, stop: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(start, stop, dtype=torch.int64, device=key.device)
    k0, k1 = _lane(key)
    return _threefry(k0, k1, _lane(index >> 32), _lane(index & _MASK))


def _lane(x: Tensor) -> Tensor:
    """The int32 with the same 32 bits; int32 is eight times as fast as int64, and uint32 has no arithmetic."""
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _threefry(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Twenty rounds of Threefry-2x32 on int32 lanes, whose additions wrap around."""
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r) | ((x1 >> (32 - r)) & ((1 << r) - 1))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + (i + 1)
    return x0, x1


def _as_bits(a: Tensor, b: Tensor) -> Tensor:
    return (a ^ b).long() & _MASK


def _as_pairs(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a.long() & _MASK, b.long() & _MASK], -1)


def _as_unit32(a: Tensor, b: Tensor) -> Tensor:
    return (((a ^ b) >> 9) & 0x7FFFFF).float() * 2.0**-23


def _as_unit64(a: Tensor, b: Tensor) -> Tensor:
    return (((a.long() & _MASK) << 20) | ((b.long() & _MASK) >> 12)).double() * 2.0**-52


# ------------------------------------------------------------------------------------------------ checks


def _check_key(who: str, key: Key) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"random.{who}: key must be an int64 tensor made by key, split or fold_in; got {got}.\n"
                        f"  Make one from a number: fnattn.random.key(0).")
    if key.shape != (2,):
        raise ValueError(f"random.{who}: key must have shape [2]; got {list(key.shape)}.\n"
                         f"  For several keys map over them: torch.vmap(fn)(keys).")


def _integer(what: str, value: int, low: int, high: int) -> int:
    try:
        number = value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer; got {type(value).__name__}.\n  Convert it: int(x).") from None
    if isinstance(number, torch.SymInt) or low <= number < high:
        return number
    raise ValueError(f"{what} must be in [{low}, {high}); got {number}.\n"
                     f"  Reduce it, for example modulo {high - max(low, 0)}.")


def _shape(who: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = (shape,) if isinstance(shape, (int, torch.SymInt)) else tuple(shape)
        for size in sizes:
            if not isinstance(size, torch.SymInt):
                operator.index(size)
    except TypeError:
        raise TypeError(f"random.{who}: shape must be an int or a sequence of ints; got {shape!r}.\n"
                        f"  Pass an int or a tuple of ints.") from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"random.{who}: shape must hold sizes of at least 0; got {list(sizes)}.\n"
                         f"  Pass an int or a tuple of ints.")
    return sizes


def _fits(who: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    sizes = tuple(shape)[max(0, len(shape) - t.ndim):]
    if t.ndim > len(shape) or any(given not in (1, size) for given, size in zip(t.shape, sizes)):
        raise ValueError(f"random.{who}: {name} must broadcast to {list(shape)}; got {list(t.shape)}.\n"
                         f"  Give shape the axes that {name} has.")


def _chance(who: str, p: float, remedy: str) -> None:
    if not isinstance(p, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"random.{who}: p must be a number; got {type(p).__name__}.\n  {remedy}")
    if not 0 <= p <= 1:
        raise ValueError(f"random.{who}: p must be a probability in [0, 1]; got {p}.\n  {remedy}")


def _wide(who: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"random.{who}: dtype must be floating point; got {dtype!r}.\n"
                        f"  Use random.bits or random.randint for integers.")
    return torch.float64 if dtype == torch.float64 else torch.float32
