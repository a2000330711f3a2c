"""Turn the feedforwards of a pretrained dense model into trees, or narrow layers, for `fastff pretrain --init-from`.

python runs/warm_start.py MODEL DATA OUT --feedforward DESCRIPTION [--rows N] [--steps N]

MODEL is what `fastff pretrain` left of a dense run, DATA its folder of tokens. Turns, leaves and outputs come from the
dense layers and their inputs, as in `fastff convert`; each layer is then fitted alone to its dense layer. Nothing is
distilled from the whole model. A tree's description must have bias and shared (0 for none), since a fitted layer ends
in an output bias; a dense one must have bias. Prints the share of each dense layer's effect that is unexplained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import fastff.models  # noqa: F401  registers the model type
from fastff.convert.student import build_student
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
    """Every layer's rows (x and what its output is added to) while the model reads windows (windows, length)."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--feedforward", required=True, help="a description as JSON, or a name")
    parser.add_argument("--rows", type=int, default=131072, help="rows of each layer to learn from")
    parser.add_argument("--steps", type=int, default=300, help="steps in which each layer is fitted alone")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = json.loads((asked.model / "config.json").read_text(encoding="utf-8"))
    kind = AutoModelForCausalLM if config["is_decoder"] else AutoModelForMaskedLM
    with quietly():
        model: Any = kind.from_pretrained(asked.model).to(device).eval()  # type: ignore[arg-type]
    length = model.config.max_position_embeddings
    vocabulary = Vocabulary.of(load_tokenizer(asked.model))
    tokens = Tokens(asked.data / "train", vocabulary, length, closed=not config["is_decoder"])
    count = min(len(tokens), -(-asked.rows // length))
    captured: Any = watch(model, tokens.windows(range(0, len(tokens) // count * count, len(tokens) // count)))
    description = feedforward_of(asked.feedforward, model.config.hidden_size)
    layers = [description] * model.config.num_hidden_layers
    student, errors = build_student(model, layers, captured, steps=asked.steps, seed=asked.seed)
    asked.out.mkdir(parents=True, exist_ok=True)
    partial = asked.out / ".model.partial"
    save_file(renamed(student.state_dict(), description["kind"] == "dense"), partial)
    partial.rename(asked.out / "model.safetensors")
    print("unexplained", " ".join(f"{error:.3f}" for error in errors if error is not None))


if __name__ == "__main__":
    main()
