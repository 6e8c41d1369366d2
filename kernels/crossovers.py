"""When `impl="auto"` takes which kernel: the one table of thresholds, and where each was measured.

    python -m fnattn bench --crossovers

times every implementation at short and long sequences and prints, beside this table, where another choice would have been
faster. What a person learns from it is written here, with processor and date; nothing else decides. A whole run is kept in
benchmarks/results/2026-11-29-epyc-avx512-crossovers.json: the choice was the fastest but for rotary at 64 positions, where both take
0.5 ms, and gradients through cached_attention. Those have a kernel of their own since, which on one core of a Xeon takes 0.44 ms where
plain torch takes 1.26 (one query, 8 heads of 256 keys), and 2.7 ms where it takes 11 (4096 keys).
"""

from __future__ import annotations

from typing import NamedTuple

ALWAYS, NEVER = "always", "never"
EPYC = "one core of an AMD EPYC with AVX-512, 2026-11"
# Right in Triton's interpreter and compiled for a GPU; what has never run on one is not what a user gets unasked.
UNMEASURED = "not yet run on a GPU, so not yet chosen there: ask for it by name"


class Crossover(NamedTuple):
    """One kernel of one operator.

    takes:    when it is taken if it can serve and no earlier kernel of the operator was: ALWAYS, NEVER, or a condition in
              words in which {names} are limits. Where kernels share an entry point, what chooses between them.
    measured: on what, when, and the figures that decide.
    limits:   the numbers of the condition.
    """

    operator: str
    kernel: str
    takes: str
    measured: str
    limits: dict[str, float] = {}

    @property
    def rule(self) -> str:
        """The condition with its numbers."""
        return self.takes.format(**self.limits)


