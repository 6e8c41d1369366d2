"""Everything that decides a training, in one record: from defaults, a TOML file, and flags, the later ones winning.

The record is JSON in the checkpoint, so that a training continues, and text is generated, without repeating it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .. import attentions, optim
from ..core import check
from ..models import lm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Where a family's own defaults make a poor language model at dim 128: the settings that the demo is measured with.
RECIPES: dict[str, dict] = {
    "taylor": {"heads": 8, "dim_head": 8, "rotary_emb": True, "gate_value_heads": True, "shift_tokens": True},
    "full": {"heads": 8, "dim_head": 16, "rotary_emb": True},
}


def _setting(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One training."""

    # [model]
    family: str = _setting("gate_loop", "kind of attention: see `fnattn list`")
    attention: dict = dataclasses.field(default_factory=dict, metadata={"help": "options of the attention"})
    dim: int = _setting(128, "width of the model")
    depth: int = _setting(2, "number of blocks")
    ff_mult: float = _setting(4, "hidden width of the feed-forward, in multiples of dim")
    norm: str = _setting("rms", "kind of norm: rms or layer")
    norm_attention: bool = _setting(True, "a norm before the attention; off for families that norm their own input")
    post_norm: bool = _setting(False, "norm after each residual sum in place of before each part")
    seq_len: int = _setting(0, "number of learned positions; 0 for none")
    tied: bool = _setting(False, "logits from the embedding's table")
    logits_bias: bool = _setting(False, "a bias per token")
    dropout: float = _setting(0.0, "chance of zeroing an entry in training")
    remat: bool = _setting(False, "less memory: recompute blocks in the backward pass")
    # [optimizer]
    optimizer: str = _setting("adam", "adam, adamw or sgd")
    learning_rate: Any = _setting(1e-3, "size of a step; with --ensemble N also N of them, one per member")
    betas: tuple = _setting((0.9, 0.999), "adam, adamw: how slowly the two means move")
    momentum: float = _setting(0.0, "sgd: how much of the last step is kept")
    weight_decay: float = _setting(0.0, "adamw: pull of the parameters towards 0, per step and learning rate")
    clip: float = _setting(0.5, "largest norm of the gradient; 0 for no limit")
    schedule: str = _setting("constant", "of the learning rate: constant, cosine (down to 0 at the last step), or cooldown "
                                         "(constant, then down to 0 over the last sixth)")
    warmup: int = _setting(0, "steps in which the learning rate grows from 0")
    # [train]
    steps: int = _setting(300, "updates in all, those of a resumed training included")
    batch: int = _setting(8, "sequences per step")
    length: int = _setting(128, "bytes per sequence")
    seed: int = _setting(0, "of parameters, batches and dropout; member i of an ensemble has seed + i")
    ensemble: int = _setting(0, "train so many models at once with vmap; 0 for a single one")
    data: str = _setting("", "file or folder of text; empty for the sources of Python's standard library")
    eval_every: int = _setting(100, "steps between measurements on the validation text")
    eval_windows: int = _setting(256, "sequences in such a measurement")
    final_windows: int = _setting(2048, "sequences in the last measurement, for the figure that counts; all, where there are fewer")
    save_every: int = _setting(100, "steps between checkpoints")
    impl: str = _setting("auto", "implementation of the operators: see `fnattn report`")
    threads: int = _setting(0, "CPU threads; 0 for one with a small model, else torch's choice")


TABLES = {  # the tables of a TOML file
    "model": ("family", "dim", "depth", "ff_mult", "norm", "norm_attention", "post_norm", "seq_len", "tied", "logits_bias",
              "dropout", "remat"),
    "attention": (),  # the options of the family
    "optimizer": ("optimizer", "learning_rate", "betas", "momentum", "weight_decay", "clip", "schedule", "warmup"),
    "train": ("steps", "batch", "length", "seed", "ensemble", "data", "eval_every", "eval_windows", "final_windows", "save_every",
              "impl", "threads"),
}
SMALL = 1 << 20  # entries of one layer's activations up to which one thread is enough
# What may differ when a training continues; everything else must be as it was.
FREE = ("steps", "eval_every", "eval_windows", "final_windows", "save_every", "impl", "threads")


def from_toml(path: Path) -> dict:
    """The settings in a TOML file with tables [model], [attention], [optimizer], [train]."""
    if not path.is_file():
        raise FileNotFoundError(f"settings: expected a TOML file at {path}; got no such file.\n  Check the name.")
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"settings: expected TOML in {path}; got an error: {error}.\n"
                         f'  Write tables and values, such as [model] and then family = "taylor".') from None
    found: dict = {}
    for table, values in tables.items():
        check(table in TABLES and isinstance(values, dict), "settings: expected tables {} in {}; got {!r}.",
              ", ".join(f"[{t}]" for t in TABLES), path, table, remedy="Move the setting into its table.")
        if table == "attention":
            found["attention"] = values
            continue
        for name, value in values.items():
            check(name in TABLES[table], "settings: [{}] in {} has no setting {!r}; it has {}.", table, path, name,
                  ", ".join(TABLES[table]), remedy="Check the spelling; `fnattn train --help` explains each.")
            found[name] = value
    return found


def merge(*layers: dict) -> dict:
    """One dict of settings, later layers winning; the options of the attention are merged one by one."""
    merged: dict = {}
    for layer in layers:
        options = {**merged.get("attention", {}), **layer.get("attention", {})}
        merged.update(layer)
        if options:
            merged["attention"] = options
    return merged


