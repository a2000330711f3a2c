"""What the dense layers see on the user's text or pictures: inputs and residuals of every block, mapped on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastff.convert.distil_loss import real_tokens
from fastff.errors import CheckpointError, FileError
from fastff.io import write_text
from fastff.models.families import Family, family_of
from fastff.report.progress import Progress
from fastff.text.examples import Examples


class Captured:
    """Rows of one block: x (rows, hidden), the feedforward's input, and the residual (rows, hidden) it is added to.

    In a post-norm block the residual is the input itself and is not stored twice. The layer's outputs are not stored:
    the dense weights give them again exactly, for less than it costs to read them from a disk."""

    def __init__(self, folder: Path, block: int, rows: int, hidden: int, *, post_norm: bool, mode: str = "r") -> None:
        opened = _open if mode == "r" else _create
        self.x = opened(folder / f"input-{block:03d}.f16", np.float16, (rows, hidden))
        self.residual = None if post_norm else opened(folder / f"residual-{block:03d}.f32", np.float32, (rows, hidden))

    def rows(self, which: slice | np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """x and residual (rows, hidden) as float32."""
        x = torch.from_numpy(np.asarray(self.x[which], dtype=np.float32)).to(device)
        if self.residual is None:
            return x, x
        return x, torch.from_numpy(np.array(self.residual[which])).to(device)

    def __len__(self) -> int:
        return int(self.x.shape[0])


def _open(path: Path, dtype: Any, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    expected = shape[0] * shape[1] * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
        raise FileError(f"{path} {found}: remove {path.parent} and run the same command again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _create(path: Path, dtype: Any, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A map whose space on the disk is taken now: a write to a map that a full disk cannot hold ends the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype=dtype, mode="w+", shape=shape)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def bytes_needed(rows: int, hidden: int, blocks: int, *, post_norm: bool) -> int:
    """Disk that capturing takes."""
    return rows * hidden * blocks * (2 if post_norm else 6)


@torch.no_grad()
def capture(
    model: Any, examples: Examples, folder: Path, *, rows: int, batch: int, progress: Progress
) -> list[Captured]:
    """Run the dense model over the examples until every block has `rows` rows; or open what is there.

    Raises CheckpointError if they are too few or the disk too small, before anything is written.
    """
    family = family_of(model.config.model_type)
    blocks, hidden, post_norm = family.blocks_of(model), model.config.hidden_size, family.norm is not None
    if examples.tokens < rows:
        raise CheckpointError(f"the examples have {examples.tokens} tokens, {rows} are needed")
    done = folder / f"captured-{rows}"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        before = [*folder.glob("input-*.f16"), *folder.glob("residual-*.f32")]  # of a capture that was interrupted
        begun = sum(path.stat().st_size for path in before)
        check_disk(folder, bytes_needed(rows, hidden, len(blocks), post_norm=post_norm) - begun, "capturing")
        shards = [Captured(folder, k, rows, hidden, post_norm=post_norm, mode="w") for k in range(len(blocks))]
        _fill(model, family, blocks, shards, examples, batch, progress)
        write_text(done, "")
    return [Captured(folder, k, rows, hidden, post_norm=post_norm) for k in range(len(blocks))]


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise CheckpointError where fewer than `needed` bytes are free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{what} needs {needed / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f} GB free")


def _fill(
    model: Any,
    family: Family,
    blocks: list[nn.Module],
    shards: list[Captured],
    examples: Examples,
    batch: int,
    progress: Progress,
) -> None:
    seen: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    ends: dict[int, Tensor] = {}
    hooks = []
    for k, block in enumerate(blocks):
        layer = family.slot_of(block)
        hooks.append(layer.register_forward_pre_hook(lambda _m, a, k=k: seen.__setitem__(k, a[0])))
        if shards[k].residual is not None:
            added = family.after_of(block) or layer  # what gives the tensor that is added to the residual
            hooks.append(added.register_forward_hook(lambda _m, _a, y, k=k: outputs.__setitem__(k, y)))
            hooks.append(
                block.register_forward_hook(
                    lambda _m, _a, y, k=k: ends.__setitem__(k, y if isinstance(y, Tensor) else y[0])
                )
            )
    total, filled = len(shards[0]), 0
    try:
        for which in examples.shuffled(batch, seed=0):
            inputs = examples.batch(which, model.device)
            model(**inputs)
            mask = inputs.get("attention_mask")
            count = min(len(real_tokens(seen[0], mask)), total - filled)
            for k, shard in enumerate(shards):
                shard.x[filled : filled + count] = real_tokens(seen[k], mask)[:count].half().cpu().numpy()
                if shard.residual is not None:
                    residual = real_tokens(ends[k] - outputs[k], mask)[:count]
                    shard.residual[filled : filled + count] = residual.float().cpu().numpy()
            filled += count
            progress("capture", filled, total)
            if filled == total:
                break
    finally:
        for hook in hooks:
            hook.remove()
    for shard in shards:
        shard.x.flush()
        if shard.residual is not None:
            shard.residual.flush()