TABLE = (
    Crossover("causal_dot", "native", ALWAYS, EPYC),
    # How fast another build of the package is depends on compiler flags that cannot be seen from here.
    Crossover("causal_dot", "fast_transformers", NEVER, f"{EPYC}: value and gradient, 8 heads, n 64 to 4096, d and e 16 to 64, "
              "7 to 56 times as long as native, 3 to 21 times as long as plain torch"),
    Crossover("causal_dot", "triton", NEVER, UNMEASURED),
    Crossover("scan", "native", ALWAYS, EPYC),
    Crossover("scan", "triton", NEVER, UNMEASURED),
    Crossover("scan", "associative_scan", NEVER, f"{EPYC}: value and gradient 6 times as long as native at 64 positions of 64 channels, 9 "
              "at 1024, 5 at 4096 of 512"),
    Crossover("taylor", "native", ALWAYS, EPYC),
    # Inside native. With F features of d channels, F (e + 1) / (d + e + 1) pairs cost as much as reading a state: 79 (285, 1081)
    # for d = e = 16 (32, 64). Returned sums are made either way.
    Crossover("taylor", "native, quadratic", "value: the first {value} of so many positions; gradient: up to {whole} of them whole "
              "sequences, of longer ones the first and last {gradient}", f"{EPYC}: gradient of whole sequences 1.4 times as fast at "
              "n 64 (512), equal at 256 (768), at d 64 2.3 times at 1024", {"value": 1.0, "whole": 2.6, "gradient": 0.5}),
    Crossover("taylor", "triton", NEVER, UNMEASURED),
    # In plain torch: the [n, n] table of a sequence so short that it costs less than reading the sums.
    Crossover("taylor", "reference, quadratic", "n <= {length} positions", EPYC, {"length": 256}),
    Crossover("gate_loop", "native", ALWAYS, EPYC),
    Crossover("gate_loop", "triton", NEVER, UNMEASURED),
    Crossover("simple_gate_loop", "native", ALWAYS, EPYC),
    Crossover("simple_gate_loop", "triton", NEVER, UNMEASURED),
    Crossover("softmax_attention", "native", ALWAYS, EPYC),
    # Inside native: torch's own fused kernel, where ours would leave most of its vector lanes idle.
    Crossover("softmax_attention", "native, torch's", "n < {bytes} / bytes of a number, and more than {ratio} n + {extra} keys",
              f"{EPYC}: one query, 513 keys, 16 heads 0.08 ms against 0.58", {"bytes": 128, "ratio": 2, "extra": 8}),
    # Our backward gives a thread a key head.
    Crossover("softmax_attention", "native, torch's backward", "{speed} b g < threads", EPYC, {"speed": 4}),
    Crossover("softmax_attention", "sdpa", NEVER, f"{EPYC}: 8 causal heads of 512 x 512 take 2.4 to 3.4 times as long as native, "
              "which calls it where it is faster"),
    Crossover("softmax_attention", "triton", NEVER, UNMEASURED),
    Crossover("cached_attention", "native", ALWAYS, EPYC),
    # Inside native: reading both parts of a cache where they are, in place of joining them for softmax_attention.
    Crossover("cached_attention", "native, in place", "at most {queries} queries for each key head", EPYC, {"queries": 8}),
    Crossover("cached_attention", "sdpa", NEVER, f"{EPYC}: the native kernel need not join the parts"),
    Crossover("cached_attention", "triton", NEVER, UNMEASURED),
    Crossover("masked_softmax", "deepspeed", NEVER, UNMEASURED),
    # torch's copies the weights into an order of its own first. A call of ours costs more, and has no derivative of its own.
    Crossover("linear", "native", "at most {rows} rows, or {halves} in bfloat16, and at least {weights} weights, where nothing maps, "
              "traces or differentiates",
              f"{EPYC}: 1536 x 512 weights, 2 rows 117 us against 148, 4 rows 167 against 189, 6 rows 227 against 253, 8 rows equal; "
              "384 x 512 weights, 2 rows 43 against 33. Xeon with AMX: 1536 x 512 weights in bfloat16, 1 row 85 us against 107, 2 rows 198 "
              "against 207, 4 rows 237 against 206", {"rows": 6, "halves": 2, "weights": 1 << 19}),
    # A compiler fuses plain torch with what surrounds it. vmap goes through Python for each operator of ours, as it does not for
    # torch's own. Without vmap the choice is that of plain calls, so that both ways to a gradient give the same bits.
    Crossover("rms_norm", "native", "not while torch.compile traces; under vmap from {numbers} numbers on. Batch entries of "
              "{rows} rows or more as they lie, others as rows of one",
              f"{EPYC}: gradients for 8 members of 2 x 31 x 32 numbers 0.77 ms against 0.55, of 4 x 63 x 32 0.87 against 0.70, of "
              "4 x 64 x 64 1.03 against 0.95, of 4 x 128 x 128 2.4 against 3.2; without transforms 4 x 63 x 64 as it lies 21 us against 49",
              {"numbers": 1 << 13, "rows": 16}),
    Crossover("rotary", "native", "not while torch.compile traces", EPYC),
    Crossover("rotary", "rotary_embedding_torch", NEVER, EPYC),
    Crossover("coor_descent", "native", ALWAYS, EPYC),
    Crossover("coor_descent", "triton", NEVER, UNMEASURED),
    Crossover("coor_descent", "colt5", NEVER, UNMEASURED),
    Crossover("coor_descent_attention", "native", ALWAYS, EPYC),
    Crossover("conv_attention", "native", ALWAYS, EPYC),
    Crossover("conv_attention", "triton", NEVER, UNMEASURED),
    Crossover("conv_attention", "bands", ALWAYS, EPYC),
    # Lines are short, so plain torch has little to lose: with matrix products on wider vectors than ours it overtakes.
    Crossover("axial_attention", "native", "d < {width}, or not built for SSE2 alone beside a torch with wider vectors",
              f"{EPYC}: FNATTN_ISA=baseline, n 1024, value and gradient of width 16 1.8 times as fast as plain torch, of width 64 0.81",
              {"width": 48}),
    Crossover("axial_attention", "triton", NEVER, UNMEASURED),
    Crossover("axial_attention", "bands", "as native", EPYC),
    Crossover("block_sparse_attention", "native", ALWAYS, EPYC),
    Crossover("block_sparse_attention", "triton", NEVER, UNMEASURED),
    Crossover("block_sparse_attention", "flex", NEVER, UNMEASURED),
    # Gathering copies keys and values once per block that reads them: worth it for long rows that are mostly absent.
    Crossover("block_sparse_attention", "gather", "n >= {length} and at most {density:.0%} of the blocks are there", EPYC,
              {"length": 1024, "density": 0.25}),
    Crossover("block_sparse_attention", "deepspeed", NEVER, "runs on no torch that this library runs on"),
)
_BY_NAME = {(row.operator, row.kernel): row for row in TABLE}


def limits(operator: str, kernel: str) -> dict[str, float]:
    """The thresholds of one kernel of one operator."""
    return _BY_NAME[operator, kernel].limits


def fixed(operator: str, kernel: str) -> bool:
    """Whether a kernel without a condition of its own is taken: unless the table says never."""
    row = _BY_NAME.get((operator, kernel))
    return row is None or row.takes != NEVER