def make(*layers: dict) -> Settings:
    """Settings from defaults and dicts, later ones winning.

    Raises:
        ValueError: a setting that does not exist, or a value that makes no sense.
    """
    merged = merge(*layers)
    kinds = {f.name: f for f in dataclasses.fields(Settings)}
    for name, value in merged.items():
        check(name in kinds, "settings: there is no setting {!r}; there are {}.", name, ", ".join(kinds),
              remedy="Check the spelling.")
        if isinstance(value, list):
            merged[name] = tuple(value)
        if name != "learning_rate":
            _check_type("settings", name, kinds[name].type, merged[name])
    made = Settings(**merged)
    for name, least in (("steps", 1), ("batch", 1), ("length", 1), ("ensemble", 0), ("eval_every", 1), ("eval_windows", 1),
                        ("final_windows", 1), ("save_every", 1), ("warmup", 0), ("clip", 0), ("seed", 0), ("threads", 0)):
        check(getattr(made, name) >= least, "settings: {} must be at least {}; got {}.", name, least, getattr(made, name),
              remedy="`fnattn train --help` explains it.")
    for name, allowed in (("optimizer", ("adam", "adamw", "sgd")), ("schedule", ("constant", "cosine", "cooldown"))):
        check(getattr(made, name) in allowed, "settings: {} must be one of {}; got {!r}.", name, ", ".join(allowed),
              getattr(made, name), remedy="Check the spelling.")
    check(made.optimizer == "adamw" or made.weight_decay == 0, "settings: weight_decay belongs to adamw; got {} with {}.",
          made.weight_decay, made.optimizer, remedy="Use --optimizer adamw.")
    check(made.optimizer == "sgd" or made.momentum == 0, "settings: momentum belongs to sgd; got {} with {}.", made.momentum,
          made.optimizer, remedy="Use --optimizer sgd, or --betas.")
    rates = learning_rates(made)
    check(len(rates) == max(1, made.ensemble) or len(rates) == 1, "settings: learning_rate must be one number or one per member "
          "({}); got {}.", made.ensemble, len(rates), remedy="Give one number for all.")
    return made


def _check_type(who: str, name: str, kind: str, value: Any) -> None:
    """`kind` is an annotation as text, such as "int" or "float | None"."""
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "tuple": (tuple,), "dict": (dict,),
               "None": (type(None),)}
    parts = [part.strip() for part in str(kind).split("|")]
    if not all(part in allowed for part in parts):
        return
    fits = any(isinstance(value, allowed[part]) and (part == "bool" or not isinstance(value, bool)) for part in parts)
    check(fits, "{}: {} must be {}; got {!r}.", who, name, kind, value,
          remedy="Check the value; in a TOML file text has quotes and numbers have none.")


def learning_rates(settings: Settings) -> tuple[float, ...]:
    """The learning rates: one, or one per member."""
    rate = settings.learning_rate
    rates = tuple(rate) if isinstance(rate, (tuple, list)) else (rate,)
    check(all(isinstance(r, (int, float)) and not isinstance(r, bool) and r >= 0 for r in rates) and bool(rates),
          "settings: learning_rate must be a number of at least 0; got {!r}.", rate, remedy="1e-3 is usual for adam.")
    return tuple(float(r) for r in rates)


def model_config(settings: Settings) -> lm.Config:
    """The config of the model that the settings describe.

    Raises:
        ValueError: no such family or option, or values that do not fit.
    """
    family = attentions.find(settings.family)
    known = {f.name: f for f in dataclasses.fields(family.config)}
    options = {k: v for k, v in RECIPES.get(family.name, {}).items() if k in known}
    if "causal" in known:
        options["causal"] = True
    for name, value in settings.attention.items():
        check(name in known and name != "dim", "settings: {} has no option {!r}; it has {}.", family.name, name,
              ", ".join(n for n in known if n != "dim"), remedy=f"`fnattn list {family.name}` explains each.")
        _check_type(f"settings: {family.name}", name, known[name].type, value)
        options[name] = value
    if "seq_len" in known and "seq_len" not in options:
        options["seq_len"] = settings.length
    missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in ("dim", *options)]
    check(not missing, "settings: {} needs {}.", family.name, ", ".join(missing),
          remedy="Give each, as in --attention " + " ".join(f"{name}=..." for name in missing) + ".")
    attention = family.config(dim=settings.dim, **options)
    return lm.Config(attention=attention, **{name: getattr(settings, name) for name in TABLES["model"] if name != "family"})


def optimizer(settings: Settings, learning_rate: Any) -> optim.Optimizer:
    """The optimiser that the settings describe, with this learning rate (a number, or a 0-d tensor under vmap)."""
    rate = learning_rate
    if settings.schedule == "cosine":
        rate = optim.cosine(rate, settings.steps)
    elif settings.schedule == "cooldown":
        rate = optim.cooldown(rate, settings.steps, max(1, settings.steps // 6))
    if settings.warmup:
        rate = optim.warmup(rate, settings.warmup)
    if settings.optimizer == "sgd":
        last = optim.sgd(rate, momentum=settings.momentum)
    else:
        last = optim.adamw(rate, betas=tuple(settings.betas), weight_decay=settings.weight_decay)
    return optim.chain(optim.clip_by_global_norm(settings.clip), last) if settings.clip else last


def threads(settings: Settings) -> int:
    """How many CPU threads to use, 0 for torch's choice. It decides the last bits of sums, so it must not depend on the load.

    Small operators are faster on one thread, and on a busy machine ten times so: threads wait for each other.
    """
    if settings.threads:
        return settings.threads
    return 1 if max(1, settings.ensemble) * settings.batch * settings.length * settings.dim <= SMALL else 0


def to_dict(settings: Settings) -> dict:
    """JSON values, for a checkpoint."""
    return dataclasses.asdict(settings)


def parse_value(text: str) -> Any:
    """A value given as NAME=VALUE: true, false, none, a number, or text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
