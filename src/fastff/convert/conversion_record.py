"""What the report of a conversion says: quality, times that all models take in one process, what stands where."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastff.convert.choose_layers import LatencyProfile, Option, pays
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distill_context import DistillContext, active_share, baseline
from fastff.convert.engine_latency import ENGINES, EngineTimes
from fastff.convert.latency import (
    WHOLE,
    best_selection_unexplained,
    feedforward_us,
    model_us,
    place_name,
    place_of,
    routing,
    timed_on,
)
from fastff.convert.quality import METRIC, table_name
from fastff.convert.student import dense_layers
from fastff.io import restored
from fastff.models.converted import make_converted
from fastff.models.kinds import Kind

KEPT_ASIDE: dict[Kind, str] = {"causal": "text kept aside", "image": "pictures kept aside"}  # scored on that
MAIN = "tree"  # folder of the chosen layers' student, as versions called it that knew trees only


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
    chosen: list[dict[str, Any] | None]
    baselines: tuple[str, ...]
    pruned: tuple[int, ...] = ()  # blocks of the chosen layers whose neurons stay as they are
    restored: list[int] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def teach(self, context: DistillContext, steps: int, before: float | None) -> None:
        """Teach the chosen layers, then the baselines of what is left of them. before: the dense model's quality."""
        dense = dense_layers(context.teacher)
        student, facts = context.teach("chosen", self.chosen, self.folder / MAIN, steps, pruned=self.pruned)
        if self.budget.max_loss is not None and before is not None:
            student, facts, self.restored = context.keep_loss(student, facts, before)
            self.chosen = list(student.config.fastff_feedforwards)
        self.models["chosen"] = student
        self.variants["chosen"] = {**facts, "active": active_share(dense, self.chosen)}
        for name in self.baselines:
            descriptions = baseline(name, dense, self.chosen)
            self.models[name], facts = context.teach(name, descriptions, self.folder / name, steps)
            self.variants[name] = {**facts, "active": active_share(dense, descriptions)}

    def ranking(self, kind: Kind) -> list[str]:
        """The taught models, best first: by the metric, or where there is none by the held-out loss. All keep the
        budget: baselines spend no more than the chosen layers."""

        def loss(name: str) -> float:
            quality = self.variants[name]["after"]
            if quality is None:
                return float(self.variants[name]["held_out_loss"])
            return float(quality if kind == "causal" else -quality)

        # Of equals the first that was taught, the chosen layers; what diverged comes last.
        return sorted(self.variants, key=lambda name: (math.isnan(loss(name)), loss(name)))


def record_of(context: DistillContext, plan: Plan, points: Sequence[Point], dense: dict[str, Any]) -> dict[str, Any]:
    """Everything the report says but how long the run took; latencies are measured here, calls of all models
    alternating."""
    settings, teacher = context.settings, context.teacher
    written, *others = points[0].ranking(context.kind)
    record = {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "kind": context.kind,
        "metric": METRIC.get(context.kind),
        "tables": [table_name(path) for path in settings.tables]
        or [name for kind, name in KEPT_ASIDE.items() if kind == context.kind],
        "shapes": settings.shapes,
        "untrained_pooler": context.kind == "image" and getattr(teacher, "pooler", teacher) is None,
        "dense": dense,
        "variants": points[0].variants,
        "curve": [{"asked": point.budget.active, "variants": point.variants} for point in points[1:]],
        "layers": _layers(context, plan, points[0]),
        "tried": plan.tried,
        "ceilings": plan.profile.ceilings(),
        "written": written,
        "runner_up": others[0] if others else None,
        "routing": routing(points[0].models[written], context.held_out),
        "device": place_name(teacher.device),
        "timed_on": timed_on(teacher, settings.time_on),
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
    if settings.time_on in ENGINES:
        _time_in_engine(context, models, figures)
        return
    for shape in settings.shapes:
        whole = model_us(models, shape, WHOLE * settings.timing_s, picture=context.examples.picture)
        layers = feedforward_us(models, context.captured, shape, settings.timing_s)
        for name, at in figures.items():
            at.setdefault("latency_ms", []).append(whole[name] / 1e3)
            at.setdefault("feedforward_ms", []).append(layers[name] / 1e3)


def _time_in_engine(context: DistillContext, models: dict[str, Any], figures: dict[str, dict[str, Any]]) -> None:
    """Whole models in the engine; of their feedforwards what they take more than a model without any."""
    settings = context.settings
    times = EngineTimes(context.teacher, str(settings.time_on), settings.shapes, WHOLE * settings.timing_s)
    nothing = make_converted(context.teacher, [{"kind": "none"}] * len(context.captured))
    found = times.of({**models, "without": nothing})
    rest = found.pop("without")
    for name, at in figures.items():
        at["latency_ms"] = [us / 1e3 for us in found[name]]
        at["feedforward_ms"] = [max(0.0, us - without) / 1e3 for us, without in zip(found[name], rest, strict=True)]


def gpu_bytes(device: torch.device) -> dict[str, int] | None:
    """The most GPU memory in use at once, and kept for later use too; None without a GPU."""
    if device.type != "cuda":
        return None
    return {"used": torch.cuda.max_memory_allocated(device), "kept": torch.cuda.max_memory_reserved(device)}


def _layers(context: DistillContext, plan: Plan, point: Point) -> list[dict[str, Any]]:
    """Per block: what stands there and why, and every option that was measured."""
    out = []
    for k, (options, description) in enumerate(zip(plan.options, point.chosen, strict=True)):
        mine = standing(options, description, pruned=k in point.pruned)
        if description is not None:
            reason = "chosen"
        elif k in point.restored:
            reason = "dense again: replaced, more than the allowed loss"
        elif len(options) > 1 and context.settings.speedup is not None:
            reason = "dense: the speedup is reached without it, and replaced it damages more than others"
        elif context.settings.speedup is None and any(
            pays(context.settings, options, n) for n in range(1, len(options))
        ):
            reason = "dense: replaced it damages more than others, which do with less"
        else:
            reason = "dense: every layer tried is slower here"
        out.append(
            {
                "block": k,
                "description": description,
                "kind": mine.kind,
                "reason": reason,
                "options": [asdict(option) for option in options],
                "runner_up": runner_up(options, mine),
                "unexplained": point.variants["chosen"]["unexplained"][k],
                "best_selection_unexplained": best_selection_unexplained(context.teacher, k, context.captured[k]),
            }
        )
    return out


def standing(options: Sequence[Option], description: dict[str, Any] | None, *, pruned: bool) -> Option:
    """The option that a block has become: of those of one description, which a narrow and a pruned layer may share, the
    pruned one or the other."""
    alike = (o for o in options if o.description == description and (o.kind == "pruned") == pruned)
    return options[0] if description is None else next(alike, options[0])


def runner_up(options: Sequence[Option], mine: Option) -> dict[str, Any] | None:
    """The least damaging option of another kind that is not dense and spends no more work than what stands there."""
    others = [o for o in options if o.kind not in ("dense", mine.kind) and o.share <= mine.share * 1.02]
    return asdict(min(others, key=lambda option: option.loss_increase)) if others else None
