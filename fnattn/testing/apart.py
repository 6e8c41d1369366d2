"""Runs checks in a separate process, where a failure cannot spoil later ones.

A failure of torch.compile inside a torch.func transform leaves the process's stack of transform levels dirty, and
correct eager calls made afterwards fail. One fresh interpreter imports torch once and forks a child for the checks; a
child that meets a failure reports it and ends, and the next one goes on with the remaining checks from a clean start.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
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
    with tempfile.TemporaryDirectory(prefix="fnattn-check-") as folder:
        source, answers = os.path.join(folder, "what"), os.path.join(folder, "answers")
        with open(source, "wb") as file:
            pickle.dump((worker, list(names), payload), file)
        environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=os.path.join(folder, "cache"), PYTHONWARNINGS="ignore",
                           PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path))
        log = os.path.join(folder, "log")
        with open(log, "wb") as stderr:
            process = subprocess.Popen([sys.executable, "-m", "fnattn.testing.apart", source, answers], env=environment,
                                       stdout=stderr, stderr=stderr, stdin=subprocess.DEVNULL)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        found = _read(answers)
        with open(log, encoding="utf-8", errors="replace") as file:
            last = "".join(file.readlines()[-3:]).strip()
        for name in names:
            yield name, found.get(name, f"{_SILENT}: {last[-400:]}")


def _read(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.loads(line) for line in file if line.endswith("\n"))


def _serve(source: str, answers: str) -> None:
    with open(source, "rb") as file:
        worker, names, payload = pickle.load(file)
    import torch._dynamo  # noqa: F401

    _warm_up()
    function = resolve(worker)
    while names:
        child = os.fork()
        if child == 0:
            _work(function, payload, names, answers)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = _read(answers)
        rest = [name for name in names if name not in done]
        if rest and (len(rest) == len(names) or status != 0):  # the child died inside a check
            _write(answers, rest[0], f"{_DEAD} with status {status}")
            rest = rest[1:]
        names = rest


def _work(function: Callable, payload: bytes, names: Sequence[str], answers: str) -> None:
    what = pickle.loads(payload)  # here and not before the fork: tensors on a GPU do not survive one
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
    _serve(sys.argv[1], sys.argv[2])
