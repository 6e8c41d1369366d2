"""A training's whole state in one safetensors file: parameters, optimiser state, key, step, and the config as JSON.

The tensors lie under dotted names ("params.blocks.0.attn.to_q"), which any safetensors reader shows; the config is JSON in
the file's header, and once more in a .json file beside it, for people. Loading reads tensors and JSON and nothing else:
nothing is unpickled, and only configs of this library and of registered families are made.

Saving writes a new file and then renames it: whoever reads sees the old checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import attentions, tree
from .core import EMPTY, check, kind_of

FORMAT = 1


class Checkpoint(NamedTuple):
    """What a file holds.

    cfg: the model's Config. params: shaped by it. opt: the optimiser state's leaves by name; see `opt_state`. key: int64
    [2] or, for an ensemble, [members, 2]. step: updates made. members: size of the ensemble, 0 for a single model.
    extra: whatever JSON the writer added.
    """

    cfg: Any
    params: Any
    opt: dict[str, Tensor]
    key: Tensor
    step: int
    members: int
    extra: dict


def save(path: str | Path, params: Any, *, opt_state: Any = EMPTY, key: Tensor | None = None, step: int = 0, members: int = 0,
         extra: dict | None = None) -> None:
    """Writes a checkpoint at `path`, replacing an older one in a single step that cannot be seen half done.

    Args:
        path: ends in .safetensors; folders are made as needed.
        params: of a model or a family (they carry their config); for an ensemble stacked, with members > 0.
        opt_state: any tree of tensors.
        extra: JSON values to keep, such as the settings of the training.
    Raises:
        ValueError: path does not end in .safetensors. OSError: the file cannot be written; an older checkpoint is then as it was.
    """
    path = Path(path)
    check(path.suffix == ".safetensors", "checkpoint.save: path must end in .safetensors; got {}.", path,
          remedy="A .json file of the same name will lie beside it.")
    flat = {f"params.{name}": leaf for name, leaf in tree.to_flat(params).items()}
    flat.update({f"opt.{name}": leaf for name, leaf in tree.to_flat(opt_state).items()})
    if key is not None:
        flat["key"] = key
    wrong = [name for name, leaf in flat.items() if not isinstance(leaf, Tensor)]
    check(not wrong, "checkpoint.save: expected tensors only; got something else at {}.", wrong,
          remedy="Turn numbers into tensors.", error=TypeError)
    # Copies: safetensors refuses leaves that share memory, as expanded ones do.
    flat = {name: leaf.detach().cpu().clone(memory_format=torch.contiguous_format) for name, leaf in flat.items()}
    about = {"format": FORMAT, "config": to_json(params.cfg), "step": int(step), "members": members, "extra": extra or {}}
    text = json.dumps(about, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, safetensors.torch.save(flat, {"fnattn": text}))
    replace(path.with_suffix(".json"), text.encode())


def replace(path: Path, content: bytes) -> None:
    """Gives the file this content in one step: written beside it, flushed to the disk, renamed."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def load(path: str | Path, *, cfg: Any = None, device: object = None) -> Checkpoint:
    """Reads what `save` wrote.

    Args:
        cfg: if given, the config that the checkpoint must have.
    Raises:
        FileNotFoundError: no such file. ValueError: truncated, not a checkpoint of this library, or of another config; the
            message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint.load: expected a checkpoint at {path}; got no such file.\n"
                                f"  Train one first, or name the .safetensors file.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # Copies, so that nothing hangs on the file.
            flat = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint.load: expected a whole safetensors file at {path}; got a damaged or truncated one "
                         f"({error}).\n  Restore it from a copy, or train again.") from None
    if "fnattn" not in header:
        raise ValueError(f"checkpoint.load: expected a checkpoint of fnattn at {path}; got a safetensors file without its config.\n"
                         f"  For weights of an upstream package use fnattn.convert.load.")
    about = _header(path, header["fnattn"])
    try:
        found = from_json(about["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.load: cannot make the config in {path}: {error}") from None
    check(cfg is None or cfg == found, "checkpoint.load: {} holds another config.\n  expected {}\n  got      {}", path, cfg, found,
          remedy="Use the settings it was trained with, or another file.")
    params = _shaped(path, found, _part(flat, "params."), about["members"])
    return Checkpoint(found, params, _part(flat, "opt."), flat.get("key", torch.zeros(0, dtype=torch.int64)), about["step"],
                      about["members"], about["extra"])


def _header(path: Path, text: str) -> dict[str, Any]:
    """What `save` wrote into the file's header."""
    try:
        about = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint.load: expected JSON in the header of {path}; got something else ({error}).\n"
                         f"  The file was changed after it was saved: restore it from a copy.") from None
    written = about.get("format") if isinstance(about, dict) else kind_of(about)
    check(written == FORMAT, "checkpoint.load: expected format {} in {}; got {}.", FORMAT, path, written,
          remedy="It was written by another version of fnattn; load it there.")
    lacking = [name for name in ("config", "step", "members", "extra") if name not in about]
    check(not lacking, "checkpoint.load: the header of {} lacks {}.", path, lacking,
          remedy="The file was changed after it was saved: restore it from a copy.")
    return about


