"""What models of pictures take."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import check, check_floating, kind_of


def check_images(who: str, images: Any, channels: int, size: int, like: Tensor) -> None:
    """images must be a floating [batch, channels, size, size] tensor in the dtype of the weight `like`."""
    check(isinstance(images, Tensor), "{}: images must be a tensor; got {}.", who, kind_of(images),
          remedy="Convert them: torch.as_tensor(images).", error=TypeError)
    check(images.ndim == 4 and list(images.shape[1:]) == [channels, size, size], "{}: images must be [batch, {}, {}, {}]; got {}.", who,
          channels, size, size, list(images.shape), remedy="Resize the images, or build the Config with their size.")
    check_floating(who, "images", images, like, "Bytes become numbers from 0 to 1 with images / 255.")
