"""The students of a conversion: the trees and their baselines, built, distilled, measured, and resumed from files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastff.convert import earlier
from fastff.convert.capture import Captured
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distil import distil, use_masked_training
from fastff.convert.distil_loss import distillation_loss
from fastff.convert.student import build_student, describe_narrow, flops
from fastff.errors import FileError
from fastff.io import read_json, read_torch, reading, write_json, write_torch
from fastff.models.converted import make_converted
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.models.kinds import Kind
from fastff.report.progress import Progress, of_stage
from fastff.text.examples import Examples

DISTILLED, BUILD = "distil.pt", "build.json"
Descriptions = Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class DistillContext:
    """What all students share: the teacher, the rows and the text they learn from, and how quality is measured.

    quality  the metric that decides, None where there is none
    further  metrics that are only told in the end, by name
    """

    settings: ConversionSettings
    kind: Kind
    teacher: Any
    captured: Sequence[Captured]
    examples: Examples
    held_out: Examples
    quality: Callable[[Any], float | None]
    further: Mapping[str, Callable[[Any], float]]
    progress: Progress

    def figures(self, model: Any) -> dict[str, Any]:
        """The quality of a model, and its further metrics."""
        return {"quality": self.quality(model), "further": self.others(model)}

    def others(self, model: Any) -> dict[str, float]:
        """The further metrics of a model."""
        return {name: measure(model) for name, measure in self.further.items()}

    def build(
        self, name: str, descriptions: Descriptions, folder: Path, *, pruned: Collection[int] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """A student with its layers trained alone, or the one that `folder` holds; the pruned blocks, all of them in
        the student of that name, only have neurons left out. Returns it and its figures."""
        built = folder / "built.pt"
        if built.exists():
            student = make_converted(self.teacher, descriptions)
            use_masked_training(student.modules(), student.device.type == "cuda")
            return student, load(built, student)
        start = time.perf_counter()
        student, unexplained = build_student(
            self.teacher,
            descriptions,
            self.captured,
            steps=self.settings.layer_steps,
            seed=self.settings.seed,
            progress=of_stage(self.progress, f"layers {name}"),
            pruned=range(len(descriptions)) if name == "pruned" else pruned,
        )
        write_json(folder / BUILD, {"build_s": time.perf_counter() - start})
        facts = {"unexplained": unexplained, "before": self.quality(student)}
        save(built, student, facts)
        return student, facts

    def teach(
        self, name: str, descriptions: Descriptions, folder: Path, steps: int, *, pruned: Collection[int] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """Build, distil in so many steps and evaluate one student, going on from what `folder` holds. Returns it and
        its figures."""
        student, facts = self.build(name, descriptions, folder, pruned=pruned)
        saved = folder / DISTILLED
        state = load(saved, student) if saved.exists() else {"step": 0}
        if "after" not in state:
            distil(
                student,
                self.teacher,
                self.examples,
                replace(self.settings.recipe, steps=steps),
                kind=self.kind,
                progress=of_stage(self.progress, f"distil {name}"),
                start=state["step"],
                state=state if state["step"] else None,
                checkpoint=lambda step, more: save(saved, student, {"step": step, **more}),
            )
            figures = {
                "after": self.quality(student),
                "further": self.others(student),
                "held_out_loss": self.held_out_loss(student),
            }
            state = {"step": steps, "steps": steps, **figures}
            save(saved, student, state)
        return student, {**facts, **{name: state[name] for name in ("steps", "after", "further", "held_out_loss")}}

    @torch.no_grad()
    def held_out_loss(self, student: Any) -> float:
        """Mean distillation loss on the text kept aside."""
        student.eval()
        losses = [
            float(distillation_loss(student, self.teacher, self.held_out.batch(which, student.device), self.kind))
            for which in self.held_out.in_order(self.settings.batch)
        ]
        return sum(losses) / len(losses)

    def keep_loss(self, student: Any, facts: dict[str, Any], before: float) -> tuple[Any, dict[str, Any], list[int]]:
        """Give blocks back to the dense model, the most damaging first, until the metric, which was `before`, loses at
        most `settings.max_loss`.

        The most damaging is the one without which, it alone given back, the held-out loss is least. How many go back is
        found by halving: one fewer does not suffice. Returns the student, its figures, and the restored blocks.
        Raises ValueError, with the least loss measured, where neither all but one nor 1, 2, 4, ... keep it."""
        allowed = self.settings.max_loss
        assert allowed is not None
        after = {0: float(facts["after"])}
        if relative_loss(before, after[0], self.kind) <= allowed:  # not where it is NaN
            return student, facts, []
        order = self._most_damaging_first(student)

        def given_back(count: int) -> Any:
            return restore(student, self.teacher, order[:count])

        def loss(count: int) -> float:
            if count not in after:
                after[count] = float(self.quality(given_back(count)) or 0.0)
                self.progress("restored", count, len(order))
            return relative_loss(before, after[count], self.kind)

        most = len(order) - 1
        tried = [most, *(2**k for k in range(most.bit_length()) if 2**k < most)] if most else []
        many = next((count for count in tried if loss(count) <= allowed), 0)
        if not many:
            least = min(map(loss, after), key=lambda one: (math.isnan(one), one))
            raise ValueError(f"max_loss {allowed:.2%} cannot be kept: the least loss of those measured is {least:.2%}")
        few = max(count for count in after if count < many)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if loss(middle) <= allowed else (middle, many)
        student = given_back(many)
        held_out, further = self.held_out_loss(student), self.others(student)
        return student, {**facts, "after": after[many], "held_out_loss": held_out, "further": further}, order[:many]

    def _most_damaging_first(self, student: Any) -> list[int]:
        """The replaced blocks by the held-out loss with that block alone given back."""
        left = converted_blocks(student)
        losses: dict[int, float] = {}
        for block in left:
            losses[block] = self.held_out_loss(restore(student, self.teacher, [block]))
            self.progress("ranking layers", len(losses), len(left))
        return sorted(left, key=lambda block: (math.isnan(losses[block]), losses[block]))


def baseline(name: str, dense: Sequence[DenseWeights], chosen: Descriptions) -> list[dict[str, Any] | None]:
    """Descriptions of a baseline: where a layer is replaced, a dense layer of equal work, or none for that name."""
    out: list[dict[str, Any] | None] = []
    for layer, description in zip(dense, chosen, strict=True):
        share = flops(layer, description) / layer.flops_per_row
        replaced = (
            {"kind": "none"} if name == "none" else describe_narrow(layer, max(1, int(share * layer.neurons + 1e-6)))
        )
        out.append(None if description is None else replaced)
    return out


def active_share(dense: Sequence[DenseWeights], descriptions: Descriptions) -> float:
    """Share of the feedforwards' floating-point operations that the described layers spend."""
    spent = sum(flops(layer, d) for layer, d in zip(dense, descriptions, strict=True))
    return spent / sum(layer.flops_per_row for layer in dense)


