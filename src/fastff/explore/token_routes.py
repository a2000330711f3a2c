"""The leaves and margins of every token of some texts, in every conditional layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.errors import CheckpointError, FastffError
from fastff.inspect import routed_layers
from fastff.layers import FFF
from fastff.routers import Router
from fastff.text.positions import token_positions

_WINDOW = 512  # tokens that pass the model at once, if it has as many positions


@dataclass(frozen=True)
class LayerRoutes:
    """One layer. leaf (tokens, trees * chosen) int64: within its tree, tree by tree. sureness (tokens,): of FFF the
    margin, of a layer behind a router the smallest gate; `sureness_is` says which.

    leaves: of a tree. depth: 0 where no tree routes.
    """

    name: str
    trees: int
    depth: int
    leaves: int
    chosen: int
    sureness_is: str
    leaf: Tensor
    sureness: Tensor


@dataclass(frozen=True)
class TextTokens:
    """title: of a choice. pieces: what each token stands for, with the space before it."""

    title: str
    pieces: list[str]


@dataclass(frozen=True)
class Exploration:
    """texts in the order of the tokens of `layers`. left_out: tokens that the limit cut off."""

    model: str
    texts: list[TextTokens]
    layers: list[LayerRoutes]
    left_out: int


def explored(model: Any, tokenizer: Any, name: str, texts: Sequence[str], *, max_tokens: int) -> Exploration:
    """Run a Transformers model over texts (or the files that hold them) and note its routes.

    Raises CheckpointError for a model without a conditional layer, FastffError for texts without a token.
    """
    if not routed_layers(model):
        raise CheckpointError(f"{name} has no conditional layer with one of fastff's routers: nothing to explore")
    found: list[TextTokens] = []
    notes: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in routed_layers(model)}
    room, left_out = max_tokens, 0
    with _noted(model, notes), torch.inference_mode():
        for given in texts:
            title, text = _read(given)
            ids, pieces = _tokens(tokenizer, text)
            left_out += max(0, len(ids) - room)
            ids, pieces = ids[:room], pieces[:room]
            room -= len(ids)
            for window in _windows(ids, model.config):
                model(input_ids=window.unsqueeze(0))
            if ids:
                found.append(TextTokens(title, pieces))
    if not found:
        raise FastffError("the texts have no token")
    layers = [_joined(layer_name, routed_layers(model)[layer_name], parts) for layer_name, parts in notes.items()]
    return Exploration(name, found, layers, left_out)


def _read(given: str) -> tuple[str, str]:
    """Title and text of a text or a file."""
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        is_file = False
    if is_file:
        return path.name, path.read_text(encoding="utf-8", errors="replace")
    return (given if len(given) <= 60 else f"{given[:57]}..."), given


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Ids and pieces of a text; special tokens by their names."""
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids: list[int] = found["input_ids"]
    pieces, end = [], 0
    for token, (start, stop) in zip(ids, found["offset_mapping"], strict=True):
        if stop > start:
            pieces.append(text[min(end, start) if text[end:start].isspace() else start : stop])
            end = stop
        else:
            pieces.append(str(tokenizer.convert_ids_to_tokens(token)))
    return ids, pieces


def _windows(ids: Sequence[int], config: Any) -> Iterator[Tensor]:
    length = min(_WINDOW, token_positions(config, _WINDOW))
    for first in range(0, len(ids), length):
        yield torch.tensor(ids[first : first + length])


@contextmanager
def _noted(model: nn.Module, notes: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Within the context every call of a conditional layer adds leaf and sureness of its rows to `notes`."""
    hooks = []
    for name, layer in routed_layers(model).items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            notes[name].append(_routes(cast(FFF | ConditionalFeedforward, module), inputs[0]))

        hooks.append(layer.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routes(layer: FFF | ConditionalFeedforward, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(layer, FFF):
        routed = layer.routed(rows)
        return routed.leaf, routed.margin.float()
    choose = cast(Callable[[Tensor], tuple[Tensor, Tensor]], layer.router)
    leaf, gate = choose(rows)
    return leaf, gate.float().amin(-1)


def _joined(name: str, layer: nn.Module, parts: Sequence[tuple[Tensor, Tensor]]) -> LayerRoutes:
    leaf, sureness = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    if isinstance(layer, FFF):
        c = layer.config
        return LayerRoutes(name, c.trees, c.depth, 2**c.depth, c.chosen, "margin", leaf, sureness)
    r = cast(Router, cast(ConditionalFeedforward, layer).router).config
    leaves = r.leaves // r.trees
    return LayerRoutes(
        name,
        r.trees,
        r.depth if r.is_tree else 0,
        leaves,
        leaf.shape[1] // r.trees,
        "smallest gate",
        leaf % leaves,
        sureness,
    )
