"""A worker for the separate process that fails in every way a worker can."""

import os
import time


def worker(what, name):
    if name == "dies":
        os.abort()
    if name == "raises":
        raise ValueError("no")
    if name == "slow":
        time.sleep(60)


def parent(what, name):
    """The process that forked this one."""
    return str(os.getppid())
