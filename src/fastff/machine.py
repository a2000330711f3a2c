"""What a result belongs to: the machine, its caches and memory, and the versions in use."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil
import torch

import fastff
from fastff.ops import native
from fastff.ops.library import processors

PACKAGES = ("torch", "triton", "onnxruntime", "openvino", "nncf")


def machine(*packages: str) -> dict[str, Any]:
    """The machine, threads, instruction set (None without the native core) and versions that a result belongs to.
    packages: further ones to tell the versions of."""
    versions = {name: metadata.version(name) for name in (*PACKAGES, *packages) if util.find_spec(name) is not None}
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "isa": native.isa() if native.why_unavailable() is None else None,
        "python": platform.python_version(),
        "fastff": fastff.__version__,
        **versions,
    }


def cores() -> int:
    """Cores that this process may use."""
    if native.why_unavailable() is None:
        return processors()  # knows of quotas
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Model name of the processor with its widest vector extensions, as the system reports them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(known.get("flags", "").split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    return f"{known.get('model name', platform.machine())} ({', '.join(wide) or 'no vector extensions'})"


def cache_bytes() -> tuple[int, int]:
    """Sizes of a core's own second-level cache and of the last level; 1 and 8 MiB where the system does not say."""
    sizes: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            sizes[int((index / "level").read_text())] = int(size.rstrip("K")) * 1024
    if 2 not in sizes:
        return 2**20, 2**23
    return sizes[2], sizes[max(sizes)]


def available_bytes() -> int:
    """Memory that a new process can use without swapping."""
    return int(psutil.virtual_memory().available)


def commit() -> str | None:
    """The commit of the source tree this runs from, `-dirty` with local changes; None for an installed package."""
    folder = Path(__file__).parent
    if shutil.which("git") is None or not any((parent / ".git").exists() for parent in folder.parents):
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
