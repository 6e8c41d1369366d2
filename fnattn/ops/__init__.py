"""Pure tensor functions: the mathematics of every attention, each with a plain-torch reference and its kernels."""
