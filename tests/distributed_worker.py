"""What each of some processes does with fnattn.distributed, and what one process finds for all of them; see distributed/."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fnattn import distributed, ops, random, tree
from fnattn.attentions import gate_loop, taylor
from fnattn.models import lm
from fnattn.testing import check_family

F64 = torch.float64
PATIENCE = 30  # seconds that a process waits for another
Found = dict[str, float]  # what was compared -> largest error, as a part of the largest entry


def work(rank: int, world: int, folder: str, names: tuple[str, ...]) -> None:
    """Writes what each check found on this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))  # as torchrun does
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE))
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name](rank, world)
        except Exception:
            found[name] = traceback.format_exc()
        Path(folder, f"found{rank}.json").write_text(json.dumps(found))
        if isinstance(found[name], str):
            return  # the others may wait for this process: nothing after this can be relied on
    dist.barrier()
    dist.destroy_process_group()


def error(got: Tensor, true: Tensor) -> float:
    """Of entries that are all 0 it is how large they are; `collective` says where those are expected."""
    assert got.shape == true.shape, (got.shape, true.shape)
    return float((got - true).abs().max() / (true.abs().max() or 1.0))


def errors(got: object, true: object) -> float:
    got, true = tree.leaves(got), tree.leaves(true)
    assert len(got) == len(true) > 0
    pairs = [(a, b) for a, b in zip(got, true) if tree.is_differentiable(b)]
    assert any(float(b.abs().max()) > 0 for _, b in pairs), "nothing to compare"
    return max(error(a, b) for a, b in pairs)


def normal(name: str, *shape: int) -> Tensor:
    return random.normal(random.fold_in(random.key(5), name), shape, F64)


# ------------------------------------------------------------------------------------------------ collectives

# name -> (on one process, what all get from what all bring, shape of x for so many processes)
COLLECTIVES: dict[str, tuple[Callable, Callable, Callable]] = {
    "all_gather": (lambda x: distributed.all_gather(x, 1), lambda xs: [torch.cat(xs, 1)] * len(xs), lambda w: (2, 3, 2)),
    "reduce_scatter": (lambda x: distributed.reduce_scatter(x, -1), lambda xs: list(sum(xs).chunk(len(xs), -1)), lambda w: (2, 3 * w)),
    "all_to_all": (lambda x: distributed.all_to_all(x, 0, 2),
                   lambda xs: [torch.cat([x.chunk(len(xs), 0)[r] for x in xs], 2) for r in range(len(xs))], lambda w: (2 * w, 3, 2)),
    "all_reduce": (distributed.all_reduce, lambda xs: [sum(xs)] * len(xs), lambda w: (2, 3)),
    "broadcast": (lambda x: distributed.broadcast(x, 1), lambda xs: [xs[1]] * len(xs), lambda w: (3,)),
    "heads": (lambda x: distributed.over_heads(lambda q: q.cumsum(2))(x),
              lambda xs: list(torch.cat(xs, 2).cumsum(2).chunk(len(xs), 2)), lambda w: (1, w, 2, 3)),
}


def collective(name: str, rank: int, world: int) -> Found:
    """Every transform of one exchange, inside something that is not linear."""
    fn, together, shape = COLLECTIVES[name]
    xs, vs = (tuple(normal(f"{name} {kind} {r}", 3, *shape(world)) for r in range(world)) for kind in ("x", "v"))
    x, v = xs[rank], vs[rank]

    def local(x: Tensor) -> Tensor:
        return (fn(x) * (rank + 1.5)).sin().sum()

    def total(*xs: Tensor) -> Tensor:
        return sum((out * (r + 1.5)).sin().sum() for r, out in enumerate(together(xs)))

    every = tuple(range(world))
    grad, grad_all = torch.func.grad(local), torch.func.grad(total, every)
    one, ones, along = x[0], tuple(t[0] for t in xs), tuple(t[0] for t in vs)

    def norm(x: Tensor) -> Tensor:
        return grad(x).square().sum()

    def norm_all(*xs: Tensor) -> Tensor:
        return sum(g.square().sum() for g in grad_all(*xs))

    leaf = one.clone().requires_grad_()
    local(leaf).backward()
    twice = torch.func.jvp(lambda x: torch.func.jvp(local, (x,), (v[0],))[1], (one,), (v[0],))[1]
    seconds = torch.func.jvp(lambda *xs: torch.func.jvp(total, xs, along)[1], ones, along)[1]
    # What only process 1 sends does not depend on the others.
    assert (name == "broadcast" and rank != 1) != any(float(g.abs().max()) > 0 for g in (grad_all(*ones)[rank], leaf.grad))
    return {
        "value": error(fn(one), together(ones)[rank]),
        "vmap": error(torch.vmap(fn)(x), torch.stack([together(tuple(t[i] for t in xs))[rank] for i in range(3)])),
        "backward": error(leaf.grad, grad_all(*ones)[rank]),
        "grad": error(grad(one), grad_all(*ones)[rank]),
        "vmap(grad)": error(torch.vmap(grad)(x), torch.vmap(grad_all)(*xs)[rank]),
        "jvp": error(torch.func.jvp(fn, (one,), (v[0],))[1], torch.func.jvp(lambda *xs: together(xs)[rank], ones, along)[1]),
        "jvp(grad)": error(torch.func.jvp(grad, (one,), (v[0],))[1], torch.func.jvp(grad_all, ones, along)[1][rank]),
        "grad(grad)": error(torch.func.grad(norm)(one), torch.func.grad(norm_all, every)(*ones)[rank]),
        # Each process has the tangent of its own term: their sum is the tangent of the sum.
        "jvp(jvp)": error(distributed.all_reduce(twice), seconds),
        "vmap(jvp(grad))": error(torch.vmap(lambda x, v: torch.func.jvp(grad, (x,), (v,))[1])(x, v),
                                 torch.vmap(lambda xs, vs: torch.func.jvp(grad_all, xs, vs)[1])(xs, vs)[rank]),
        "compile(grad)": error(torch.compile(grad, fullgraph=True, backend="aot_eager")(one), grad_all(*ones)[rank]),
        "float32": error(fn(one.float()).double(), together(ones)[rank]),
        "bfloat16": error(fn(one.bfloat16()).double(), together(tuple(t.bfloat16().double() for t in ones))[rank]),
    }