def opt_state(checkpoint: Checkpoint, like: Any) -> Any:
    """The optimiser state of a checkpoint, shaped like the one that this optimiser's init gave.

    Raises:
        ValueError: it was saved by another optimiser.
    """
    expected = tree.to_flat(like)
    same = expected.keys() == checkpoint.opt.keys() and all(
        leaf.shape == checkpoint.opt[name].shape and leaf.dtype == checkpoint.opt[name].dtype for name, leaf in expected.items())
    check(same, "checkpoint.opt_state: the checkpoint was saved by another optimiser; expected {} leaves like {}, got {} like {}.",
          len(expected), list(expected)[:2], len(checkpoint.opt), list(checkpoint.opt)[:2],
          remedy="Continue with the optimiser settings of the first run.")
    return tree.from_flat(checkpoint.opt, like)


def _part(flat: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): leaf for name, leaf in flat.items() if name.startswith(prefix)}


def _shaped(path: Path, cfg: Any, flat: dict[str, Tensor], members: int) -> Any:
    """The params of cfg with the leaves from a file, after comparing names and shapes."""
    like = _init_of(cfg)(torch.zeros(2, dtype=torch.int64), cfg, device="meta")
    expected = tree.to_flat(like)
    lead = (members,) if members else ()
    wrong = [f"{name}: expected {[*lead, *leaf.shape]}, got {list(flat[name].shape) if name in flat else 'nothing'}"
             for name, leaf in expected.items() if name not in flat or tuple(flat[name].shape) != (*lead, *leaf.shape)]
    wrong += [f"{name}: unknown" for name in flat if name not in expected]
    check(not wrong, "checkpoint.load: the tensors in {} do not fit its config: {}.", path, "; ".join(wrong[:4]),
          remedy="The file was changed after it was saved, or by another version of fnattn.")
    return tree.from_flat(flat, like)


def _init_of(cfg: Any) -> Any:
    try:
        return attentions.find(cfg).init
    except TypeError:  # a model: its init lies beside its Config
        return importlib.import_module(type(cfg).__module__).init


# ------------------------------------------------------------------------------------------------ configs as JSON


def to_json(value: Any) -> Any:
    """A config, with configs inside it, as JSON values: {"class": "fnattn.attentions.taylor.Config", "dim": 128, ...}."""
    if dataclasses.is_dataclass(value):
        cls = type(value)
        return {"class": f"{cls.__module__}.{cls.__qualname__}",
                **{f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    return [to_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; lists become tuples. Makes configs of this library and of registered families only."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("class", "")
    cls = _config_class(name)
    check(cls is not None, "checkpoint.from_json: expected the config of this library or of a registered family; got {!r}.", name,
          remedy="Import the module that registers it first.")
    return cls(**{k: from_json(v) for k, v in value.items() if k != "class"})


def _config_class(name: str) -> type | None:
    for family in attentions.FAMILIES.values():
        if name == f"{family.config.__module__}.{family.config.__qualname__}":
            return family.config
    module, _, last = name.rpartition(".")
    if not module.startswith(__package__ + "."):
        return None
    try:
        cls = getattr(importlib.import_module(module), last, None)
    except ImportError:
        return None
    # Of this library's classes only configs: frozen dataclasses.
    return cls if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen else None
