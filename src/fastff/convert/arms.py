"""The students of a conversion: the trees and their controls, built, distilled, measured, and resumed from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastff.convert.capture import Captured, Progress
from fastff.convert.distil import Kind, distil, distillation_loss, use_masked_training
from fastff.convert.settings import Settings
from fastff.convert.student import build_student, describe_narrow, flops
from fastff.models.converted import make_converted
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.text.examples import Examples

Descriptions = Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class Course:
    """What all students share: the teacher, the rows and the text they learn from, and how quality is measured.

    quality  the metric that decides, None where there is none
    further  metrics that are only told in the end, by name
    """

    settings: Settings
    kind: Kind
    teacher: Any
    captured: Sequence[Captured]
    examples: Examples
    held_out: Examples
    quality: Callable[[Any], float | None]
    further: Mapping[str, Callable[[Any], float]]
    progress: Progress

    @cached_property
    def dense(self) -> dict[str, Any]:
        """The teacher's figures."""
        return {"quality": self.quality(self.teacher), "further": self.others(self.teacher)}

    def others(self, model: Any) -> dict[str, float]:
        """The further figures of a model."""
        return {name: measure(model) for name, measure in self.further.items()}


def control(name: str, dense: Sequence[DenseWeights], trees: Descriptions) -> list[dict[str, Any] | None]:
    """Descriptions of a control: where a tree stands, a dense layer of equal work, or nothing for the name "none"."""
    out: list[dict[str, Any] | None] = []
    for layer, tree in zip(dense, trees, strict=True):
        share = flops(layer, tree) / layer.flops_per_row
        replaced = {"kind": "none"} if name == "none" else describe_narrow(layer, max(1, round(share * layer.neurons)))
        out.append(None if tree is None else replaced)
    return out


def active_share(dense: Sequence[DenseWeights], descriptions: Descriptions) -> float:
    """Share of the feedforwards' floating-point operations that the described layers spend."""
    spent = sum(flops(layer, d) for layer, d in zip(dense, descriptions, strict=True))
    return spent / sum(layer.flops_per_row for layer in dense)


def build(course: Course, name: str, descriptions: Descriptions, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A student with its layers taught alone, or the one that `folder` holds. Returns it and its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / "built.pt"
    if built.exists():
        student = make_converted(course.teacher, descriptions)
        use_masked_training(student.modules(), student.device.type == "cuda")
        return student, load(built, student)
    student, missed = build_student(
        course.teacher,
        descriptions,
        course.captured,
        steps=course.settings.layer_steps,
        seed=course.settings.seed,
        progress=lambda _, done, total: course.progress(f"layers {name}", done, total),
        pruned=name == "pruned",
    )
    facts = {"missed": missed, "before": course.quality(student)}
    save(built, student, facts)
    return student, facts


def teach(
    course: Course, name: str, descriptions: Descriptions, folder: Path, steps: int
) -> tuple[Any, dict[str, Any]]:
    """Build, distil in so many steps and evaluate one student, going on from what `folder` holds. Returns it and its
    figures."""
    student, facts = build(course, name, descriptions, folder)
    saved = folder / "distil.pt"
    state = load(saved, student) if saved.exists() else {"step": 0}
    if "after" not in state:
        distil(
            student,
            course.teacher,
            course.examples,
            replace(course.settings.recipe, steps=steps),
            kind=course.kind,
            progress=lambda _, done, total: course.progress(f"distil {name}", done, total),
            start=state["step"],
            state=state if state["step"] else None,
            checkpoint=lambda step, more: save(saved, student, {"step": step, **more}),
        )
        state = {"step": steps, "steps": steps, **_judged(course, student)}
        save(saved, student, state)
    return student, {**facts, **{name: state[name] for name in ("steps", "after", "further", "held_out_loss")}}


def _judged(course: Course, student: Any) -> dict[str, Any]:
    return {
        "after": course.quality(student),
        "further": course.others(student),
        "held_out_loss": held_out_loss(course, student),
    }


@torch.no_grad()
def held_out_loss(course: Course, student: Any) -> float:
    """Mean distillation loss on the text kept aside."""
    student.eval()
    losses = [
        float(distillation_loss(student, course.teacher, course.held_out.batch(which, student.device), course.kind))
        for which in course.held_out.in_order(course.settings.batch)
    ]
    return sum(losses) / len(losses)


def relative_loss(before: float, after: float, kind: Kind) -> float:
    """Share of the metric lost: of a perplexity the increase, of other metrics the decrease."""
    return after / before - 1 if kind == "causal" else 1 - after / before


def put_back(student: Any, teacher: Any, block: int) -> Any:
    """A copy of a student in which one block has the teacher's dense feedforward again."""
    descriptions = list(student.config.fastff_feedforwards)
    descriptions[block] = None
    restored = make_converted(student, descriptions)
    restored.load_state_dict({**teacher.state_dict(), **student.state_dict()}, strict=False)
    restored.train(False)
    return restored


def keep_loss(course: Course, student: Any, facts: dict[str, Any]) -> tuple[Any, dict[str, Any], list[int]]:
    """Put layers back to dense, most harmful first, until the metric's loss is at most `settings.max_loss`.

    The most harmful is the one without which the held-out loss is least. Returns the student, its figures, and the
    blocks put back. Raises ValueError, naming the least loss, if not even one replaced layer keeps it."""
    allowed, before = course.settings.max_loss, course.dense["quality"]
    assert allowed is not None
    assert before is not None
    back: list[int] = []
    after, least = float(facts["after"]), float("inf")
    while (loss := relative_loss(before, after, course.kind)) > allowed:
        least = min(least, loss)
        left = _converted_blocks(student)
        if len(left) < 2:
            raise ValueError(
                f"max_loss {allowed:.2%} cannot be kept: the least loss with a replaced layer is {least:.2%}"
            )
        losses = {block: held_out_loss(course, put_back(student, course.teacher, block)) for block in left}
        worst = min(losses, key=lambda block: losses[block])
        student = put_back(student, course.teacher, worst)
        back.append(worst)
        after = float(course.quality(student) or 0.0)
        facts = {**facts, "after": after, "held_out_loss": losses[worst]}
        course.progress("put back", len(back), len(back) + len(left) - 2)
    if back:
        facts = {**facts, "further": course.others(student)}
    return student, facts, back


def _converted_blocks(model: Any) -> list[int]:
    family = family_of(model.config.model_type)
    slots = [family.slot_of(block) for block in family.blocks_of(model)]
    return [k for k, slot in enumerate(slots) if isinstance(slot, ConvertedFeedforward)]


def save(path: Path, student: Any, facts: dict[str, Any]) -> None:
    """Write a student's tensors and figures; an interruption leaves the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save({"model": student.state_dict(), "facts": facts}, part)
    os.replace(part, path)


def load(path: Path, student: Any) -> dict[str, Any]:
    """Read what `save` wrote into a student of the same layers; returns the figures."""
    stored = torch.load(path, map_location=student.device, weights_only=True)
    student.load_state_dict(stored["model"])
    facts: dict[str, Any] = stored["facts"]
    return facts
