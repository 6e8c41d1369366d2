"""Text as bytes: what to read, how it is split, and batches that depend on nothing but a key and a step.

The default text is on every machine: the sources of Python's own standard library.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import random
from .core import check

VALID_EVERY = 10  # one file of so many is for validation; of a single file, the last tenth


class Text(NamedTuple):
    """Bytes to learn from and bytes to measure on.

    train, valid: uint8 tensors. source: what they are, for people. files: how many files were read.
    """

    train: Tensor  # [bytes]
    valid: Tensor  # [bytes]
    source: str
    files: int


def load(path: str | Path | None = None) -> Text:
    """The text of a file, of all files in a folder and its subfolders, or (None) of the standard library's sources.

    A folder is split by file: in alphabetical order every tenth file is for validation. Of a single file the last tenth is.
    Folders skip what is hidden, what is empty, and what does not read as UTF-8; the standard library is read without
    _sysconfigdata*, which are no sources but tables made on each machine.

    Raises:
        FileNotFoundError: nothing there. ValueError: nothing in it to learn from.
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted((p for p in folder.glob("*.py") if not p.name.startswith("_sysconfigdata")), key=lambda p: p.name)
        check(bool(files), "data.load: expected the standard library's sources in {}; got no .py files.", folder,
              remedy="This Python comes without them; name a file or folder of text.")
        return _split(folder, files, f"the sources of Python's standard library ({len(files)} files)")
    path = Path(path)
    if path.is_file():
        text = path.read_bytes()
        check(bool(text), "data.load: expected text in {}; got an empty file.", path, remedy="Name a file with something in it.")
        return _cut(text, str(path))
    if path.is_dir():
        files = sorted((p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))),
                       key=lambda p: p.relative_to(path).as_posix())
        return _split(path, files, str(path))
    raise FileNotFoundError(f"data.load: expected a file or folder; got {path}, where there is nothing.\n"
                            f"  Check the name, or leave it out to use the standard library's sources.")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _split(folder: Path, files: Sequence[Path], source: str) -> Text:
    texts = {file.relative_to(folder).as_posix(): text for file in files if (text := _read(file))}
    check(bool(texts), "data.load: expected text in {}; got {} files, none of them text.", source, len(files),
          remedy="Name a folder with UTF-8 files in it.")
    if len(texts) == 1:
        return _cut(*texts.values(), source)
    # A folder of fewer than ten files holds out its last one.
    held = set(list(texts)[VALID_EVERY - 1::VALID_EVERY] or list(texts)[-1:])
    return Text(_tensor(b"".join(text for name, text in texts.items() if name not in held)),
                _tensor(b"".join(text for name, text in texts.items() if name in held)), source, len(texts))


def _cut(text: bytes, source: str) -> Text:
    at = len(text) - len(text) // VALID_EVERY
    return Text(_tensor(text[:at]), _tensor(text[at:]), source, 1)


def _read(file: Path) -> bytes:
    text = file.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        return b""
    return text


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)


def batch(text: Tensor, key: Tensor, step: int | Tensor, size: int, length: int) -> Tensor:
    """Random windows of a text, the same for the same key and step.

    Args:
        text: uint8 [bytes].
        key: for the whole training; step: number of the batch. Nothing else is remembered between batches.
        size: number of windows; length: bytes in each.
    Returns:
        int64 [size, length]. Maps over keys.
    """
    check_length("data.batch", text, length)
    # float64 holds 52 random bits: enough for any text, where randint ends at 2^31.
    part = random.uniform(random.fold_in(key, step), (size,), torch.float64)
    starts = (part * (text.shape[0] - length + 1)).long()
    return text[starts.unsqueeze(1) + torch.arange(length, device=text.device)].long()


def windows(text: Tensor, length: int, count: int) -> Tensor:
    """Evenly spaced windows of a text, always the same: int64 [at most count, length]. They overlap only if they must."""
    check_length("data.windows", text, length)
    count = max(1, min(count, text.shape[0] // length))
    starts = [i * (text.shape[0] - length) // max(1, count - 1) for i in range(count)]
    return text[torch.tensor(starts).unsqueeze(1) + torch.arange(length)].long()


def check_length(who: str, text: Tensor, length: int, what: str = "the text") -> None:
    """The text must have at least `length` bytes."""
    check(text.shape[0] >= length, "{}: {} must have at least {} bytes, one window; got {}.", who, what, length, text.shape[0],
          remedy="Use shorter windows or more text.")


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of a string: int64 [bytes]."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def decode(ids: Tensor) -> str:
    """The string of UTF-8 bytes [n]; what is not UTF-8 becomes the replacement character."""
    return bytes(ids.tolist()).decode(errors="replace")
