"""What a conversion will take of disk and memory, compared with what is free before the work starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from fastff.convert.capture import bytes_needed
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distil import LOGITS
from fastff.convert.initialise import ROUTING_ROWS
from fastff.convert.pictures import STORED
from fastff.convert.student import dense_layers, stored_neurons
from fastff.errors import CheckpointError
from fastff.models.families import family_of

FLOAT, DOUBLE = 4, 8
ADAM = 2  # tensors of state a trained one
BATCH_COPIES = 12  # of a block's hidden states that training keeps, attention included: an estimate
LOGITS_COPIES = 6  # of a piece of a step


def check(
    settings: ConversionSettings,
    teacher: Any,
    kind: str,
    descriptions: Sequence[Mapping[str, Any]],
    work: Path,
    longest: int,
) -> None:
    """Raise CheckpointError if disk or memory is too small. descriptions: the largest candidate of each block;
    longest: tokens of an example."""
    student = student_bytes(teacher, descriptions)
    _refuse("of disk", disk_bytes(settings, teacher, student, work), shutil.disk_usage(work).free, str(work))
    needed = memory_bytes(teacher, kind, descriptions, student, settings.students, settings.batch * longest)
    if teacher.device.type == "cuda":
        free, place = torch.cuda.mem_get_info(teacher.device)[0], torch.cuda.get_device_name(teacher.device)
        _refuse("of GPU memory beside the model", needed, free, place)
    else:
        _refuse("of memory beside the model", needed, psutil.virtual_memory().available, "this machine")


def student_bytes(teacher: Any, descriptions: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of a student's parameters, its layers as described."""
    hidden = teacher.config.hidden_size
    dense = sum(layer.flops_per_row // 2 for layer in dense_layers(teacher))
    rows = sum(stored_neurons(d) * (3 if d["activation"] == "swiglu" else 2) for d in descriptions)
    return FLOAT * int(sum(p.numel() for p in teacher.parameters()) - dense + rows * hidden)


def disk_bytes(settings: ConversionSettings, teacher: Any, student: int, work: Path) -> int:
    """Bytes still to be written: captured rows unless they are there, and every student's two files, one of them with
    the optimiser's state."""
    family = family_of(teacher.config.model_type)
    blocks, hidden = len(family.blocks_of(teacher)), teacher.config.hidden_size
    captured = bytes_needed(settings.rows, hidden, blocks, post_norm=family.norm is not None)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    pictures = work / STORED
    stored = pictures.stat().st_size if pictures.is_file() else FLOAT * settings.max_tokens
    return max(0, captured + settings.students * student * (2 + ADAM) + student + min(stored, there) - there)


def memory_bytes(
    teacher: Any, kind: str, descriptions: Sequence[Mapping[str, Any]], student: int, students: int, tokens: int
) -> int:
    """Bytes of the greatest need beside the teacher: regression of one layer, or a step of the distillation on so many
    tokens. All students stay until their times are measured."""
    config = teacher.config
    widest = max(stored_neurons(d) for d in descriptions)
    neurons = max(layer.neurons for layer in dense_layers(teacher))
    regression = 3 * DOUBLE * widest**2 + FLOAT * ROUTING_ROWS * (widest + 2 * neurons)
    states = BATCH_COPIES * config.num_hidden_layers * config.hidden_size
    logits = 0
    if kind in ("causal", "masked"):
        logits, tokens = LOGITS_COPIES * config.vocab_size, min(tokens, LOGITS // config.vocab_size)
    step = (1 + ADAM) * student + FLOAT * tokens * (states + logits)
    return int(students * student + max(regression, step))


def _refuse(what: str, needed: int, free: int, place: str) -> None:
    if needed > free:
        raise CheckpointError(
            f"this conversion needs about {needed / 1e9:.2f} GB {what}, {place} has {free / 1e9:.2f} GB free: "
            "fewer rows, baselines or points of the curve, a smaller batch or budget need less"
        )
