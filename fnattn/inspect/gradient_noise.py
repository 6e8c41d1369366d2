"""Gradient noise scale: the batch size up to which a larger batch pays, from the spread of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import check
from ._vectors import dot
from .per_sample import Moments, moments


class NoiseScale(NamedTuple):
    """B = tr(Sigma) / |G|^2, with both parts estimated without bias; 0-d tensors. A noisy |G|^2 may come out below 0."""

    scale: Tensor        # the simple noise scale, in samples; infinite where the signal is not above 0
    trace: Tensor        # tr(Sigma): variance of one sample's gradient, summed over parameters
    signal: Tensor       # |G|^2: squared norm of the true gradient


def noise_scale(loss: Callable, params: Any, batch: Any, *, chunk_size: int = 16) -> NoiseScale:
    """The simple gradient noise scale from the per-sample gradients of one batch of b >= 2 samples.

        tr(Sigma) = sum of unbiased variances        |G|^2 = |mean|^2 - tr(Sigma) / b        B = tr(Sigma) / |G|^2

    Training with batches far below B wastes no samples; far above, it wastes most of them. Time of b gradients; memory of
    chunk_size. Source: McCandlish et al. 2018, arXiv 1812.06162, equations 2.9 and A.2.
    """
    return noise_scale_from_moments(moments(loss, params, batch, chunk_size=chunk_size))


def noise_scale_from_moments(found: Moments) -> NoiseScale:
    """The same from moments that are there already."""
    check(found.count >= 2, "inspect.noise_scale: expected at least 2 samples; got {}.", found.count, remedy="Use a larger batch.")
    trace = found.count / (found.count - 1) * (found.mean_square - dot(found.mean, found.mean))
    return _scale(trace, dot(found.mean, found.mean) - trace / found.count)


def noise_scale_from_norms(small: float | Tensor, small_size: int, big: float | Tensor, big_size: int) -> NoiseScale:
    """The same from the squared norms of gradients of two batch sizes, as a data-parallel training has them for free.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)        tr(Sigma) = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
    """
    check(big_size > small_size >= 1, "inspect.noise_scale_from_norms: expected small_size < big_size; got {} and {}.",
          small_size, big_size, remedy="Give the squared norm of the larger batch last.")
    small, big = torch.as_tensor(small), torch.as_tensor(big)
    return _scale((small - big) / (1 / small_size - 1 / big_size), (big_size * big - small_size * small) / (big_size - small_size))


def _scale(trace: Tensor, signal: Tensor) -> NoiseScale:
    return NoiseScale(torch.where(signal > 0, trace / signal, torch.inf), trace, signal)
