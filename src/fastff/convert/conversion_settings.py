"""What to convert and how, and the budgets as people write them: 10%, 2x, 3%,10%, 1x128."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from fastff.convert.distil import Recipe
from fastff.models.kinds import Kind

DEFAULT_ACTIVE = 0.1
BASELINES = ("narrow", "pruned", "none")
DEVICES = ("cpu", "cuda", "native", "openvino")
# Examples a step, as in the runs of experiments/convert; sentences of two dozen tokens, blocks of 128.
BATCH: dict[Kind, int] = {"embedding": 256, "classifier": 128, "masked": 128, "causal": 32, "image": 64}
# Of a kind of model whose own were compared (experiments/convert/decoder-rates.json); other kinds have the recipe's.
RATES: dict[Kind, dict[str, float]] = {"causal": {"lr": 1.2e-3, "lr_others": 4e-4, "lr_routers": 1e-4, "beta2": 0.999}}
_RATES = ("lr", "lr_others", "lr_routers", "beta2")
_HIDDEN = Parameter(parse=False)  # a field of the class that is no option
_POSITIVE = ("rows", "layer_steps", "steps", "max_length", "max_tokens", "probe_rows")


def percent(text: str) -> float:
    """0.1 from "10%", "10 %" or "0.1". Raises ValueError."""
    return _number(text, "%", "10%", 0.01)


def times(text: str) -> float:
    """2.0 from "2x" or "2". Raises ValueError."""
    return _number(text, "x", "2x", 1.0)


def _number(text: str, unit: str, example: str, scale: float) -> float:
    found = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+)\s*({unit})?\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is not a number like {example}")
    return float(found[1]) * (scale if found[2] or scale == 1.0 else 1.0)


def shape(text: str) -> tuple[int, int]:
    """(32, 128) from "32x128": sequences, tokens a sequence. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is not a shape like 32x128")
    return int(found[1]), int(found[2])


def _written(parse: Callable[[str], Any]) -> Parameter:
    """One value, as people write it."""
    return Parameter(converter=lambda _, tokens: parse(tokens[0].value), n_tokens=1)


def _list_of(parse: Callable[[str], Any]) -> Parameter:
    """Values apart by commas."""

    def read(_: object, tokens: Sequence[Token]) -> tuple[Any, ...]:
        return tuple(parse(part) for token in tokens for part in token.value.split(",") if part)

    return Parameter(converter=read, n_tokens=1, show_default=False)


