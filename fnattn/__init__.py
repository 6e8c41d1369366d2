"""fnattn: attention as pure functions. Every derivative right in every mode, or an error that says why not."""

from ._kernels_path import provide_kernels

__version__ = "0.1.0"

provide_kernels()  # before anything that imports fnattn_kernels
