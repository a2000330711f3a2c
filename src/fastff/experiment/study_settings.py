"""What is asked for of the studies of several variants."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fastff.errors import TrainingError
from fastff.named_values import named_value

PLAIN = "plain"
FORMS = (PLAIN, "compiled", "graph", "compiled-graph")


@Parameter(name="*")
@dataclass(frozen=True)
class PlanSettings:
    """A run of a plan."""

    plan: Path
    """JSON list of variants."""
    _: KW_ONLY
    out: Path
    """Folder of records.json and charts."""
    data: Path
    """Folder of tokens; without --text, of those named train and valid."""
    runs: Path
    """Folder of the runs."""
    steps: int
    """Steps of every variant, times its own factor."""
    text: tuple[str, ...] = ()
    """Text, as of `fastff pretrain`; may be repeated."""
    valid: tuple[str, ...] = ()
    """Held-out text, as of `fastff pretrain`; may be repeated."""
    seeds: int = 1
    """Number of seeds; all variants run with one before the next begins."""
    first_seed: int = 0
    """First seed."""
    seconds: float | None = None
    """Checkpoint and exit after N seconds; run the same command again to resume."""
    least: float = 0.0
    """Begin no run with fewer seconds left of --seconds."""
    at_once: int = 1
    """Runs on each GPU at once."""
    only: tuple[str, ...] = ()
    """A variant to run; may be repeated; default: all, in the order of the plan."""
    option: tuple[str, ...] = ()
    """NAME=VALUE of `fastff pretrain`, for all variants; may be repeated."""
    keep: bool = False
    """Keep the records of other variants and seeds in --out."""

    @property
    def pairs(self) -> dict[str, str]:
        """The options by name; a flag has no value."""
        return {name.replace("_", "-"): value for name, value in map(named_value, self.option)}

    @property
    def every_seed(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


@Parameter(name="*")
@dataclass(frozen=True)
class GlueVariantsSettings:
    """A scoring of several variants."""

    variants: tuple[str, ...]
    """Names in --runs; NAME@OPTION=VALUE@... has options of its own; unfinished ones are left out."""
    _: KW_ONLY
    runs: Path
    """Folder of the runs of `fastff experiment pretrain`."""
    data: Path
    """Folder with TASK/*.parquet."""
    out: Path
    """Folder of glue.json and glue.svg."""
    work: Path | None = None
    """Folder of scores and predictions; default: RUNS/glue."""
    tasks: Annotated[tuple[str, ...], Parameter(name="--task")] = ()
    """A task; may be repeated; default: all nine."""
    seeds: int = 3
    """Fine-tunings of each task."""
    at_once: int = 1
    """Processes at once."""
    seconds: float | None = None
    """Stop after N seconds; run the same command again to resume."""
    option: tuple[str, ...] = ()
    """NAME=VALUE of `fastff glue`, for all variants; may be repeated."""

    def pretrained(self, variant: str) -> Path:
        """What was left of a variant's pretraining."""
        return self.runs / variant.partition("@")[0]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """A measurement of training speed on several GPUs."""

    data: Path
    """Folder of tokens named train and valid."""
    runs: Path
    """Folder of the runs."""
    out: Path
    """Folder of the records, FEEDFORWARD-GPUS.json; what is there is not run again."""
    gpus: tuple[int, ...] = (1, 2, 4)
    """Number of GPUs; may be repeated."""
    feedforward: tuple[str, ...] = ("dense-swiglu", "36x5-leaf4-swiglu-gate")
    """A name of `fastff variants`; may be repeated."""
    preset: str = "small"
    """Size of the model."""
    rows: int = 256
    """Rows of a GPU and step."""
    steps: int = 80
    """Optimizer steps."""
    form: tuple[str, ...] = (PLAIN,)
    """plain, compiled, graph or compiled-graph; may be repeated. Graphs are for one GPU, and left out on several."""
    option: tuple[str, ...] = ()
    """A word to pass to `fastff pretrain`; may be repeated."""

    def __post_init__(self) -> None:
        for form in self.form:
            if form not in FORMS:
                raise TrainingError(f"form {form!r} is not one of {', '.join(FORMS)}")


@Parameter(name="*")
@dataclass(frozen=True)
class FrontierSettings:
    """Losses of studies, and the speed of their models."""

    studies: tuple[Path, ...]
    """Folders with records.json, all of models of one preset."""
    _: KW_ONLY
    out: Path
    """Folder of speeds.json and frontier.svg; layers already there are not timed again."""
    preset: str = "small"
    """Size of the models."""
    layer: tuple[str, ...] = ()
    """A further layer to time, which no study has; may be repeated."""
    gpu_speed: Path | None = None
    """Folder of `fastff experiment gpu-speed --form compiled-graph`: adds the speed of training on one GPU."""
    seconds: float = 20.0
    """Time decoding for N seconds, and reading prompts for as long."""
    context: int = 64
    """Tokens before those that are decoded."""
    tokens: int = 24
    """Tokens decoded in a turn."""
    prompt: int = 128
    """Tokens read at once."""
    threads: int = 1
    """Threads to work on."""


@Parameter(name="*")
@dataclass(frozen=True)
class WarmStartSettings:
    """The conversion of a pretrained model to start from."""

    model: Path
    """OUT/model of a dense run of `fastff pretrain`."""
    data: Path
    """Folder of the tokens of that run."""
    out: Path
    """Folder of model.safetensors, for `fastff pretrain --init-from`."""
    _: KW_ONLY
    feedforward: str
    """A description as JSON, or a name of `fastff variants`."""
    rows: int = 131072
    """Rows of each layer to learn from."""
    steps: int = 300
    """Steps in which each layer is fitted alone."""
    seed: int = 0
    """Seed of the rows and their order."""


@Parameter(name="*")
@dataclass(frozen=True)
class PackSettings:
    """Tokens to take along."""

    data: Path
    """Folder of `fastff pretrain --data`."""
    target: Path
    """Tar file to write."""
    _: KW_ONLY
    most: int | None = None
    """Most tokens of the text to pack."""


@Parameter(name="*")
@dataclass(frozen=True)
class UnpackSettings:
    """Tokens taken along."""

    source: Path
    """Tar file of `fastff experiment pack-tokens`."""
    data: Path
    """Folder to make, for `fastff pretrain --data DATA --text train --valid valid`."""


@Parameter(name="*")
@dataclass(frozen=True)
class RedrawSettings:
    """Tables and charts of what was measured."""

    out: Path
    """Folder of records.json or glue.json."""
    _: KW_ONLY
    plan: Path | None = None
    """Plan whose missing variants to list."""
