"""What is asked for of one run of pretraining, and what of it makes a run the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fastff.errors import TrainingError
from fastff.train.layer_training import LayerTraining

if TYPE_CHECKING:
    from fastff.train.presets import Preset

# What may differ between a run and its continuation: where things are and how they are done, not what is learned.
_FREE = (
    "out",
    "data",
    "keep",
    "max_run_seconds",
    "tensorboard",
    "cpu",
    "fsdp",
    "graph",
    "text",
    "valid",
    "tokenizer",
    "save_every",
)
_RENAMED = {"length": "seq_len", "rate": "lr", "warm_up": "warmup", "start": "init_from"}  # since version 0.1
_RENAMED_OF_LAYERS = {"rate": "lr_scale", "level_rate": "level_lr_scale"}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """One run of pretraining; None takes the preset's value."""

    out: Path
    """Folder of checkpoints, the model and result.json; run the same command again to resume."""
    text: tuple[str, ...]
    """File, directory, or datasets:NAME[:CONFIG[:SPLIT]]; may be repeated."""
    preset: str = "tiny"
    """Size of the model: tiny, mini, small or base."""
    feedforward: str = "dense-gelu"
    """A name of `fastff variants`, narrow:NAME, or a description in JSON."""
    objective: str = "masked"
    """masked or causal."""
    steps: int | None = None
    """Budget in optimizer steps; default: the preset's."""
    seconds: float | None = None
    """Budget in seconds of training, over all continuations."""
    valid: tuple[str, ...] = ()
    """Held-out text; default: the last windows of the text."""
    valid_windows: int = 256
    """Windows to hold out."""
    column: str = "text"
    """Text column of tables."""
    batch: int | None = None
    """Rows of a step, over all processes."""
    micro_batch: int | None = None
    """Rows of one forward pass."""
    layers: int | None = None
    """Layers of the model."""
    seq_len: int | None = None
    """Tokens of a window."""
    lr: float | None = None
    """Peak learning rate."""
    warmup: float = 0.15
    """Share of the budget in which the learning rate rises."""
    ramp: float = 0.3
    """Share of the budget in which the batch grows."""
    init_from: Path | None = None
    """Model directory whose weights to start from: the same tensors, by name and shape."""
    tokenizer: str | None = None
    """Directory, file or hub name; default: train one on the text."""
    vocab_size: int | None = None
    """Entries of the tokenizer to train."""
    data: Path | None = None
    """Folder of tokenizer and tokens, to share between runs; default: OUT/data."""
    max_tokens: int | None = None
    """Most tokens to read of the text."""
    seed: int = 0
    """Seed of weights, order and masks."""
    precision: str = "fp32"
    """fp32 or bf16 (mixed)."""
    compiled: Annotated[bool, Parameter(name="--compile")] = False
    """Use torch.compile."""
    log_every: int = 10
    """Steps between points of the loss curve."""
    eval_every: int | None = None
    """Steps between scores on held-out text."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    max_run_seconds: float | None = None
    """Checkpoint and exit after N seconds; run the same command again to resume."""
    tensorboard: bool = False
    """Write TensorBoard logs."""
    cpu: bool = False
    """Use the CPU even if there is a GPU."""
    fsdp: bool = False
    """On several GPUs: shard weights, gradients and optimizer (FSDP2) instead of copying them (DDP)."""
    graph: bool = False
    """On one GPU, causal: record forward and backward as a CUDA graph, which speeds up small models."""
    layer: Annotated[LayerTraining, Parameter(parse=False)] = field(default_factory=LayerTraining)
    """How conditional layers learn."""

    def __post_init__(self) -> None:
        if self.objective not in ("masked", "causal"):
            raise TrainingError(f"objective {self.objective!r} is not masked or causal")
        if self.precision not in ("fp32", "bf16"):
            raise TrainingError(f"precision {self.precision!r} is not fp32 or bf16")
        if self.steps is not None and self.seconds is not None:
            raise TrainingError(f"the budget is steps or seconds, not both: {self.steps} and {self.seconds}")
        if not self.text:
            raise TrainingError("no text is given")
        for name in (
            "steps",
            "seconds",
            "batch",
            "micro_batch",
            "layers",
            "lr",
            "log_every",
            "eval_every",
            "save_every",
            "keep",
            "valid_windows",
            "max_tokens",
            "vocab_size",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"{name} {value} is not above 0")
        least = 3 if self.objective == "masked" else 2  # tokens, with those that begin and end a window
        if self.seq_len is not None and self.seq_len < least:
            raise TrainingError(f"seq_len {self.seq_len} is not at least {least}")
        if self.graph and self.objective != "causal":
            raise TrainingError(
                f"graph needs the objective causal: what {self.objective} training computes hangs on its masks"
            )
        if self.fsdp and (self.layer.scales_routing or self.layer.balance):
            raise TrainingError("level_lr_scale, freeze_after and balance are not made for fsdp")
        for name in ("warmup", "ramp"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise TrainingError(f"{name} {getattr(self, name)} is not in [0, 1)")

    @property
    def model(self) -> Preset:
        """The preset with the changes asked for."""
        from fastff.train.presets import preset_of, with_changes

        return with_changes(
            preset_of(self.preset),
            batch=self.batch,
            micro_batch=self.micro_batch or (self.batch and min(self.batch, preset_of(self.preset).micro_batch)),
            layers=self.layers,
            seq_len=self.seq_len,
            lr=self.lr,
            vocab_size=self.vocab_size,
            steps=self.steps,
        )

    def identity(self, tokenizer: Any, text_sha256: str | None) -> dict[str, Any]:
        """What must be equal for a run to go on from a checkpoint. text_sha256: of the tokens, None if not known."""
        from fastff.text.tokenizer import fingerprint

        asked = {name: value for name, value in asdict(self).items() if name not in _FREE}
        made = {
            "text": list(self.text),
            "valid": list(self.valid),
            "tokenizer": fingerprint(tokenizer),
            "text_sha256": text_sha256,
            "init_from": None if self.init_from is None else str(self.init_from),
        }
        return {**asked, **asdict(self.model), **made}


def upgraded(kept: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that an earlier version kept, under the names of this one; what it did not know is as asked."""
    found = {_RENAMED.get(name, name): value for name, value in kept.items()}
    if isinstance(layer := found.get("layer"), dict):
        named = {_RENAMED_OF_LAYERS.get(name, name): value for name, value in layer.items()}
        found["layer"] = {**asdict(LayerTraining()), **named}  # options that came later change nothing by default
    return {"text_sha256": identity["text_sha256"], **found}