def relative_loss(before: float, after: float, kind: Kind) -> float:
    """Share of the metric lost: of a perplexity the increase, of other metrics the decrease."""
    return after / before - 1 if kind == "causal" else 1 - after / before


def restore(student: Any, teacher: Any, blocks: Collection[int]) -> Any:
    """A copy of a student in which these blocks are the teacher's again, attention and all."""
    descriptions = list(student.config.fastff_feedforwards)
    for block in blocks:
        descriptions[block] = None
    restored = make_converted(student, descriptions)
    restored.load_state_dict({**teacher.state_dict(), **student.state_dict()}, strict=False)
    family = family_of(student.config.model_type)
    own, dense = family.blocks_of(restored), family.blocks_of(teacher)
    for block in blocks:
        own[block].load_state_dict(dense[block].state_dict())
    restored.train(False)
    return restored


def converted_blocks(model: Any) -> list[int]:
    """Numbers of the blocks whose feedforward is replaced."""
    family = family_of(model.config.model_type)
    slots = [family.slot_of(block) for block in family.blocks_of(model)]
    return [k for k, slot in enumerate(slots) if isinstance(slot, ConvertedFeedforward)]


def built_s(folder: Path) -> float:
    """Seconds that `build` took for the student of a folder; 0 where an earlier version did not say."""
    path = folder / BUILD
    return float(read_json(path, needs={"build_s": float})["build_s"]) if path.exists() else 0.0


def steps_taken(folder: Path) -> int:
    """Joint steps that the student of a folder has taken and keeps. Raises FileError."""
    facts = earlier.renamed(read_torch(folder / DISTILLED, needs={"facts": dict}, device=torch.device("cpu"))["facts"])
    with reading(folder / DISTILLED):
        return int(facts["step"])


def save(path: Path, student: Any, facts: dict[str, Any]) -> None:
    """Write a student's tensors and figures; an interruption leaves the old file or the new one."""
    write_torch(path, {"model": student.state_dict(), "facts": facts})


def load(path: Path, student: Any) -> dict[str, Any]:
    """Read what `save` wrote into a student of the same layers; returns the figures. Raises FileError."""
    stored = read_torch(path, needs={"model": dict, "facts": dict}, device=student.device)
    try:
        student.load_state_dict(stored["model"])
    except RuntimeError as error:
        raise FileError(f"{path} holds another model: remove it and run the same command again") from error
    facts: dict[str, Any] = earlier.renamed(stored["facts"])
    return facts
