"""What is asked for of one scoring on GLUE."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fastff.errors import TrainingError
from fastff.train.tasks import TASKS

RENAMED_OPTIONS = {"rate": "lr", "layer_rate": "layer_lr_scale"}  # since version 0.1


@Parameter(name="*")
@dataclass(frozen=True)
class GlueSettings:
    """One scoring of a model."""

    model: str
    """Directory or hub name of a model with its tokenizer."""
    _: KW_ONLY
    out: Path
    """Folder of scores and predictions; a second run adds what is missing."""
    data: Path | None = None
    """Folder with TASK/*.parquet; default: the hub."""
    tasks: Annotated[tuple[str, ...], Parameter(name="--task")] = tuple(TASKS)
    """A task; may be repeated; default: all nine."""
    seeds: int = 5
    """Fine-tunings of each task."""
    epochs: int | None = None
    """Passes over each train split; default: 5, CoLA 15."""
    steps: int | None = None
    """Updates of every task, instead of epochs."""
    lr: float = 4e-5
    """Peak learning rate."""
    layer_lr_scale: float = 1.0
    """Learning-rate multiplier for conditional layers; 0 freezes them."""
    batch: int = 16
    """Rows of a step."""
    dropout: float = 0.1
    """Dropout of the model's own parts."""
    limit: int | None = None
    """Use the first N rows only, for a trial; every note says so."""
    max_train_rows: int | None = None
    """Learn from N rows, drawn once, of a longer train split; every note says so."""
    precision: str = "fp32"
    """fp32 or bf16 (mixed)."""
    cpu: bool = False
    """Use the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise TrainingError(f"precision {self.precision!r} is not fp32 or bf16")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise TrainingError(f"tasks {', '.join(unknown) or 'none'}: expected some of {', '.join(TASKS)}")
        for name in ("seeds", "lr", "batch", "epochs", "steps", "limit", "max_train_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"{name} {value} is not above 0")
        if not self.layer_lr_scale >= 0:
            raise TrainingError(f"layer_lr_scale {self.layer_lr_scale} is below 0")
        if self.epochs is not None and self.steps is not None:
            raise TrainingError(f"epochs {self.epochs} and steps {self.steps}: only one of them can be given")

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a second run to go on; more tasks and more seeds may be asked for."""
        free = ("out", "tasks", "seeds", "cpu")
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name not in free
        }
