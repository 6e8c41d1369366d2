"""Runs checks in a separate process, where a failure cannot spoil later ones.

A failure of torch.compile inside a torch.func transform leaves the process's stack of transform levels dirty, and
correct eager calls made afterwards fail. One fresh interpreter imports torch once and forks a child for the checks of each
call; a child that meets a failure reports it and ends, and the next one goes on with the remaining checks from a clean start.
The interpreter waits for further calls, because starting it takes as long as two checks, and ends with this process.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SILENT, _DEAD = "ended without an answer", "the process died"


def died(answer: Any) -> bool:
    """Whether an answer of `run_apart` says that there is none: the process ended, was stopped, or crashed."""
    return isinstance(answer, str) and answer.startswith((_SILENT, _DEAD))


def resolve(spec: str | Callable) -> Callable:
    """The function that "module:function" names; a function stays what it is."""
    if not isinstance(spec, str):
        return spec
    module, _, name = spec.partition(":")
    if not name:
        raise ValueError(f'testing: expected "module:function"; got {spec!r}.\n  Write the module, a colon and the name.')
    return getattr(importlib.import_module(module), name)


def run_apart(worker: str, what: Any, names: Sequence[str], *, limit_s: float = 900) -> Iterator[tuple[str, Any]]:
    """Yields (name, worker(what, name)) for each name, computed in a process of its own with an empty compile cache.

    Args:
        worker: "module:function"; returns something that JSON can hold: None when all is well, else what is wrong.
        what: picklable; functions travel by name, so they must be importable.
        limit_s: for all of it.
    Raises:
        ValueError: `what` cannot be sent.
    """
    if not names:
        return
    try:
        payload = pickle.dumps(what)
    except Exception as error:
        raise ValueError(f"testing: checks in a separate process need functions that can be imported; got {error}.\n"
                         f'  Move the function to the top level of a module, or pass it as "module:function".') from None
    if b"__main__" in payload:
        raise ValueError("testing: checks in a separate process need functions that can be imported; got one of __main__.\n"
                         "  Move the function to a module of its own, or pass compile=False.")
    with tempfile.TemporaryDirectory(prefix="fnattn-check-") as folder, _LOCK:
        with open(os.path.join(folder, _WHAT), "wb") as file:
            pickle.dump((worker, list(names), payload), file)
        _interpreter(*_surroundings()).work(folder, limit_s)
        found = _read(os.path.join(folder, _ANSWERS))
        with open(os.path.join(folder, _LOG), encoding="utf-8", errors="replace") as file:
            last = "".join(file.readlines()[-3:]).strip()
    for name in names:
        yield name, found.get(name, f"{_SILENT}: {last[-400:]}")


# ------------------------------------------------------------------------------------------------ on this side


_WHAT, _ANSWERS, _LOG = "what", "answers", "log"
_LOCK = threading.Lock()


def _surroundings() -> tuple[int, str, tuple[tuple[str, str], ...]]:
    """What an interpreter is made for: where one of these differs, another one is started."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore", PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path))
    environment.pop("PYTEST_CURRENT_TEST", None)  # never the same twice, and nothing goes by it
    return os.getpid(), os.getcwd(), tuple(sorted(environment.items()))


class _Interpreter:
    """A process that carries out one request, a folder, after the other."""

    def __init__(self, folder: str, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.running: list[subprocess.Popen] = []  # at most one
        weakref.finalize(self, _stop, self.running, os.getpid())

    def work(self, folder: str, limit_s: float) -> None:
        """Returns when the request is done, or the time is up, or the process has died: then the next request starts another."""
        end, log = time.monotonic() + limit_s, os.path.join(folder, _LOG)
        open(log, "ab").close()
        if not self.running or self.running[0].poll() is not None:
            _stop(self.running, os.getpid())
            with open(log, "ab") as stderr:
                # A session of its own, so that its children can be stopped with it.
                self.running.append(subprocess.Popen(
                    [sys.executable, "-m", "fnattn.testing.apart"], cwd=self.folder, env=self.environment, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=stderr, start_new_session=True))
        (process,), done = self.running, b""
        try:
            process.stdin.write(folder.encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                done = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not done:
                _stop(self.running, os.getpid())


def _stop(running: list[subprocess.Popen], owner: int) -> None:
    """Stops the process and its children, unless it belongs to the process that this one was forked from."""
    while running and owner == os.getpid():
        process = running.pop()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # what could not be written any more
                pass


@functools.lru_cache(maxsize=1)
def _interpreter(pid: int, folder: str, environment: tuple[tuple[str, str], ...]) -> _Interpreter:
    """That of these surroundings; one at a time."""
    return _Interpreter(folder, dict(environment))


def _read(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.loads(line) for line in file if line.endswith("\n"))


# ------------------------------------------------------------------------------------------------ on the other side


def _serve() -> None:
    """Reads names of folders and says so on stdout when what they ask for is done."""
    done = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no answer

    gc.disable()
    import torch._dynamo  # noqa: F401

    _warm_up()
    # All of this stays: no collection, here or in a child, need look at its million objects, or make a child copy their memory.
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        _carry_out(line.rstrip("\n"))
        os.write(done, b"done\n")


def _carry_out(folder: str) -> None:
    answers = os.path.join(folder, _ANSWERS)
    with open(os.path.join(folder, _WHAT), "rb") as file:
        worker, names, payload = pickle.load(file)
    while names:
        child = os.fork()
        if child == 0:
            log = os.open(os.path.join(folder, _LOG), os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "cache")
            _renew_threads()
            _work(worker, payload, names, answers)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = _read(answers)
        rest = [name for name in names if name not in done]
        if rest and (len(rest) == len(names) or status != 0):  # the child died inside a check
            _write(answers, rest[0], f"{_DEAD} with status {status}")
            rest = rest[1:]
        names = rest


def _renew_threads() -> None:
    """torch's pool of threads does not survive a fork and is made anew when it is next set: now, by one thread. Of the threads by which a
    CUDA build differentiates one would find it half made, and abort the process.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _work(worker: str, payload: bytes, names: Sequence[str], answers: str) -> None:
    try:  # here and not before the fork: tensors on a GPU do not survive one
        function, what = resolve(worker), pickle.loads(payload)
    except BaseException as error:
        for name in names:
            _write(answers, name, f"{type(error).__name__}: {error}")
        return
    for name in names:
        try:
            answer = function(what, name)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        _write(answers, name, answer)
        if answer is not None:
            return


def _write(answers: str, name: str, answer: Any) -> None:
    with open(answers, "a", encoding="utf-8") as file:
        file.write(json.dumps([name, answer]) + "\n")


def _warm_up() -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    fn = torch.func.grad(lambda x: x.sin().sum())
    if torch.version.cuda is not None:  # there a backward starts threads of autograd, one per kind of device
        fn = torch.sin
    f = torch.compile(fn, backend="aot_eager", fullgraph=True)
    f(torch.ones(2))
    torch._dynamo.reset()


if __name__ == "__main__":
    _serve()