# ------------------------------------------------------------------------------------------------ sequences

TAYLOR = taylor.Config(dim=6, dim_head=2, heads=3, causal=True, shift_tokens=True, rotary_emb=True, prenorm=True)
SPREAD = {
    "taylor": TAYLOR,
    "taylor, plain": taylor.Config(dim=5, dim_head=3, heads=2, causal=True, one_headed_kv=True),
    "gate_loop": gate_loop.Config(dim=4, heads=2, frac_gradient_state_transition=1.0),
    "gate_loop, channels": gate_loop.Config(dim=4, frac_gradient_state_transition=1.0),
}


def sequence(name: str, rank: int, world: int) -> Found:
    """A family around another, against the other on the whole sequence."""
    from fnattn import apply, init, init_state
    from fnattn.distributed import sequence

    cfg, n = sequence.Config(attention=SPREAD[name]), 5
    params = init(random.key(3), cfg, dtype=F64)
    whole, alone = normal("whole", 2, 2 * n * world, cfg.dim), params.attn
    first, second = whole.chunk(2, 1)
    own = slice(rank * n, (rank + 1) * n)
    weights = normal("weights", 2, n * world, cfg.dim)
    found, masks = {}, {}
    if name.startswith("taylor"):
        masks = {"mask": random.bernoulli(random.key(8), 0.6, (2, n * world))}

    def loss(params, x, state):  # of this process, the state after all counted by one
        out, after = apply(params, x[:, own], state, **{k: m[:, own] for k, m in masks.items()})
        after = sum(t.square().sum() for t in tree.leaves(after) if tree.is_differentiable(t))
        return (out * weights[:, own]).sin().sum() + (after if rank == 0 else 0 * after)

    def true(params, x, state):
        out, after = apply(params, x, state, **masks)
        return (out * weights).sin().sum() + sum(t.square().sum() for t in tree.leaves(after) if tree.is_differentiable(t))

    state = init_state(params, 2, capacity=0)
    out, after = apply(params, first[:, own], state)
    expected, between = apply(alone, first, init_state(alone, 2, capacity=0))
    found["value"], found["state"] = error(out, expected[:, own]), errors(after, between)
    found["no state"] = error(apply(params, first[:, own])[0], expected[:, own])
    out, after = apply(params, second[:, own], after)
    expected, last = apply(alone, second, between)
    found["continued"], found["state after both"] = error(out, expected[:, own]), errors(after, last)

    nothing, kept = apply(params, first[:, :0], between)
    assert nothing.shape == (2, 0, cfg.dim) and errors(kept, between) == 0

    value, grads = distributed.value_and_grad(loss, (0, 1, 2))(params, first, between)
    truth, true_grads = tree.value_and_grad(true, (0, 1, 2))(alone, first, between)
    found["loss"] = error(value * world, truth)
    found["gradients of params"] = errors(tree.map(lambda g: g * world, grads[0].attn), true_grads[0])
    found["gradients of x"] = error(grads[1] * world, true_grads[1])
    found["gradients of the state"] = errors(tree.map(lambda g: None if g is None else g * world, grads[2]), true_grads[2])

    along = normal("along", *first.shape)

    def moved(loss, params):
        return torch.func.jvp(lambda x: loss(params, x, between), (first,), (along,))[1]

    def curved(loss, params):
        return torch.func.jvp(torch.func.grad(lambda x: loss(params, x, between)), (first,), (along,))[1]

    found["jvp"] = error(distributed.all_reduce(moved(loss, params)), moved(true, alone))
    found["jvp(grad)"] = error(distributed.all_reduce(curved(loss, params)), curved(true, alone))
    keys = random.split(random.key(4), 3)
    members = torch.vmap(lambda key: init(key, cfg, dtype=F64))(keys)
    some = tree.vmap(tree.grad(loss), (0, None, None))(members, first, between).attn
    expected = tree.vmap(tree.grad(true), (0, None, None))(members.attn, first, between)
    found["vmap(grad) over members"] = errors(distributed.total(some), expected)
    return found


