"""DeepSpeed's engine around a pure loss: optimiser states, gradients and parameters in parts on the processes (ZeRO 1 to 3).

    engine = distributed.engine(loss, params, {"zero_optimization": {"stage": 3}, "optimizer": {...}})
    for batch in batches:
        value = engine.step(part of the batch)      loss, gradient, exchange and update
    params = engine.params()                        whole, as a tree

Inside the loss everything works as elsewhere, torch.func and kernels included: DeepSpeed differentiates it by plain reverse mode.
Parts of a sequence are parts of a batch to it (`sequence`, with a mean over tokens of this part).

Source: Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import KernelUnavailable, check, kind_of

ADAMW = {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}}


class _Shell(torch.nn.Module):
    """What DeepSpeed wants: a module that holds the parameters and computes the loss."""

    def __init__(self, loss: Callable, params: Any):
        super().__init__()
        self.loss, self.like = loss, params
        flat = tree.to_flat(params)
        self.names = {name: name.replace(".", "/") for name in flat if tree.is_differentiable(flat[name])}
        # DeepSpeed writes into them; the tree that the caller holds stays as it is.
        self.leaves = torch.nn.ParameterDict({key: torch.nn.Parameter(flat[name].detach().clone()) for name, key in self.names.items()})
        self.constants = {name: leaf for name, leaf in flat.items() if name not in self.names}

    def tree(self) -> Any:
        """The parameters in the places that they have in the tree."""
        return tree.from_flat({**self.constants, **{name: self.leaves[key] for name, key in self.names.items()}}, self.like)

    def forward(self, *batch: Any) -> Tensor:
        return self.loss(self.tree(), *batch)


class Engine:
    """What `engine` returns. deepspeed: DeepSpeed's own engine, for its checkpoints and everything else that it has."""

    def __init__(self, deepspeed: Any, shell: _Shell):
        self.deepspeed = deepspeed
        self._shell = shell

    def step(self, *batch: Any) -> Tensor:
        """Loss, gradient and, when as many parts as the config accumulates are together, an update. Returns this process's loss."""
        value = self.deepspeed(*batch)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
            raise ValueError(f"Engine.step: the loss must be a 0-d tensor of floats; got {got}.\n  Reduce it, for example with .mean().")
        self.deepspeed.backward(value)
        self.deepspeed.step()
        return value.detach()

    def params(self) -> Any:
        """The parameters as a tree of whole tensors, a copy: to be called by all processes together."""
        whole = _package().zero.GatheredParameters
        with whole(list(self._shell.parameters())), torch.no_grad():
            return tree.map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, self._shell.tree())


def engine(loss: Callable[..., Tensor], params: Any, config: Mapping[str, Any] | None = None) -> Engine:
    """DeepSpeed's engine around loss(params, *batch) -> 0-d tensor.

    Args:
        loss: a pure function; the mean over this process's part of the batch. DeepSpeed averages over processes.
        params: a tree, the same on every process. It is copied; leaves that are not floating stay as they are.
        config: DeepSpeed's own, see its documentation; default: AdamW at a rate of 3e-4 without ZeRO. Where it names no size of
            batch, a step is one call of `Engine.step`.
    Raises:
        KernelUnavailable: DeepSpeed is not installed. ValueError: no process group.

    Only plain reverse mode: for torch.func over the training step itself use `value_and_grad` of this package.
    """
    dist = torch.distributed
    ready = dist.is_available() and dist.is_initialized() and "LOCAL_RANK" in os.environ
    check(ready, "distributed.engine: expected a process group of torch.distributed, and LOCAL_RANK in the environment.",
          remedy='Start the program with torchrun and call torch.distributed.init_process_group("gloo") first, or "nccl" on GPUs.')
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"distributed.engine: config must be a mapping; got {kind_of(config)}.\n  Load the JSON file first: json.load.")
    deepspeed = _package()
    chosen = copy.deepcopy(dict(config or {}))
    if not any(name in chosen for name in ("train_batch_size", "train_micro_batch_size_per_gpu")):
        chosen["train_micro_batch_size_per_gpu"] = 1
    chosen.setdefault("optimizer", copy.deepcopy(ADAMW))
    shell = _Shell(loss, params)
    made, *_ = deepspeed.initialize(model=shell, model_parameters=list(shell.parameters()), config=chosen)
    return Engine(made, shell)


def _package() -> Any:
    try:
        import deepspeed
    except Exception as error:  # it looks for accelerators and compilers when it is imported: much can go wrong
        text = " ".join(str(error).split())[:200]
        raise KernelUnavailable(f"distributed.engine: DeepSpeed cannot be imported ({type(error).__name__}: {text}).\n"
                                f"  pip install deepspeed==0.19.8, or use fnattn.distributed.value_and_grad.") from error
    if not torch.cuda.is_available():
        # A faster sum for processes of one machine, which it would compile first: two minutes, and an error without ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
