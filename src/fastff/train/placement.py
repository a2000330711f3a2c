"""Which GPU a child process sees."""

from __future__ import annotations

import os

import torch


def environments() -> list[dict[str, str]]:
    """The environment of a child process for each GPU that this one sees; this one's own where it sees none."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(torch.cuda.device_count())
    names = [shown.split(",")[n] if shown else str(n) for n in numbers]
    return [{**os.environ, "CUDA_VISIBLE_DEVICES": name} for name in names] or [dict(os.environ)]