def language_model(rank: int, world: int) -> Found:
    """lm around the family, on windows of one token more than what is spread."""
    from fnattn.distributed import sequence

    kind, n = {"depth": 2, "num_tokens": 11, "remat": True}, 4
    params = lm.init(random.key(0), lm.Config(attention=sequence.Config(attention=TAYLOR), **kind), dtype=F64)
    alone = lm.init(random.key(0), lm.Config(attention=TAYLOR, **kind), dtype=F64)
    ids = random.randint(random.key(1), (2, n * world + 1), 0, 11)
    value, grads = distributed.value_and_grad(lm.loss)(params, ids[:, rank * n:(rank + 1) * n + 1])
    truth, true_grads = tree.value_and_grad(lm.loss)(alone, ids)
    return {"bits of params": errors(params, alone), "loss": error(value, truth), "gradients": errors(grads, true_grads)}


# ------------------------------------------------------------------------------------------------ batches and heads


def heads(rank: int, world: int) -> Found:
    """Softmax attention with two query heads per key head, each process some of the heads."""
    q, k, v = (normal(name, 2, h * world, 4 * world, 3) for name, h in (("q", 2), ("k", 1), ("v", 1)))
    own = slice(4 * rank, 4 * (rank + 1))
    attend = lambda q, k, v: ops.softmax_attention(q, k, v, causal=True)  # noqa: E731
    spread = distributed.over_heads(attend)
    parts = tuple(t[:, :, own] for t in (q, k, v))
    loss = lambda attend: lambda *x: attend(*x).sin().sum()  # noqa: E731
    got, true = torch.func.grad(loss(spread), (0, 1, 2))(*parts), torch.func.grad(loss(attend), (0, 1, 2))(q, k, v)
    along = tuple(t.cos() for t in (q, k, v))
    return {"value": error(spread(*parts), attend(q, k, v)[:, :, own]),
            "gradients": max(error(g, t[:, :, own]) for g, t in zip(got, true)),
            "jvp": error(torch.func.jvp(spread, parts, tuple(t[:, :, own] for t in along))[1],
                         torch.func.jvp(attend, (q, k, v), along)[1][:, :, own])}


