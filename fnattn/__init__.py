"""fnattn: attention as pure functions. Every derivative right in every mode, or an error that says why not."""

__version__ = "0.1.0"
