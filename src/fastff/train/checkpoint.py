"""Checkpoints of a run: written beside, brought to the disk, renamed; so the last good one survives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastff.errors import TrainingError
from fastff.io import read_json, sync, write_json

PARTIAL = ".partial"
SETTINGS = "settings.json"
_PREFIX = "checkpoint-"


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return out / f"{_PREFIX}{step}"


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint with the most steps, None if there is none."""
    found = {int(path.name.removeprefix(_PREFIX)): path for path in out.glob(f"{_PREFIX}*") if path.name[11:].isdigit()}
    return found[max(found)] if found else None


def save(
    out: Path, step: int, write: Callable[[Path], object], *, keep: int, leader: bool, meet: Callable[[], object]
) -> None:
    """Make `out`/checkpoint-STEP of what `write(folder)` leaves in a folder, then drop all but the newest `keep`.

    Called by all processes of a run; `leader` is one of them, `meet` waits for all. Raises TrainingError if a write
    failed here: what was there before is then unchanged.
    """
    target, partial = checkpoint_path(out, step), out / PARTIAL
    if leader:
        shutil.rmtree(partial, ignore_errors=True)
    meet()
    try:
        folder = partial / target.name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        meet()
        if leader:
            _publish(folder, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        if leader:
            shutil.rmtree(partial, ignore_errors=True)
        good = last_checkpoint(out)
        raise TrainingError(
            f"cannot save the checkpoint of step {step}: {error}; the last good one is {good or 'none'}"
        ) from error
    if leader:
        partial.rmdir()
        _drop_old(out, keep)
    meet()


def _publish(folder: Path, target: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
    if target.exists():  # the same step, saved by an earlier run
        shutil.rmtree(target)
    os.replace(folder, target)
    sync(target.parent)


def _drop_old(out: Path, keep: int) -> None:
    steps = sorted(int(path.name.removeprefix(_PREFIX)) for path in out.glob(f"{_PREFIX}*") if path.name[11:].isdigit())
    for step in steps[:-keep]:
        shutil.rmtree(checkpoint_path(out, step))


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Write what a run is, or raise TrainingError if `out` holds another one: naming each difference."""
    path = out / SETTINGS
    if not path.is_file():
        if last_checkpoint(out) is not None:
            raise TrainingError(f"{out} holds checkpoints but no {SETTINGS} that says of which run")
        write_json(path, identity)
        return
    before = read_json(path)
    differing = [
        f"{name} {before.get(name)!r} there, {identity.get(name)!r} asked for"
        for name in sorted({*before, *identity})
        if before.get(name) != identity.get(name)
    ]
    if differing:
        raise TrainingError(f"{out} holds another run: {'; '.join(differing)}. Choose another folder to begin anew")


@torch.no_grad()
def take_over(model: torch.nn.Module, source: Path) -> None:
    """Give a model the weights of a model directory. Raises TrainingError, naming tensors, unless all names and shapes
    are the same; a tied weight may be absent."""
    found: dict[str, Tensor] = {}
    try:
        for path in sorted(source.glob("*.safetensors")):
            found |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{source} cannot be read: {error}") from error
    if not found:
        raise TrainingError(f"{source} holds no model: no *.safetensors")
    own = dict(model.named_parameters()) | {name: t for name, t in model.state_dict().items() if name in found}
    shape = {name: tuple(tensor.shape) for name, tensor in own.items()}
    there = {name: tuple(tensor.shape) for name, tensor in found.items()}
    differing = [
        f"{name} {there.get(name, 'absent')} there, {shape.get(name, 'absent')} here"
        for name in sorted({*shape, *there})
        if shape.get(name) != there.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise TrainingError(f"the weights of {source} do not fit: {'; '.join(differing[:4])}{more}")
    for name, tensor in own.items():
        tensor.copy_(found[name])
