"""What the report of a conversion says: quality, times that all models take in one process, what stands where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastff.convert.choose_layers import LatencyProfile, Option
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distill_context import DistillContext, active_share, baseline
from fastff.convert.latency import (
    WHOLE,
    best_selection_unexplained,
    feedforward_us,
    model_us,
    place_name,
    place_of,
    routing,
)
from fastff.convert.quality import METRIC, table_name
from fastff.convert.student import dense_layers
from fastff.io import restored

ITS_TEXT = "text kept aside"


@dataclass(frozen=True)
class Plan:
    """What was measured before the choice: the dense model's times, the shapes tried on the middle block, and the
    options of every block."""

    profile: LatencyProfile
    tried: list[dict[str, Any]]
    options: list[list[Option]]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Plan:
        """From what `asdict` gave, through JSON. Raises ValueError for times of other shapes, or other blocks."""
        plan = restored(cls, content, "the plan")
        shapes = len(plan.profile.model_us)
        times = [*plan.profile.dense_us, *(option.times_us for block in plan.options for option in block)]
        if len(plan.options) != len(plan.profile.dense_us) or any(len(found) != shapes for found in times):
            raise ValueError(f"the plan has not one time for each of {shapes} shapes and {len(plan.options)} blocks")
        return plan


@dataclass
class Point:
    """One budget: what each block becomes under it, and its students once they are trained. "none" belongs to the main
    budget alone: it has no other."""

    budget: ConversionSettings
    folder: Path
    trees: list[dict[str, Any] | None]
    baselines: tuple[str, ...]
    restored: list[int] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def teach(self, context: DistillContext, steps: int, before: float | None) -> None:
        """Teach the trees, then the baselines of what is left of them. before: the dense model's quality."""
        dense = dense_layers(context.teacher)
        student, facts = context.teach("tree", self.trees, self.folder / "tree", steps)
        if self.budget.max_loss is not None and before is not None:
            student, facts, self.restored = context.keep_loss(student, facts, before)
            self.trees = list(student.config.fastff_feedforwards)
        self.models["tree"], self.variants["tree"] = student, {**facts, "active": active_share(dense, self.trees)}
        for name in self.baselines:
            descriptions = baseline(name, dense, self.trees)
            self.models[name], facts = context.teach(name, descriptions, self.folder / name, steps)
            self.variants[name] = {**facts, "active": active_share(dense, descriptions)}


def record_of(context: DistillContext, plan: Plan, points: Sequence[Point], dense: dict[str, Any]) -> dict[str, Any]:
    """Everything the report says but how long the run took; latencies are measured here, calls of all models
    alternating."""
    settings, teacher, tree = context.settings, context.teacher, points[0].models["tree"]
    record = {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "kind": context.kind,
        "metric": METRIC.get(context.kind),
        "tables": [table_name(path) for path in settings.tables] or [ITS_TEXT] * (context.kind == "causal"),
        "shapes": settings.shapes,
        "dense": dense,
        "variants": points[0].variants,
        "curve": [{"asked": point.budget.active, "variants": point.variants} for point in points[1:]],
        "layers": _layers(context, plan, points[0]),
        "tried": plan.tried,
        "ceilings": plan.profile.ceilings(),
        "routing": routing(tree, context.held_out),
        "device": place_name(teacher.device),
        "timed_on": place_name(place_of(teacher, settings.time_on)),
        "gpu_bytes": gpu_bytes(teacher.device),
    }
    _time(context, points, dense)
    return record


def _time(context: DistillContext, points: Sequence[Point], dense: dict[str, Any]) -> None:
    """Add the times of the whole models and of their feedforwards, at every shape, to the figures of each."""
    settings = context.settings
    place = place_of(context.teacher, settings.time_on)
    models, figures = {"dense": context.teacher.to(place)}, {"dense": dense}
    for k, point in enumerate(points):
        models |= {f"{k} {name}": model.to(place) for name, model in point.models.items()}
        figures |= {f"{k} {name}": variant for name, variant in point.variants.items()}
    for shape in settings.shapes:
        whole = model_us(models, shape, WHOLE * settings.timing_s)
        layers = feedforward_us(models, context.captured, shape, settings.timing_s)
        for name, at in figures.items():
            at.setdefault("latency_ms", []).append(whole[name] / 1e3)
            at.setdefault("feedforward_ms", []).append(layers[name] / 1e3)


def gpu_bytes(device: torch.device) -> dict[str, int] | None:
    """The most GPU memory in use at once, and kept for later use too; None without a GPU."""
    if device.type != "cuda":
        return None
    return {"used": torch.cuda.max_memory_allocated(device), "kept": torch.cuda.max_memory_reserved(device)}


def _layers(context: DistillContext, plan: Plan, point: Point) -> list[dict[str, Any]]:
    """Per block: what stands there and why, and every option that was measured."""
    out = []
    for k, (options, description) in enumerate(zip(plan.options, point.trees, strict=True)):
        if description is not None:
            reason = "chosen"
        elif k in point.restored:
            reason = "dense again: with the tree more than the allowed loss"
        elif len(options) > 1 and context.settings.speedup is not None:
            reason = "dense: the speedup is reached without it, and its tree damages more than others"
        else:
            reason = "dense: every tree tried is slower here"
        out.append(
            {
                "block": k,
                "description": description,
                "reason": reason,
                "options": [asdict(option) for option in options],
                "unexplained": point.variants["tree"]["unexplained"][k],
                "best_selection_unexplained": best_selection_unexplained(context.teacher, k, context.captured[k]),
            }
        )
    return out
