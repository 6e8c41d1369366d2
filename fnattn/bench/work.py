"""How much work each algorithm is, counted from its formulas; divided by the machine's peaks it is the floor of a time.

Counts of the inner loops only: no loads that hit a cache, no loop control, no overlap of exponentials with products.
"""

from __future__ import annotations

from math import log
from statistics import NormalDist

from .case import Work, bytes_of, triangle

CHUNK = {"taylor": 32, "gate_loop": 64}
SETTLED = 6  # iterations of coordinate descent that look at every entry


def taylor(b: int, h: int, n: int, d: int, e: int) -> tuple[Work, Work]:
    """Causal Taylor attention: the cheaper of the table of scores and the chunked sums."""
    c, f = CHUNK["taylor"], 1 + d + d * (d + 1) / 2
    pair, pair_back = 2 * d + 4 + 2 * (e + 1), 6 * d + 4 * (e + 1) + 8
    step, step_back = 2 * f * (2 * (e + 1) + 1), f * (10 * (e + 1) + 10)
    within = n * (min(c, n) + 1) / 2
    forward = min(triangle(n) * pair, within * pair + n * step)
    back = min(triangle(n) * pair_back, within * pair_back + n * step_back)
    io = bytes_of((b, h, n, 2 * d + 2 * e))
    return Work(forward * b * h, 0, io), Work((forward + back) * b * h, 0, 3 * io)


def gate_loop_narrow(b: int, n: int, c: int) -> tuple[Work, Work]:
    """One complex number per channel: six floats of input and result per step, twice that and more for gradients."""
    steps = b * n * c
    return Work(16 * steps, steps, 24 * steps), Work(76 * steps, 2 * steps, 68 * steps)


def gate_loop_wide(b: int, h: int, n: int, d: int, e: int) -> tuple[Work, Work]:
    """Chunks of 64 with doubled real features."""
    within = min(CHUNK["gate_loop"], n) / 2 + 0.5
    forward = within * (4 * d + 2 * e) + 8 * d * e + 12 * d
    back = within * (12 * d + 4 * e) + 20 * d * e + 24 * d
    io = bytes_of((b, h, n, 2 * d + 2 * e + 2))
    return Work(forward * b * h * n, 0, io), Work((forward + back) * b * h * n, 0, 3 * io)


def simple_gate_loop(b: int, n: int, c: int) -> tuple[Work, Work]:
    """Three inputs and a result per step."""
    steps = b * n * c
    return Work(8 * steps, steps, 16 * steps), Work(28 * steps, 2 * steps, 44 * steps)


def coor(entries: float, n: int, k: float, n_iters: int, eps: float = 0.1, eps_init: float | None = None,
         eps_decay: float = 1.0) -> tuple[Work, Work]:
    """Coordinate descent on rows of n normal scores: an exponential per entry and step while eps varies, then a minimum and a sum;
    one at the end.

    Steps that cannot matter are not counted, nor is what an iteration does once thresholds settle: it looks at the few entries
    beside them.
    """
    schedule = _schedule(n_iters, eps, eps_init, eps_decay)
    needed = schedule[_first_needed(n, k, schedule):]
    varying = sum(at > eps for at in needed)
    sweeps = min(len(needed) - varying, SETTLED)
    forward = Work(4 * sweeps * entries, (varying + 2) * entries, 8 * entries)
    return forward, forward + Work((4 * sweeps + 8) * entries, (varying + 2) * entries, 12 * entries)


def _schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> list[float]:
    """eps of each iteration."""
    found = [max(eps, eps if eps_init is None else eps_init)]
    while len(found) < n_iters:
        found.append(max(found[-1] * eps_decay, eps))
    return found


def _first_needed(n: int, k: float, schedule: list[float]) -> int:
    """Thresholds above all entries leave nothing behind: the first iteration after those that are known beforehand to be so."""
    largest = NormalDist().inv_cdf(1 - 1 / max(n, 2))
    first = 0
    while first < len(schedule) - 1 and (k <= 1 and first or schedule[first] * log(n / k) >= largest):
        first += 1
    return first


def attention(b: int, h: int, n: int, pairs: float, d: int) -> tuple[Work, Work]:
    """Softmax attention over so many (query, key) pairs per head: two products forward, five backward."""
    rows, io = b * h * pairs, bytes_of((b, h, n, 4 * d))
    forward = Work(4 * d * rows, rows, io)
    return forward, forward + Work(10 * d * rows, rows, 2 * io)


def conv_pairs(text: int, side: int, kernel: int) -> float:
    """(query, key) pairs of a text and a picture whose pixels see a kernel x kernel window ending at themselves."""
    one_side = sum(min(i + 1, kernel) for i in range(side))
    return triangle(text) + side * side * text + one_side ** 2


def axial_pairs(text: int, side: int) -> float:
    """The same where pixels see their row or column."""
    return triangle(text) + side * side * text + side * triangle(side)


def linear(*weights: tuple[int, int, int]) -> tuple[Work, Work]:
    """Matrix products [rows, inputs] x [inputs, outputs]: one forward, two backward."""
    forward = Work(sum(2.0 * r * i * o for r, i, o in weights), 0, bytes_of(*((r, i + o) for r, i, o in weights)))
    return forward, forward.times(3)


def total(*parts: tuple[Work, Work]) -> tuple[Work, Work]:
    """Sums of (forward, with gradients)."""
    forward, both = zip(*parts, strict=True)
    return sum(forward, Work()), sum(both, Work())
