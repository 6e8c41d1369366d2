"""C kernels for the CPU, compiled on first use and called through ctypes; see `build` and the sources in `csrc/`."""
