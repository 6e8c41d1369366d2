"""Gated loops: `gate_loop` with a complex gate per head, `simple_gate_loop` with a real gate per channel."""

from .complex import GateLoopState, combine, gate_loop
from .simple import simple_gate_loop

__all__ = ["GateLoopState", "combine", "gate_loop", "simple_gate_loop"]
