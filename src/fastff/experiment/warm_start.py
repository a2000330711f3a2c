"""Turn the feedforwards of a pretrained dense model into trees, or narrow layers, for `fastff pretrain --init-from`.

Decisions, leaves and outputs come from the dense layers and their inputs, as in `fastff convert`; each layer is then
fitted alone to its dense layer. Nothing is distilled from the whole model. A tree's description must have bias and
shared (0 for none), since a fitted layer ends in an output bias; a dense one must have bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import fastff.models  # noqa: F401  registers the model type
from fastff.convert.student import build_student
from fastff.experiment.study_settings import WarmStartSettings
from fastff.io import read_json, reading, write_tensors
from fastff.text.tokenizer import Vocabulary, load_tokenizer
from fastff.text.tokens import Tokens
from fastff.train.presets import feedforward_of
from fastff.train.pretrain import quietly


class Resident:
    """Inputs and residuals of one layer's rows, kept on the device; what `fastff.convert` reads from a disk."""

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        self.x, self.residual = x, residual

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, which: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.x[which].to(device).float(), self.residual[which].to(device).float()


@torch.no_grad()
def watch(model: Any, windows: Tensor, batch: int = 64) -> list[Resident]:
    """Every layer's rows (x and what its output is added to) while the model reads windows (windows, seq_len)."""
    layers = model.base_model.layers
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    hooks = []
    for layer, found in zip(layers, seen, strict=True):

        def note(module: Any, given: Any, normalised: Tensor, found: Any = found) -> None:
            found.append((normalised.flatten(0, 1).half(), given[0].flatten(0, 1)))

        hooks.append(layer.feedforward_norm.register_forward_hook(note))
    for piece in windows.split(batch):
        model.base_model(input_ids=piece.to(model.device))
    for hook in hooks:
        hook.remove()
    return [Resident(*(torch.cat(parts) for parts in zip(*found, strict=True))) for found in seen]


def renamed(state: dict[str, Tensor], narrow: bool) -> dict[str, Tensor]:
    """The student's tensors under the names of a pretrained model with the description. Narrow: its one layer has the
    output bias itself."""
    kept = {name: tensor.contiguous().cpu() for name, tensor in state.items() if name != "decoder.weight"}
    if not narrow:
        return kept
    found = {name.replace(".feedforward.layer.", ".feedforward."): tensor for name, tensor in kept.items()}
    for name in [name for name in found if name.endswith(".feedforward.bias")]:
        found[name.replace("feedforward.bias", "feedforward.linear_out.bias")] += found.pop(name)
    return found


def run(asked: WarmStartSettings) -> list[float]:
    """Write `out`/model.safetensors; returns, per layer, the unexplained variance of the dense layer's effect. Raises
    TrainingError for a model or tokens that cannot be read, ValueError for a description that does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    causal = read_json(asked.model / "config.json", needs={"is_decoder": bool})["is_decoder"]
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    with quietly(), reading(asked.model, "make that model again"):
        model: Any = kind.from_pretrained(asked.model).to(device).eval()  # type: ignore[arg-type]
    seq_len = model.config.max_position_embeddings
    vocabulary = Vocabulary.of(load_tokenizer(asked.model))
    tokens = Tokens(asked.data / "train", vocabulary, seq_len, closed=not causal)
    count = min(len(tokens), -(-asked.rows // seq_len))
    captured: Any = watch(model, tokens.windows(range(0, len(tokens) // count * count, len(tokens) // count)))
    description = feedforward_of(asked.feedforward, model.config.hidden_size)
    layers = [description] * model.config.num_hidden_layers
    student, errors = build_student(model, layers, captured, steps=asked.steps, seed=asked.seed)
    state = renamed(student.state_dict(), description["kind"] == "dense")
    write_tensors(asked.out / "model.safetensors", state)
    return [error for error in errors if error is not None]
