"""A worker for the separate process that fails in every way a worker can."""

import os


def worker(what, name):
    if name == "dies":
        os.abort()
    if name == "raises":
        raise ValueError("no")
