"""Generation through the explicit state: read the prompt once, then one token at a time.

    logits, state = lm.apply(params, prompt, state)
    token         = sample(fold_in(key, i), logits[:, -1])
    logits, state = lm.apply(params, token, state)          and so on

Everything is a pure function of its arguments, so an ensemble generates under `tree.vmap` over params and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import random
from ..core import EMPTY, Empty, check
from . import lm

# b sequences, n tokens of the prompt, v vocabulary


def sample(key: Tensor, logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int = 0,
           top_p: float | Tensor = 1.0) -> Tensor:
    """Draws a token from each row of logits.

    Args:
        key: one draw's key.
        logits: [..., v].
        temperature: divides the logits; the number 0 takes the largest.
        top_k: only the k largest logits count; 0 for all. Ties with the k-th count too.
        top_p: only the most probable tokens that together reach this probability count, at least one.
    Returns:
        int64 [...].
    """
    check(logits.ndim >= 1, "generate.sample: logits must be [..., vocabulary]; got {}.", list(logits.shape),
          remedy="Give one row of logits per draw.")
    _check_options("generate.sample", temperature, top_k, top_p)
    if _greedy(temperature):
        return logits.argmax(-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
    if isinstance(top_p, Tensor) or top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        chance = ordered.softmax(-1)
        before = chance.cumsum(-1) - chance
        # A token counts while the ones before it have not reached top_p; the first, with exactly 0 before it, always does.
        outside = (before >= top_p) & (before > 0)
        scores = scores.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    return random.categorical(key, scores)


def _greedy(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 0


def prefill(params: lm.Params, prompt: Tensor, *, capacity: int, impl: str = "auto") -> tuple[Tensor, lm.State]:
    """Reads a prompt [b, n]: the logits [b, v] for the token after it, and the state with room for `capacity` tokens in all."""
    check(prompt.ndim == 2 and prompt.shape[1] >= 1, "generate.prefill: prompt must be [batch, at least 1]; got {}.",
          list(prompt.shape), remedy="Start with at least one token, for example a newline.")
    check(capacity >= prompt.shape[1], "generate.prefill: the state must have room for the prompt of {} tokens; got capacity={}.",
          prompt.shape[1], capacity, remedy="Use a capacity of prompt and new tokens together.")
    logits, state = lm.apply(params, prompt, lm.init_state(params, prompt.shape[0], capacity=capacity), impl=impl)
    return logits[:, -1], state


def stream(params: lm.Params, prompt: Tensor, steps: int, *, key: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0,
           top_p: float | Tensor = 1.0, capacity: int | None = None, impl: str = "auto") -> Iterator[Tensor]:
    """Yields `steps` tokens after a prompt, each int64 [b], as soon as it is known.

    Args:
        params: of a `models.lm`. prompt: int64 [b, n], n >= 1.
        key: token i is drawn with fold_in(key, i), so fewer steps give a prefix of the same text.
        temperature, top_k, top_p: see `sample`.
        capacity: tokens that the state has room for; by default prompt and steps. What the last draw needs is one less.
    Gradients do not flow: tokens are discrete.
    """
    check(steps >= 0, "generate.stream: steps must be at least 0; got {}.", steps, remedy="Count the new tokens.")
    _check_options("generate.stream", temperature, top_k, top_p)
    needed = prompt.shape[-1] + max(steps - 1, 0)
    room = needed if capacity is None else capacity
    check(room >= needed, "generate.stream: the state must have room for {} tokens, {} of the prompt and {} new ones; got "
          "capacity={}.", needed, prompt.shape[-1], needed - prompt.shape[-1], room,
          remedy="Use a larger capacity, or fewer tokens.")
    return _stream(params, prompt, steps, key, room, impl, dict(temperature=temperature, top_k=top_k, top_p=top_p))


def _stream(params: lm.Params, prompt: Tensor, steps: int, key: Tensor, capacity: int, impl: str,
            options: dict) -> Iterator[Tensor]:
    # The reading of the caller's code between two tokens must not happen with gradients off: only each step does.
    state: Any = EMPTY
    token = prompt
    for i in range(steps):
        with torch.no_grad():
            if isinstance(state, Empty):
                logits, state = prefill(params, prompt, capacity=capacity, impl=impl)
            else:
                logits, state = lm.apply(params, token.unsqueeze(1), state, impl=impl)
                logits = logits[:, -1]
            # The largest logit needs no key of its own, which costs as much as a small model's step.
            token = sample(key if _greedy(options["temperature"]) else random.fold_in(key, i), logits, **options)
        yield token


def generate(params: lm.Params, prompt: Tensor, steps: int, *, key: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0,
             top_p: float | Tensor = 1.0, capacity: int | None = None, impl: str = "auto") -> Tensor:
    """The tokens of `stream` at once: int64 [b, steps]. Arguments as there.

    For an ensemble: tree.vmap(lambda p, k: generate(p, prompt, steps, key=k))(stacked_params, keys).
    """
    tokens = list(stream(params, prompt, steps, key=key, temperature=temperature, top_k=top_k, top_p=top_p, capacity=capacity,
                         impl=impl))
    return torch.stack(tokens, 1) if tokens else prompt.new_zeros(prompt.shape[0], 0)


def _check_options(who: str, temperature: float | Tensor, top_k: int, top_p: float | Tensor) -> None:
    check(isinstance(temperature, Tensor) or temperature >= 0, "{}: temperature must be at least 0; got {}.", who, temperature,
          remedy="0 takes the most probable token.")
    check(top_k >= 0, "{}: top_k must be at least 0; got {}.", who, top_k, remedy="0 keeps all tokens.")
    check(isinstance(top_p, Tensor) or 0 < top_p <= 1, "{}: top_p must lie in (0, 1]; got {}.", who, top_p,
          remedy="1 keeps all tokens.")
