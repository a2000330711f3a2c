"""Fill the masks of a sentence and follow its pieces through the trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastff.demo.data import MASK, Corpus
from fastff.inspect import decisions, visited

BEST = 5


@torch.no_grad()
def fill(model: nn.Module, corpus: Corpus, sentence: str) -> dict[str, Any]:
    """The likeliest pieces of every mask, and each piece's path through each tree of each layer.

    Returns sentence, pieces, masks (position, best pieces with probabilities) and paths by layer: heap indices
    (pieces, trees, levels) with their decisions in words.
    """
    model.eval()
    encoded = corpus.tokenizer.encode(sentence)
    tokens = torch.tensor([encoded.ids])
    outputs: list[Any] = []
    taken = visited(model, lambda: outputs.append(model(input_ids=tokens)))
    chances = outputs[0].logits[0].softmax(-1)
    masks = []
    for position in (tokens[0] == MASK).nonzero().flatten().tolist():
        best = chances[position].topk(BEST)
        guesses = [
            [corpus.tokenizer.id_to_token(i), p]
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        masks.append({"position": position, "best": guesses})
    return {
        "sentence": sentence,
        "pieces": encoded.tokens,
        "masks": masks,
        "paths": {name: path[0].tolist() for name, path in taken.items()},
        "decisions": {name: [[decisions(tree) for tree in piece] for piece in path[0]] for name, path in taken.items()},
    }