def batches(rank: int, world: int) -> Found:
    """Averages of losses and gradients, of equal parts and of others, for one model and for an ensemble."""
    params = lm.init(random.key(0), lm.Config(attention=TAYLOR, depth=1, num_tokens=7), dtype=F64)
    ids = random.randint(random.key(1), (2 * world, 9), 0, 7)
    value, grads = distributed.value_and_grad(lm.loss)(params, distributed.shard(ids))
    truth, true_grads = tree.value_and_grad(lm.loss)(params, ids)
    found = {"loss": error(value, truth), "gradients": errors(grads, true_grads)}

    ends = [r * (r + 3) // 2 for r in range(world + 1)]  # parts of 2, 3, 4 ... rows
    rows = random.randint(random.key(2), (ends[-1], 9), 0, 7)
    uneven = distributed.value_and_grad(lambda p, x: (lm.loss(p, x), x.sum()), has_aux=True, weight=lambda p, x: x.shape[0])
    (value, aux), grads = uneven(params, rows[ends[rank]:ends[rank + 1]])
    truth, true_grads = tree.value_and_grad(lm.loss)(params, rows)
    found |= {"loss of uneven parts": error(value, truth), "gradients of uneven parts": errors(grads, true_grads)}
    assert aux == rows[ends[rank]:ends[rank + 1]].sum()

    members = torch.vmap(lambda key: lm.init(key, params.cfg, dtype=F64))(random.split(random.key(4), 3))
    got = tree.vmap(distributed.value_and_grad(lm.loss), (0, None))(members, distributed.shard(ids))
    found["ensemble"] = errors(got, tree.vmap(tree.value_and_grad(lm.loss), (0, None))(members, ids))

    sizes = {"a": torch.full((3,), float(rank + 1)), "b": (torch.ones(2, 2, dtype=F64), torch.tensor(7), "text")}
    summed = distributed.total(sizes)
    assert summed["a"].tolist() == [world * (world + 1) / 2] * 3 and summed["b"][1:] == (7, "text")
    round_trip = distributed.broadcast({"x": torch.arange(3) * (rank + 1), "y": torch.tensor([rank == 1])}, source=1)
    assert round_trip["x"].tolist() == [0, 2, 4] and round_trip["y"].tolist() == [True]
    return found


def groups(rank: int, world: int) -> Found:
    """Groups given by themselves and by name, of all processes and of the first two."""
    from fnattn import apply, init
    from fnattn.distributed import sequence

    every, pair = dist.new_group(list(range(world))), dist.new_group([0, 1])
    x, cfg = normal("x", 1, 3 * world, 5), SPREAD["taylor, plain"]
    own = x[:, 3 * rank:3 * (rank + 1)]
    params = init(random.key(0), sequence.Config(attention=cfg, group=every.group_name), dtype=F64)
    found = {"by name": error(apply(params, own)[0], apply(params.attn, x)[0][:, 3 * rank:3 * (rank + 1)])}
    if rank < 2:
        found["of two"] = error(distributed.all_gather(own, 1, pair), x[:, :6])
    else:
        try:
            distributed.all_gather(own, 1, pair)
        except ValueError as refused:
            assert "this process must be in the group; it is process 2 of all" in str(refused)
        else:
            raise AssertionError("a process outside of a group took part")
    return found


def small_buckets(rank: int, world: int) -> Found:
    """Sums that travel in several pieces."""
    from fnattn.distributed import data_parallel

    before, data_parallel.BUCKET = data_parallel.BUCKET, 64
    try:
        leaves = {f"leaf {i}": normal(f"{i}", i) * (rank + 1) for i in range(1, 12)}
        true = {name: leaf / (rank + 1) * (world * (world + 1) / 2) for name, leaf in leaves.items()}
        return {"sum": errors(distributed.total(leaves), true)}
    finally:
        data_parallel.BUCKET = before


def engine(rank: int, world: int) -> Found:
    """DeepSpeed at every stage against AdamW of one process on the whole batch, with a kernel and torch.func inside the loss."""
    cfg = taylor.Config(dim=8, dim_head=4, heads=2, causal=True)
    params = {"attn": taylor.init(random.key(0), cfg), "count": torch.tensor(3)}
    x, steps = normal("x", 4, 2 * world, 6, 8).float(), 4

    def loss(params, x):
        out = taylor.apply(params["attn"], x)[0]
        slope = torch.func.grad(lambda x: taylor.apply(params["attn"], x)[0].sin().sum())(x)
        return (out - x).square().mean() + 0.1 * slope.square().mean()

    leaves = [t.clone().requires_grad_() for t in params["attn"][1:3]] + [params["attn"].to_out.clone().requires_grad_()]
    adamw = torch.optim.AdamW(leaves, lr=0.01, weight_decay=0.01)
    for i in range(steps):
        adamw.zero_grad()
        attn = params["attn"]._replace(to_q=leaves[0], to_kv=leaves[1], to_out=leaves[2])
        loss({"attn": attn}, x[i]).backward()
        adamw.step()
    found = {}
    settings = {"lr": 0.01, "weight_decay": 0.01, "torch_adam": True}
    for stage in (0, 1, 2, 3):
        run = distributed.engine(loss, params, {
            "optimizer": {"type": "AdamW", "params": settings},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}})
        assert run.deepspeed.zero_optimization_stage() == stage
        for i in range(steps):
            run.step(distributed.shard(x[i]))
        after = run.params()
        assert after["count"] == 3 and after["attn"].cfg == cfg
        found[f"stage {stage}"] = errors(list(after["attn"][1:4]), [t.detach() for t in leaves])
        assert error(after["attn"].to_q, params["attn"].to_q) > 1e-3, "nothing was learned"
    return found


def alone(rank: int, world: int) -> Found:
    """The family around another, with nobody to exchange anything with: every law."""
    from fnattn.distributed import sequence

    report = check_family(sequence.FAMILY, compile=False)
    report.require()
    return {row.check: 0.0 for row in report.rows}


CHECKS: dict[str, Callable[[int, int], Found]] = {
    **{f"collective {name}": lambda rank, world, name=name: collective(name, rank, world) for name in COLLECTIVES},
    **{f"sequence {name}": lambda rank, world, name=name: sequence(name, rank, world) for name in SPREAD},
    "language model": language_model, "heads": heads, "batches": batches, "small buckets": small_buckets, "groups": groups,
    "engine": engine, "alone": alone,
}
