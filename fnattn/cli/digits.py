"""scikit-learn's digits as texts and token pictures: 1797 handwritten digits of 8 x 8 pixels in 17 grey levels.

A picture is 64 tokens, one per pixel, row by row; its text is the digit's name, one token per letter. A classifier trained on
real pixels judges which digit a drawn picture shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import KernelUnavailable, check

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, LEVELS = 8, 17
LETTERS = 27                                  # 0 is padding, then a to z
TEXT_LEN = max(len(name) for name in NAMES)
HELD_OUT = 297                                # the last pictures of the set, by other writers than the first


class Digits(NamedTuple):
    """images int64 [m, 64] in [0, 17); labels int64 [m]."""

    images: Tensor
    labels: Tensor


def _sklearn(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise KernelUnavailable("digits: scikit-learn, which brings the pictures and the classifier, is not installed.\n"
                                "  pip install fnattn[images]") from None


def load() -> tuple[Digits, Digits]:
    """Training and held-out pictures."""
    found = _sklearn("datasets").load_digits()
    images = torch.tensor(found.images, dtype=torch.int64).flatten(1)
    labels = torch.tensor(found.target, dtype=torch.int64)
    return Digits(images[:-HELD_OUT], labels[:-HELD_OUT]), Digits(images[-HELD_OUT:], labels[-HELD_OUT:])


def encode(names: list[str]) -> Tensor:
    """Texts as tokens: int64 [len(names), 5], 0 after the end.

    Raises:
        ValueError: a name is no digit's.
    """
    rows = []
    for name in names:
        name = NAMES[int(name)] if name.isdigit() and len(name) == 1 else name.strip().lower()
        check(name in NAMES, "digits: expected the name of a digit; got {!r}.", name, remedy="One of: " + ", ".join(NAMES) + ".")
        rows.append([ord(letter) - ord("a") + 1 for letter in name] + [0] * (TEXT_LEN - len(name)))
    return torch.tensor(rows, dtype=torch.int64)


def texts(labels: Tensor) -> Tensor:
    """The texts of these labels: int64 [m, 5]."""
    return encode(list(NAMES))[labels]


class Judge(NamedTuple):
    """A support vector machine on real pictures, and how often it is right on held-out ones."""

    machine: Any
    accuracy: float

    def __call__(self, images: Tensor) -> Tensor:
        """The digit that each picture [m, 64] shows: int64 [m]."""
        return torch.from_numpy(self.machine.predict(images.numpy().astype("float64"))).long()


def judge(train: Digits, held_out: Digits) -> Judge:
    """A classifier for drawn pictures. scikit-learn's, not ours: it should know nothing of what it judges."""
    machine = _sklearn("svm").SVC(gamma=0.001).fit(train.images.numpy().astype("float64"), train.labels.numpy())
    found = Judge(machine, 0.0)
    return found._replace(accuracy=float((found(held_out.images) == held_out.labels).float().mean()))


def grid(images: Tensor, columns: int, scale: int = 6, gap: int = 1) -> bytes:
    """A PNG of pictures [m, 64] in rows of `columns`, dark ink on white."""
    import io

    import numpy as np
    from matplotlib.image import imsave

    rows = -(-len(images) // columns)
    cell = SIDE + gap
    canvas = np.zeros((rows * cell + gap, columns * cell + gap))
    for i, image in enumerate(images.reshape(-1, SIDE, SIDE).tolist()):
        top, left = (i // columns) * cell + gap, (i % columns) * cell + gap
        canvas[top:top + SIDE, left:left + SIDE] = image
    canvas = canvas.repeat(scale, 0).repeat(scale, 1)
    out = io.BytesIO()
    imsave(out, canvas, cmap="gray_r", vmin=0, vmax=LEVELS - 1, format="png")
    return out.getvalue()
