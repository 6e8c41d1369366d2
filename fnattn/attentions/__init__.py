"""The families: one file is one kind of attention, found by itself when it lies in this folder and ends in FAMILY.

`init`, `init_state` and `apply` here find the family by the type of the config. A family from elsewhere joins with
`register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
from torch import Tensor

from ..core import EMPTY, Family, kind_of

FAMILIES: dict[str, Family] = {}
_BY_CONFIG: dict[type, Family] = {}


def register(family: Family) -> Family:
    """Makes a family known by name and by its Config; the laws, the command line and the models then take it.

    Raises:
        TypeError: not a Family. ValueError: another family has this name or this Config.
    """
    if not isinstance(family, Family):
        raise TypeError(f"fnattn.register: expected a Family; got {type(family).__name__}.\n"
                        f"  Pass the FAMILY record at the end of the family's file.")
    if FAMILIES.get(family.name, family) is not family or _BY_CONFIG.get(family.config, family) is not family:
        raise ValueError(f"fnattn.register: expected a new name and Config; got {family.name!r} with "
                         f"{family.config.__module__}.{family.config.__qualname__}, which is taken.\n"
                         f"  Choose another name, and one Config class per family.")
    FAMILIES[family.name] = family
    _BY_CONFIG[family.config] = family
    return family


def find(cfg: Any) -> Family:
    """The family of a config, of params, or of a name.

    Raises:
        TypeError: no family has this Config. ValueError: no family has this name.
    """
    if isinstance(cfg, str):
        if cfg not in FAMILIES:
            raise ValueError(f"fnattn: expected a family; got {cfg!r}.\n  Choose one of: {', '.join(sorted(FAMILIES))}.")
        return FAMILIES[cfg]
    cfg = getattr(cfg, "cfg", cfg)
    if type(cfg) not in _BY_CONFIG:
        known = ", ".join(f"{f.name}.Config" for _, f in sorted(FAMILIES.items()))
        raise TypeError(f"fnattn: expected the Config of a family, or params that hold one; got {kind_of(cfg)}.\n"
                        f"  Choose one of: {known}; or register your own with fnattn.register(FAMILY).")
    return _BY_CONFIG[type(cfg)]


def init(params_key: Tensor, cfg: Any, *, dtype: torch.dtype = torch.float32, device: object = None) -> Any:
    """Parameters of cfg, each drawn by its name from params_key. See the family's own `init`."""
    return find(cfg).init(params_key, cfg, dtype=dtype, device=device)


def init_state(params: Any, batch: int, *, capacity: int) -> Any:
    """The state before the first position, for `batch` sequences of up to `capacity` positions."""
    return find(params).init_state(params, batch, capacity=capacity)


def apply(params: Any, x: Tensor, state: Any = EMPTY, *, mask: Tensor | None = None, context: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Any]:
    """out, state = apply(params, x, state). See the family's own `apply`, and `core.ApplyFn` for what all share."""
    return find(params).apply(params, x, state, mask=mask, context=context, dropout_key=dropout_key, impl=impl)


def gradient_is_exact(cfg: Any) -> bool:
    """Whether what differentiation returns is the derivative of the function computed.

    False where a config scales gradients on the way on purpose, as `frac_gradient_state_transition` does in GateLoop.
    """
    values = vars(cfg) if hasattr(cfg, "__dict__") else {}
    scaled = any(name.startswith("frac_gradient") and value != 1.0 for name, value in values.items())
    return not scaled and all(gradient_is_exact(v) for v in values.values() if hasattr(v, "__dataclass_fields__"))


for _module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
    register(importlib.import_module(f"{__name__}.{_module}").FAMILY)
