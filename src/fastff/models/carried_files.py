"""What sentence-transformers keeps beside a model: every module that `modules.json` names, and its settings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from fastff.errors import CheckpointError, FileError
from fastff.io import read_json
from fastff.models.weight_files import locate

_MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")


def carry(model: str, out: Path) -> list[str]:
    """Copy these files of a model directory, or of a model of the hub, into `out`; nothing where there are none.

    Returns the paths copied, relative to `out`. Raises CheckpointError for a `modules.json` that is damaged or names a
    place outside the model, FileError if a file cannot be written."""
    found = locate(model, _MODULES, {})
    if found is None:
        return []
    folders = module_folders(Path(found))
    root = Path(model) if Path(model).is_dir() else _downloaded(model, folders)
    paths = [root / _MODULES, *(path for pattern in _SETTINGS for path in root.glob(pattern))]
    paths += [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    copied = sorted({path.relative_to(root) for path in paths})
    try:
        for path in copied:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, out / path)
        for folder in folders:  # a module without settings of its own, such as Normalize, is an empty folder
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot copy the modules of {model} to {out}: {error}") from error
    return [os.fspath(path) for path in copied]


def module_folders(path: Path) -> list[str]:
    """The folders, but the model's own, that a `modules.json` names. Raises CheckpointError."""
    modules = read_json(path, remedy="take the file from where the model came from")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("path"), str) for m in modules
    ):
        raise CheckpointError(f"{path} is not a list of modules with a path each")
    folders = [module["path"] for module in modules if module["path"] not in ("", ".")]
    for folder in folders:
        parts = PurePosixPath(folder)
        if parts.is_absolute() or ".." in parts.parts:
            raise CheckpointError(f"{path} names {folder!r}, a place outside the model")
    return folders


def _downloaded(model: str, folders: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[_MODULES, *_SETTINGS, *(f"{f}/*" for f in folders)]))
