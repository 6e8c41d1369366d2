"""Trees of tensors: one registration for torch.func and optree, their leaves, and names for these. Public as `fnattn.tree`.

The only file that touches torch's private pytree module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import optree
import torch
import torch.utils._pytree as pytree
from torch import Tensor

NAMESPACE = "fnattn"
T = TypeVar("T")


def static(cls: type[T]) -> type[T]:
    """Registers a frozen, hashable class as a node without leaves, for torch and optree (namespace "fnattn") alike."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    pytree.register_pytree_node(
        cls, lambda node: ([], node), lambda leaves, node: node, serialized_type_name=name,
        flatten_with_keys_fn=lambda node: ([], node),
        to_dumpable_context=lambda node: dataclasses.asdict(node),
        from_dumpable_context=lambda fields: cls(**fields))
    optree.register_pytree_node(cls, lambda node: ((), node, ()), lambda node, leaves: node, namespace=NAMESPACE)
    return cls


def flatten(tree: Any) -> tuple[list, Any]:
    """Leaves in order, and the structure that `unflatten` takes."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: Iterable, structure: Any) -> Any:
    """The tree with this structure and these leaves."""
    return pytree.tree_unflatten(list(leaves), structure)


def leaves(tree: Any) -> list:
    """All leaves in order."""
    return pytree.tree_leaves(tree)


def structure(tree: Any) -> Any:
    """What is left of a tree without its leaves; compares equal exactly for trees that can be mapped together."""
    return pytree.tree_structure(tree)


def map(fn: Callable, tree: Any, *others: Any) -> Any:
    """fn applied to each leaf, together with the leaves of `others` at the same place."""
    return pytree.tree_map(fn, tree, *others)


def is_differentiable(x: Any) -> bool:
    """True for floating and complex tensors: what a derivative can be taken for."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def take_apart(*trees: Any) -> tuple[list[list], list]:
    """The leaves and the structure of each tree, for `put_together` only: in a fifth of the time, in an order of its own.

    Structures from one call compare equal exactly for trees that can be mapped together.
    """
    if not torch.compiler.is_compiling():
        apart = [optree.tree_flatten(t, none_is_leaf=True, namespace=NAMESPACE) for t in trees]
        # A class that only torch was told of is a leaf to optree.
        if pytree.SUPPORTED_NODES.keys().isdisjoint({type(x) for items, _ in apart for x in items}):
            return [items for items, _ in apart], [form for _, form in apart]
    both = [flatten(t) for t in trees]
    return [items for items, _ in both], [form for _, form in both]


def put_together(items: Iterable, form: Any) -> Any:
    """The inverse of `take_apart`, for one tree."""
    return optree.tree_unflatten(form, items) if isinstance(form, optree.PyTreeSpec) else unflatten(items, form)


# ------------------------------------------------------------------------------------------------ names of leaves


def _name(path: tuple) -> str:
    return ".".join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def to_flat(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, in order: {"blocks.0.attn.to_q": tensor, ...}. What safetensors, curvlinops and others take."""
    named = [(_name(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    flat = dict(named)
    if len(flat) != len(named):
        twice = sorted({name for name, _ in named if sum(n == name for n, _ in named) > 1})
        raise ValueError(f"tree.to_flat: expected every leaf to have its own name; got {twice} more than once.\n"
                         f"  Do not mix keys that print alike, such as 1 and '1', in one dict.")
    return flat


def from_flat(flat: dict[str, Any], like: Any) -> Any:
    """The tree shaped like `like` whose leaves are taken from `flat` by name; the inverse of `to_flat`.

    Raises:
        ValueError: a name is missing or unknown; both lists are named.
    """
    names = list(to_flat(like))
    missing, unknown = [n for n in names if n not in flat], [n for n in flat if n not in set(names)]
    if missing or unknown:
        raise ValueError(f"tree.from_flat: expected the leaves of the given tree; got missing {missing}, unknown {unknown}.\n"
                         f"  Compare with list(tree.to_flat(like)).")
    return unflatten([flat[n] for n in names], structure(like))


# ------------------------------------------------------------------------------------------------ parts of trees


def partition(tree: Any, keep: Callable[[Any], bool] = is_differentiable) -> tuple[Any, Any]:
    """Two trees of the same structure: leaves for which keep(leaf) holds, and the others; None elsewhere."""
    items, form = flatten(tree)
    kept = [x if keep(x) else None for x in items]
    rest = [None if keep(x) else x for x in items]
    return unflatten(kept, form), unflatten(rest, form)


def combine(first: Any, second: Any) -> Any:
    """The inverse of `partition`: at each place the leaf that is not None."""
    a, form = flatten(first)
    b, other = flatten(second)
    if form != other:
        raise ValueError(f"tree.combine: expected two trees of one structure; got {form} and {other}.\n"
                         f"  Pass the two results of tree.partition.")
    return unflatten([y if x is None else x for x, y in zip(a, b)], form)


def stack(trees: Iterable[Any]) -> Any:
    """One tree whose leaves carry a new leading axis, one entry per given tree: an ensemble's params."""
    trees = list(trees)
    if not trees:
        raise ValueError("tree.stack: expected at least one tree; got none.\n  Pass a non-empty list of trees.")
    return map(lambda *xs: torch.stack(xs), trees[0], *trees[1:])


def unstack(tree: Any) -> list[Any]:
    """The list of trees along the leading axis; the inverse of `stack`."""
    items, form = flatten(tree)
    if not items:
        raise ValueError("tree.unstack: expected a tree with leaves; got none, so the number of members is unknown.\n"
                         "  Stack trees that hold at least one tensor.")
    sizes = {x.shape[0] for x in items}
    if len(sizes) != 1:
        raise ValueError(f"tree.unstack: expected one leading size for all leaves; got {sorted(sizes)}.\n"
                         f"  Unstack only what tree.stack or vmap produced.")
    return [unflatten([x[i] for x in items], form) for i in range(sizes.pop())]
