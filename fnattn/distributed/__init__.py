"""More processes than one, as pure functions: what they exchange, averaged gradients, spread sequences and heads, DeepSpeed.

    collectives     all_gather, reduce_scatter, all_to_all, all_reduce, broadcast: every derivative, vmap, torch.compile
    data_parallel   shard, value_and_grad, mean, total: every process a part of the batch
    sequence        a family around taylor or gate_loop: every process a part of the sequence, through states that combine
    heads           over_heads: every process some of the heads, for any operator
    zero            DeepSpeed's ZeRO stages around a pure loss function

A process group is made as always: torchrun, then torch.distributed.init_process_group.
"""

from .collectives import all_gather, all_reduce, all_to_all, rank, reduce_scatter, world_size
from .data_parallel import broadcast, mean, shard, total, value_and_grad
from .heads import over_heads, to_heads, to_positions
from .zero import Engine, engine

__all__ = ["Engine", "all_gather", "all_reduce", "all_to_all", "broadcast", "engine", "mean", "over_heads", "rank", "reduce_scatter",
           "shard", "to_heads", "to_positions", "total", "value_and_grad", "world_size"]
