"""What to convert and how, and the budgets as people write them: 10%, 2x, 3%,10%, 1x128."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from fastff.convert.distil import Recipe
from fastff.models.kinds import Kind

DEFAULT_ACTIVE = 0.1
BASELINES = ("narrow", "pruned", "none")
DEVICES = ("cpu", "cuda")
# Examples a step, as in the runs of experiments/convert; sentences of two dozen tokens, blocks of 128.
BATCH: dict[Kind, int] = {"embedding": 256, "classifier": 128, "masked": 128, "causal": 32}
_POSITIVE = ("rows", "layer_steps", "steps", "max_length", "max_tokens", "probe_rows")


@dataclass(frozen=True)
class ConversionSettings:
    """One conversion.

    model        directory (or hub name) of a dense Transformers model
    text         unlabelled text, one example a line
    out          directory to write
    active       largest share of the converted layers' floating-point operations that the trees may spend, routing
                 included; default 0.1 where no speedup is asked for
    speedup      instead: how many times faster the whole model must become on this machine, at every one of `shapes`
    max_loss     largest relative loss of the metric: the most damaging layers are restored to dense until it is kept
    curve        further values of `active` to convert to, for the quality against speed in the report
    shapes       (sequences, tokens a sequence) of the timed calls
    shared       neurons of the part that every row computes beside the trees; None: none, half or
                 three quarters of the work, by measurement
    time_on      "cpu" or "cuda": where layers and models are timed; None: where the conversion computes
    tables       what quality is measured on; the first decides, the others are told at the end. For embedding
                 models a table of sentence1, sentence2, label; for classifiers of sentence, label; for causal models
                 a text (default: a part of `text` that is kept aside)
    rows         calibration tokens per layer
    layer_steps  steps of each layer alone
    steps        steps of all layers together, or fewer if `seconds` are given
    seconds      that the whole conversion may take, but for restoring layers: fewer candidates and steps, if need be
    batch        examples a step; 0: as many as BATCH says
    max_length   tokens an example, or as many as the model takes      max_tokens  tokens read from the text
    probe_rows   tokens of each measurement before the choice of layers
    timing_s     seconds of timing a layer; whole models get six times as long
    lr, lr_others, routing_lr_scale, dense_fade, average   see `distil.Recipe`
    baselines    distilled with the same recipe, for the report: "narrow" dense layers of equal work, the dense layers
                 "pruned" to it, "none" at all
    keep_slow    convert layers whose tree is measured to be slower than the dense layer, too
    """

    model: str
    text: Path
    out: Path
    active: float | None = None
    speedup: float | None = None
    max_loss: float | None = None
    curve: tuple[float, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ((1, 128), (32, 128))
    shared: int | None = None
    time_on: str | None = None
    tables: tuple[Path, ...] = ()
    rows: int = 200_000
    layer_steps: int = 150
    steps: int = 1100
    seconds: float | None = None
    batch: int = 0
    max_length: int = 128
    max_tokens: int = 20_000_000
    probe_rows: int = 16_384
    timing_s: float = 0.15
    lr: float = Recipe.lr
    lr_others: float = Recipe.lr_others
    routing_lr_scale: float = Recipe.routing_lr_scale
    dense_fade: float = Recipe.dense_fade
    average: float = Recipe.average
    seed: int = Recipe.seed
    baselines: tuple[str, ...] = BASELINES
    keep_slow: bool = False

    def __post_init__(self) -> None:
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
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    @property
    def students(self) -> int:
        """Models that are distilled: the trees of every budget, and their baselines."""
        return 1 + len(self.baselines) + len(self.curve) * len({*self.baselines, "tree"} - {"none"})

    @property
    def share(self) -> float:
        """The share of the work that candidates are made for: that asked for, or the default."""
        return DEFAULT_ACTIVE if self.active is None else self.active


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
