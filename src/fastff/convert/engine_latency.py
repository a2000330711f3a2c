"""Times in the engine that a model will run in: fastff's native one, or OpenVINO.

An engine runs whole models, so a layer's time is what all blocks with that layer take more than blocks without
feedforwards, divided by their number. Encoders read a batch; decoders in the native engine generate: a call of a shape
is that many tokens of every sequence, one after the other, of which DECODED are timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastff import engine
from fastff.convert.choose_layers import LatencyProfile
from fastff.engine import native_export, openvino
from fastff.engine.generate import Engine
from fastff.models.converted import make_converted
from fastff.models.families import family_of
from fastff.models.kinds import kind_of
from fastff.timing import interleaved

ENGINES = ("native", "openvino")
DECODED = 8  # tokens that are timed of a decoder's call
PATIENCE = 10.0  # seconds; calls that take longer are measured once

Shape = tuple[int, int]
Call = Callable[[], object]
Description = Mapping[str, Any] | None


class EngineTimes:
    """Whole models in one engine, each kind of layer exported and timed once."""

    def __init__(self, teacher: Any, where: str, shapes: Sequence[Shape], seconds: float) -> None:
        self.where, self.shapes, self.seconds = where, shapes, seconds
        self._teacher = copy.deepcopy(teacher).cpu().float().eval()
        self._blocks = len(family_of(teacher.config.model_type).blocks_of(teacher))
        self._decodes = where == "native" and kind_of(teacher.config) == "causal"
        self._known: dict[str, tuple[float, ...]] = {}

    def whole(self, description: Description) -> tuple[float, ...]:
        """Microseconds, at every shape, of the model with the described layer in all blocks; None: the dense model."""
        key = str(description)
        if key not in self._known:
            made = self._teacher if description is None else make_converted(self._teacher, [description] * self._blocks)
            self._known[key] = self.of({"": made})[""]
        return self._known[key]

    def layer(self, description: Description) -> tuple[float, ...]:
        """Microseconds of one block's feedforward."""
        without = self.whole({"kind": "none"})
        pairs = zip(self.whole(description), without, strict=True)
        return tuple(max(0.0, new - rest) / self._blocks for new, rest in pairs)

    def profile(self) -> LatencyProfile:
        """Times of the dense model and its feedforwards."""
        return LatencyProfile(self.whole(None), (self.layer(None),) * self._blocks)

    def of(self, models: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
        """Microseconds of several models at every shape, their calls alternating."""
        with tempfile.TemporaryDirectory() as folder:
            runs = {name: self._open(model, Path(folder, str(k))) for k, (name, model) in enumerate(models.items())}
            found: dict[str, list[float]] = {name: [] for name in models}
            took: dict[Any, dict[str, float]] = {}
            for shape in self.shapes:
                alike = shape[1] if self._decodes else shape  # a token takes as long in every sequence
                if alike not in took:
                    calls = {name: run(shape) for name, run in runs.items()}
                    timings = interleaved(calls, self.seconds, torch.device("cpu"), patience=PATIENCE)
                    took[alike] = {name: timing.p50_us for name, timing in timings.items()}
                times = shape[0] * shape[1] / DECODED if self._decodes else 1.0
                for name, us in took[alike].items():
                    found[name].append(us * times)
        return {name: tuple(times) for name, times in found.items()}

    def _open(self, model: Any, folder: Path) -> Callable[[Shape], Call]:
        """The model in the engine: gives for a shape a call; of a decoder, one that generates DECODED tokens."""
        model = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
        model = model.float().eval()
        if self.where == "openvino":
            output = "logits" if kind_of(model.config) != "embedding" else "last_hidden_state"
            openvino.export(model, None, folder, output=output, weights="fp32")
            return _reader(openvino.read(folder), model.config)
        if kind_of(model.config) == "causal":
            native_export.export_model(model, None, folder)
            return _generator(engine.load(folder))
        native_export.export_encoder(model, None, str(folder.parent), kind_of(model.config), folder)
        return _encoder(engine.load(folder), model.config)


def _ids(config: Any, shape: Shape) -> torch.Tensor:
    length = min(shape[1], getattr(config, "max_position_embeddings", shape[1] + 2) - 2)
    return torch.randint(5, config.vocab_size, (shape[0], length), generator=torch.Generator().manual_seed(0))


def _encoder(loaded: Any, config: Any) -> Callable[[Shape], Call]:
    def of(shape: Shape) -> Call:
        ids = _ids(config, shape).tolist()
        return lambda: loaded.hidden_states(ids)

    return of


def _reader(run: Callable[..., Any], config: Any) -> Callable[[Shape], Call]:
    def of(shape: Shape) -> Call:
        ids = _ids(config, shape).numpy()
        mask = (ids >= 0).astype(ids.dtype)
        return lambda: run(input_ids=ids, attention_mask=mask)

    return of


def _generator(loaded: Any) -> Callable[[Shape], Call]:
    assert isinstance(loaded, Engine)

    def of(shape: Shape) -> Call:
        length = max(1, min(shape[1], loaded.positions - DECODED))  # what the model has room for
        session = loaded.session(capacity=length + DECODED)
        session.feed([k % loaded.vocab_size for k in range(5, 5 + length)])

        def call() -> None:
            session.rewind(length)
            for token in range(DECODED):
                session.feed_one(token)

        return call

    return of
