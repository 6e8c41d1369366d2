"""Generation through the explicit state: read the prompt once, then one token at a time.

    logits, state = lm.apply(params, prompt, state)
    token         = sample(fold_in(key, i), logits[:, -1])
    logits, state = lm.apply(params, token, state)          and so on

Guidance reads two prompts, each through a state of its own, and draws from logits that lie beyond those of the first, away from
those of the second; the token drawn goes to both.

Everything is a pure function of its arguments, so an ensemble generates under `tree.vmap` over params and keys.

Source of guidance: Ho & Salimans 2022, arXiv 2207.12598; for tokens as in dalle-pytorch 1.6.6, forward_with_cond_scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import random
from ..core import check
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


def guide(conditional: Tensor, null: Tensor, cond_scale: float | Tensor) -> Tensor:
    """Logits under classifier-free guidance, from those with a condition and those without it.

        null + (conditional - null) * cond_scale

    Args:
        conditional, null: [..., v], logits for the same position, each from a state of its own.
        cond_scale: 1 gives conditional, 0 gives null; above 1 the condition counts more than it does by itself.
    Returns:
        [..., v] in their dtype. Differentiable in all three.
    """
    check(conditional.shape == null.shape, "generate.guide: conditional and null must have one shape; got {} and {}.",
          list(conditional.shape), list(null.shape), remedy="Take both at the same position: logits[:, -1].")
    return null + (conditional - null) * cond_scale


def prefill(params: lm.Params, prompt: Tensor, *, capacity: int, impl: str = "auto") -> tuple[Tensor, lm.State]:
    """Reads a prompt [b, n]: the logits [b, v] for the token after it, and the state with room for `capacity` tokens in all."""
    check(prompt.ndim == 2 and prompt.shape[1] >= 1, "generate.prefill: prompt must be [batch, at least 1]; got {}.",
          list(prompt.shape), remedy="Start with at least one token, for example a newline.")
    check(capacity >= prompt.shape[1], "generate.prefill: the state must have room for the prompt of {} tokens; got capacity={}.",
          prompt.shape[1], capacity, remedy="Use a capacity of prompt and new tokens together.")
    logits, state = lm.apply(params, prompt, lm.init_state(params, prompt.shape[0], capacity=capacity), impl=impl)
    return logits[:, -1], state


def stream(params: lm.Params, prompt: Tensor, steps: int, *, key: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0,
           top_p: float | Tensor = 1.0, capacity: int | None = None, impl: str = "auto", null_prompt: Tensor | None = None,
           cond_scale: float | Tensor = 1.0) -> Iterator[Tensor]:
    """Yields `steps` tokens after a prompt, each int64 [b], as soon as it is known.

    Args:
        params: of a `models.lm`. prompt: int64 [b, n], n >= 1.
        key: token i is drawn with fold_in(key, i), so fewer steps give a prefix of the same text.
        temperature, top_k, top_p: see `sample`.
        capacity: tokens that the state has room for; by default prompt and steps. What the last draw needs is one less.
        null_prompt: int64 [b, m], m >= 1: the prompt without its condition, for guidance, read into a second state. Both go on with
            the tokens drawn.
        cond_scale: guidance, see `guide`; needs null_prompt unless it is 1, which is none and costs nothing.
    Gradients do not flow: tokens are discrete.
    """
    check(steps >= 0, "generate.stream: steps must be at least 0; got {}.", steps, remedy="Count the new tokens.")
    _check_options("generate.stream", temperature, top_k, top_p)
    guided = isinstance(cond_scale, Tensor) or cond_scale != 1.0
    check(null_prompt is not None or not guided, "generate.stream: null_prompt must be given for cond_scale={}; got None.",
          cond_scale, remedy="Give the prompt without its condition, or leave cond_scale at 1.")
    check(null_prompt is None or null_prompt.ndim == 2 and null_prompt.shape[0] == prompt.shape[0],
          "generate.stream: null_prompt must be [{}, at least 1] (batch of prompt); got {}.", prompt.shape[0],
          None if null_prompt is None else list(null_prompt.shape), remedy="One row for each prompt: null_prompt.expand(batch, -1).")
    prompts = (prompt, null_prompt) if guided else (prompt,)
    longest = max(p.shape[-1] for p in prompts)
    needed = longest + max(steps - 1, 0)
    room = needed if capacity is None else capacity
    check(room >= needed, "generate.stream: the state must have room for {} tokens, {} of the prompt and {} new ones; got "
          "capacity={}.", needed, longest, needed - longest, room,
          remedy="Use a larger capacity, or fewer tokens.")
    return _stream(params, prompts, steps, key, room, impl, cond_scale, dict(temperature=temperature, top_k=top_k, top_p=top_p))


def _stream(params: lm.Params, prompts: tuple[Tensor, ...], steps: int, key: Tensor, capacity: int, impl: str,
            cond_scale: float | Tensor, options: dict) -> Iterator[Tensor]:
    # The reading of the caller's code between two tokens must not happen with gradients off: only each step does.
    branches: list = []  # logits and state after each prompt
    token = prompts[0]
    for i in range(steps):
        with torch.no_grad():
            if not branches:
                branches = [prefill(params, prompt, capacity=capacity, impl=impl) for prompt in prompts]
            else:
                branches = [lm.apply(params, token.unsqueeze(1), state, impl=impl) for _, state in branches]
                branches = [(logits[:, -1], state) for logits, state in branches]
            logits = branches[0][0] if len(branches) == 1 else guide(branches[0][0], branches[1][0], cond_scale)
            # The largest logit needs no key of its own, which costs as much as a small model's step.
            token = sample(key if _greedy(options["temperature"]) else random.fold_in(key, i), logits, **options)
        yield token


def generate(params: lm.Params, prompt: Tensor, steps: int, *, key: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0,
             top_p: float | Tensor = 1.0, capacity: int | None = None, impl: str = "auto", null_prompt: Tensor | None = None,
             cond_scale: float | Tensor = 1.0) -> Tensor:
    """The tokens of `stream` at once: int64 [b, steps]. Arguments as there.

    For an ensemble: tree.vmap(lambda p, k: generate(p, prompt, steps, key=k))(stacked_params, keys).
    """
    tokens = list(stream(params, prompt, steps, key=key, temperature=temperature, top_k=top_k, top_p=top_p, capacity=capacity,
                         impl=impl, null_prompt=null_prompt, cond_scale=cond_scale))
    return torch.stack(tokens, 1) if tokens else prompt.new_zeros(prompt.shape[0], 0)


def _check_options(who: str, temperature: float | Tensor, top_k: int, top_p: float | Tensor) -> None:
    check(isinstance(temperature, Tensor) or temperature >= 0, "{}: temperature must be at least 0; got {}.", who, temperature,
          remedy="0 takes the most probable token.")
    check(top_k >= 0, "{}: top_k must be at least 0; got {}.", who, top_k, remedy="0 keeps all tokens.")
    check(isinstance(top_p, Tensor) or 0 < top_p <= 1, "{}: top_p must lie in (0, 1]; got {}.", who, top_p,
          remedy="1 keeps all tokens.")
