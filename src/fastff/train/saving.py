"""Checkpoints of a run: written beside, brought to the disk, renamed; so the last good one survives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastff.errors import FileError, TrainingError
from fastff.io import SETTINGS, claim, digest, publish, read_json, read_tensors, read_torch, write_json

PARTIAL = ".partial"
FILES = "files.json"  # of a checkpoint: its files and their digests
# Any of each group: FSDP leaves a folder where other runs leave a file.
NEEDED = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp_0"),
    ("optimizer.pt", "optimizer_0"),
    ("scheduler.pt",),
    ("trainer_state.json",),
    ("position.json",),
    ("rng_state.pth", "rng_state_0.pth"),
)
_PREFIX = "checkpoint-"
_FIELDS: dict[str, dict[str, type]] = {
    "position.json": {"rows": int, "seconds": float},
    "trainer_state.json": {"global_step": int},
}


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
            _describe(folder)
            publish(folder, target)
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


def _drop_old(out: Path, keep: int) -> None:
    steps = sorted(int(path.name.removeprefix(_PREFIX)) for path in out.glob(f"{_PREFIX}*") if path.name[11:].isdigit())
    for step in steps[:-keep]:
        shutil.rmtree(checkpoint_path(out, step))


def _describe(folder: Path) -> None:
    """Write which files a checkpoint has, so that one that is missing or damaged later is not trained on from."""
    files = {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / FILES, files)


def verify(folder: Path) -> None:
    """Raise FileError, naming the file, unless all that `save` wrote is there and unchanged; of a checkpoint of an
    earlier version, unless all that a run needs to go on is there."""
    remedy = f"remove {folder} to go on from the checkpoint before, or from the beginning"
    if (folder / FILES).is_file():
        for name, expected in read_json(folder / FILES, needs={}, remedy=remedy).items():
            path = folder / name
            if not path.is_file():
                raise FileError(f"{path} is missing: {remedy}")
            if digest(path) != expected:
                raise FileError(f"{path} is damaged (its content has changed): {remedy}")
        return
    for names in NEEDED:
        if not any((folder / name).exists() for name in names):
            raise FileError(f"{folder / names[0]} is missing: {remedy}")
    for path in filter(Path.is_file, (folder / name for names in NEEDED for name in names)):
        _read(path, remedy)


def _read(path: Path, remedy: str) -> None:
    """Read a file whose digest nobody kept. Raises FileError if it is damaged."""
    match path.suffix:
        case ".json":
            read_json(path, needs=_FIELDS.get(path.name, {}), remedy=remedy)
        case ".pt":
            read_torch(path, needs={}, remedy=remedy)
        case ".safetensors":
            read_tensors(path, remedy=remedy)


def claim_run(out: Path, identity: dict[str, Any], upgrade: Callable[[Any], Any] = lambda kept: kept) -> None:
    """Write what a run is, or raise FileError if `out` holds another one: naming each difference. upgrade: gives what
    an earlier version wrote the names of this one."""
    if not (out / SETTINGS).is_file() and last_checkpoint(out) is not None:
        raise TrainingError(f"{out} holds checkpoints but no {SETTINGS} that says of which run")
    claim(out, identity, upgrade=upgrade)


@torch.no_grad()
def take_over(model: torch.nn.Module, source: Path) -> None:
    """Give a model the weights of a model directory. Raises TrainingError, naming tensors, unless all names and shapes
    are the same; a tied weight may be absent."""
    found: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        found |= read_tensors(path, remedy="make that model again")
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