@Parameter(name="*")
@dataclass(frozen=True)
class ConversionSettings:
    """One conversion. Raises ValueError for values that cannot be."""

    model: str
    """Directory or hub name of a dense Transformers model, or a GGUF file."""
    _: KW_ONLY
    text: Path | None = None
    """Unlabelled text, one example a line (.txt, .xz, .gz)."""
    images: Path | None = None
    """Instead of --text, for an image model: unlabelled pictures (.png, .jpg, .jpeg, .webp) in a folder or below it."""
    out: Path
    """Directory to write. Run the same command again to resume an interrupted conversion."""
    active: Annotated[float | None, _written(percent)] = None
    """Largest share of the dense layers' work, routing included, like 10% (the default without --speedup)."""
    speedup: Annotated[float | None, _written(times)] = None
    """Instead of --active: how many times faster the whole model must become, at every one of the shapes, like 2x."""
    max_loss: Annotated[float | None, _written(percent)] = None
    """Largest relative loss of the metric, like 1%. Gives the most damaging blocks back to the dense model until it is
    kept."""
    curve: Annotated[tuple[float, ...], _list_of(percent)] = ()
    """Further shares of the work to convert at, for the report's curve, like 3%,25%."""
    shapes: Annotated[tuple[tuple[int, int], ...], _list_of(shape)] = ((1, 128), (32, 128))
    """Calls that are timed: sequences x tokens, like 1x128,32x128 (the default). For an image model pictures x any
    number."""
    shared: int | None = None
    """Neurons that every token uses beside trees and experts. Default: none, half or three quarters of the work, by
    measurement."""
    time_on: str | None = None
    """Where models are timed, and so chosen: cpu, cuda, or an engine, native or openvino. Default: where the conversion
    computes."""
    tables: Annotated[tuple[Path, ...], Parameter(name="--table")] = ()
    """Evaluation table: sentence1, sentence2 and label for an embedding model, sentence and label for a classifier; for
    a causal model a text (default: a part of --text that is kept aside). May be repeated: the first decides. An image
    model has none: its features are compared on a part of --images."""
    rows: int = 200_000
    """Calibration tokens, for an image model patches, per layer."""
    layer_steps: Annotated[int, _HIDDEN] = 150
    """Steps of each layer alone."""
    steps: int = 1100
    """Steps of the joint distillation; fewer if --seconds asks for it."""
    seconds: float | None = None
    """Time limit of the whole conversion in seconds, kept by fewer candidates and steps; --max-loss is not counted."""
    batch: int = 0
    """Examples a step; 0: 256, 128, 64 or 32 by the kind of model."""
    max_length: int = 128
    """Tokens of an example; the rest is cut."""
    max_tokens: Annotated[int, _HIDDEN] = 20_000_000
    """Tokens read from the text."""
    probe_rows: Annotated[int, _HIDDEN] = 16_384
    """Tokens of each measurement before the choice of layers."""
    timing_s: Annotated[float, _HIDDEN] = 0.15
    """Seconds of timing a layer; whole models get six times as long."""
    # Of the joint distillation: see distil.Recipe. None: that of RATES for the kind of model, or the recipe's own.
    lr: Annotated[float | None, _HIDDEN] = None
    lr_others: Annotated[float | None, _HIDDEN] = None
    lr_routers: Annotated[float | None, _HIDDEN] = None
    beta2: Annotated[float | None, _HIDDEN] = None
    hidden_share: Annotated[float, _HIDDEN] = Recipe.hidden_share
    bf16: Annotated[bool, _HIDDEN] = Recipe.bf16
    routing_lr_scale: Annotated[float, _HIDDEN] = Recipe.routing_lr_scale
    dense_fade: float = Recipe.dense_fade
    """Share of the steps in which dense layers fade out; 0: they are replaced at once."""
    average: Annotated[float, _HIDDEN] = Recipe.average
    seed: Annotated[int, _HIDDEN] = Recipe.seed
    baselines: Annotated[tuple[str, ...], _list_of(str)] = BASELINES
    """Baselines distilled with the same recipe, any of narrow,pruned,none: dense layers of equal work, the dense layers
    pruned to it, no feedforward at all. Default: all three."""
    beside: str | None = None
    """Another model of the same kind, directory or hub name, whose metric and times the report shows, too."""
    gguf: bool = False
    """Read MODEL as a GGUF file, whatever its name."""
    keep_slow: bool = False
    """Also convert layers that every candidate makes slower here."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.images is None):
            given = "neither text nor images" if self.text is None else f"text {self.text} and images {self.images}"
            raise ValueError(f"{given} given, expected one: text for a language model, images for an image model")
        for share in (*self.curve, *(() if self.active is None else (self.active,))):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"active {share} is not in (0, 1]")
        if self.active is not None and self.speedup is not None:
            raise ValueError(f"active {self.active} and speedup {self.speedup} are two budgets: give one")
        if self.speedup is not None and not self.speedup > 1.0:
            raise ValueError(f"speedup {self.speedup} is not above 1")
        if self.max_loss is not None and not 0.0 < self.max_loss < 1.0:
            raise ValueError(f"max_loss {self.max_loss} is not between 0 and 1")
        if self.seconds is not None and not self.seconds > 0.0:
            raise ValueError(f"seconds {self.seconds} is not above 0")
        if self.time_on is not None and self.time_on not in DEVICES:
            raise ValueError(f"time_on {self.time_on!r} is not one of {', '.join(DEVICES)}")
        for name in ("shared", "batch"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 0")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        _ = self.recipe  # checks its own values
        for baseline in self.baselines:
            if baseline not in BASELINES:
                raise ValueError(f"baseline {baseline!r} is not one of {', '.join(BASELINES)}")
        if not self.shapes or min(min(shape) for shape in self.shapes) < 1:
            raise ValueError(f"shapes {self.shapes} are not pairs of at least 1")

    @property
    def recipe(self) -> Recipe:
        """The joint distillation's part of this."""
        found = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        return Recipe(**{name: value for name, value in found.items() if value is not None})

    def of_kind(self, kind: Kind) -> ConversionSettings:
        """With what is left open as it is best for a kind of model."""
        own = RATES.get(kind, {})
        rates = {name: own.get(name, getattr(Recipe, name)) for name in _RATES if getattr(self, name) is None}
        return replace(self, batch=self.batch or BATCH[kind], **rates)

    @property
    def students(self) -> int:
        """Models that are distilled: the trees of every budget, and their baselines."""
        return 1 + len(self.baselines) + len(self.curve) * len({*self.baselines, "chosen"} - {"none"})

    @property
    def share(self) -> float:
        """The share of the work that candidates are made for: that asked for, or the default."""
        return DEFAULT_ACTIVE if self.active is None else self.active
