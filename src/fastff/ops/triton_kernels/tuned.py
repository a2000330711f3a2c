"""Plans tuned on this machine, kept in the user's cache directory and used in place of plan.py's.

Tuning happens only when it is asked for (`tuning.tune`, `fastff bench --device cuda --tune`); without it, or
where its file cannot be read, the shipped plans serve, so that no first call is slow. A file holds plans by device
name, Triton version, direction, layer, rows rounded up to a power of two, and dtype.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from fastff.config import TreeConfig
from fastff.errors import FileError
from fastff.io import write_json
from fastff.ops.triton_kernels import plan
from fastff.ops.triton_kernels.plan import (
    BackwardPlan,
    ForwardPlan,
    GroupedPlan,
    PerTokenPlan,
    SpeculativePlan,
    Stage,
    Tiles,
)

FORMAT = 4  # of the file; raised when a plan's fields change, or what they mean
_KINDS = {kind.__name__: kind for kind in (PerTokenPlan, SpeculativePlan, GroupedPlan, BackwardPlan)}
_PARTS: dict[str, Callable[[Any], Any]] = {
    "tiles": lambda found: Tiles(**found),
    "outer_tiles": lambda found: Tiles(**found),
    "stages": lambda found: tuple(Stage(**stage) for stage in found),
}
Direction = Literal["forward", "backward"]


def cache_file() -> Path:
    """Where tuned plans are kept: under XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path is to be ignored.
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "fastff" / "triton-plans.json"


def forward_plan(config: TreeConfig, rows: int, dtype: torch.dtype, device: str | None) -> ForwardPlan:
    """The plan tuned for a device of this name, or the shipped one. device: None where nothing can be tuned."""
    found = None if device is None else _found("forward", config, rows, dtype, device)
    if isinstance(found, (PerTokenPlan, SpeculativePlan, GroupedPlan)):
        return found
    return plan.forward_plan(config, rows, dtype.itemsize)


def backward_plan(config: TreeConfig, rows: int, dtype: torch.dtype, device: str | None) -> BackwardPlan:
    """As `forward_plan`."""
    found = None if device is None else _found("backward", config, rows, dtype, device)
    return found if isinstance(found, BackwardPlan) else plan.backward_plan(config, rows, dtype.itemsize)


def keep(direction: Direction, config: TreeConfig, rows: int, dtype: torch.dtype, device: str, chosen: Any) -> None:
    """Use a plan from now on, and write it to the cache file. Warns where that cannot be written."""
    plans = {**_plans(), _key(direction, config, rows, dtype, device): _as_dict(chosen)}
    path = cache_file()
    try:
        write_json(path, {"format": FORMAT, "plans": plans})
    except FileError as error:
        _warn(f"tuned plans are used in this process only: {error}")
    _loaded[str(path)] = plans
    _found.cache_clear()


@functools.lru_cache(maxsize=4096)
def _found(direction: Direction, config: TreeConfig, rows: int, dtype: torch.dtype, device: str) -> Any:
    stored = _plans().get(_key(direction, config, rows, dtype, device))
    if stored is None:
        return None
    try:
        return _from_dict(stored)
    except (KeyError, TypeError, AttributeError) as error:
        _warn(f"a tuned plan in {cache_file()} is not one of this version ({error!r}): the shipped one is used")
        return None


def _key(direction: Direction, config: TreeConfig, rows: int, dtype: torch.dtype, device: str) -> str:
    import triton

    bucket = 1 << max(0, rows - 1).bit_length()
    layer = ",".join(f"{name}={value}" for name, value in sorted(vars(config).items()))
    return f"{device}|triton {triton.__version__}|{direction}|{layer}|{bucket} rows|{dtype}"


_loaded: dict[str, dict[str, Any]] = {}  # by path, which the environment may change


def _plans() -> dict[str, Any]:
    path = cache_file()
    if str(path) not in _loaded:
        _loaded[str(path)] = _read(path)
    return _loaded[str(path)]


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing, with a warning, where it cannot be understood."""
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            return {}  # written by another version, which tuning replaces
        plans = document["plans"]
        if not isinstance(plans, dict):
            raise TypeError(f"plans is {type(plans).__name__}, expected an object")
    except (FileNotFoundError, NotADirectoryError):  # it is not there; writing says what stands in the way
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(f"tuned plans in {path} cannot be read ({error!r}): the shipped ones are used; tune again or delete it")
        return {}
    return plans


def _as_dict(chosen: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [vars(stage) for stage in value]
        return vars(value) if isinstance(value, Tiles) else value

    return {"kind": type(chosen).__name__, **{name: plain(value) for name, value in vars(chosen).items()}}


def _from_dict(stored: dict[str, Any]) -> Any:
    values = {name: _PARTS.get(name, lambda found: found)(found) for name, found in stored.items() if name != "kind"}
    return _KINDS[stored["kind"]](**values)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
