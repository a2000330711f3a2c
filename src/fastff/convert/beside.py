"""Another public model beside the converted one: its metric and its times, in the same report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.dense_model import load_dense, longest_input
from fastff.convert.engine_latency import ENGINES, EngineTimes
from fastff.convert.latency import WHOLE, model_us, place_of
from fastff.convert.pictures import picture_size
from fastff.convert.quality import measures_of
from fastff.errors import CheckpointError
from fastff.models.kinds import Kind


@dataclass(frozen=True)
class Beside:
    """A model that is not converted, loaded before the long work. Metrics are those of the tables that were given: a
    perplexity is of its own tokens, and features are of its own width, and so none is told of what is kept aside."""

    name: str
    model: Any
    processor: Any
    kind: Kind

    @classmethod
    def of(cls, name: str, kind: Kind) -> Beside:
        """Raises CheckpointError for a model that cannot be loaded or is of another kind."""
        model, processor, found = load_dense(name)
        if found != kind:
            raise CheckpointError(f"beside {name} is a model of the kind {found}, expected {kind}")
        return cls(name, model, processor, kind)

    def figures(self, settings: ConversionSettings, work: Path) -> dict[str, Any]:
        """Name, the metric on every table, whose texts are cut to what this model takes, and milliseconds at every
        shape; None at one that is too long for it."""
        sizes = {
            "max_length": longest_input(self.model, self.processor, self.kind, settings.max_length),
            "max_tokens": settings.max_tokens,
        }
        measures = measures_of(self.kind, self.processor, settings.tables, work / "beside", **sizes)
        scores = [measure(self.model) for measure in measures.values()]
        longest = longest_input(self.model, self.processor, self.kind, max(length for _, length in settings.shapes))
        fitting = [shape for shape in settings.shapes if shape[1] <= longest or self.kind == "image"]
        times = dict(zip(fitting, self._times_us(settings, fitting), strict=True))
        latency_ms = [times[shape] / 1e3 if shape in times else None for shape in settings.shapes]
        return {"model": self.name, "scores": scores, "latency_ms": latency_ms}

    def _times_us(self, settings: ConversionSettings, shapes: Sequence[tuple[int, int]]) -> Sequence[float]:
        seconds = WHOLE * settings.timing_s
        if settings.time_on in ENGINES and shapes:
            return EngineTimes(self.model, str(settings.time_on), shapes, seconds).whole(None)
        model = self.model.to(place_of(self.model, settings.time_on))
        picture = picture_size(self.processor) if self.kind == "image" else None
        return [model_us({"": model}, shape, seconds, picture=picture)[""] for shape in shapes]
