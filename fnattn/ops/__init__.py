"""Pure tensor functions: the mathematics of every attention, each with a plain-torch reference and its kernels."""

from .causal_dot import causal_dot as causal_dot
