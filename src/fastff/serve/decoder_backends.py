"""Decoders to serve: fastff's engine or PyTorch, behind sessions that read tokens and draw the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastff.engine.generate import prompt_ids
from fastff.errors import CheckpointError
from fastff.ops.native_model import Sampling
from fastff.serve.refusals import invalid
from fastff.serve.serve_settings import BackendName

__all__ = ["DecoderModel", "Sampling", "Session", "open_native", "open_torch"]


class Session(Protocol):
    """One text: what it has read, and what follows. One thread at a time may use it."""

    def seed(self, seed: int) -> None: ...

    def feed(self, ids: Sequence[int], /) -> object: ...

    def feed_one(self, token: int, /) -> None: ...

    def sample(self, sampling: Sampling, /) -> int: ...


@dataclass(frozen=True)
class DecoderModel:
    """session: of a capacity in tokens. positions: tokens of a prompt and its continuation."""

    backend: BackendName
    session: Callable[[int], Session]
    tokenizer: Any
    stop: frozenset[int]
    positions: int
    vocab_size: int
    threads: int

    kind = "causal"

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text."""
        return prompt_ids(self.tokenizer, text)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's template. Raises Refused where it does not take it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise invalid("the model has no chat template: use /v1/completions", param="messages")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is the model's, and may raise anything
            raise invalid(f"the model's chat template refuses the messages: {error}", param="messages") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def open_native(folder: Path, threads: int) -> DecoderModel:
    """An export for fastff's engine."""
    from fastff.engine.generate import Engine

    engine = Engine(folder)
    if engine.tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer: export a model that has one")

    def session(capacity: int) -> Session:
        return engine.session(capacity, threads=threads)

    return DecoderModel("native", session, engine.tokenizer, engine.stop, engine.positions, engine.vocab_size, threads)


def open_torch(folder: Path, model: Any, tokenizer: Any, threads: int) -> DecoderModel:
    """A causal model of Transformers, dense or conditional."""
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer")
    config = model.config
    stop = getattr(model.generation_config, "eos_token_id", None)
    stops = [] if stop is None else stop if isinstance(stop, Iterable) else [stop]
    positions = getattr(config, "max_position_embeddings", None) or 2048
    return DecoderModel(
        "torch", lambda _: TorchSession(model), tokenizer, frozenset(stops), positions, config.vocab_size, threads
    )


class TorchSession:
    """A conversation with a model of Transformers, which keeps what it has read in its own cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._logits = torch.empty(0)
        self._generator = torch.Generator()

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed & (1 << 63) - 1)

    def feed(self, ids: Sequence[int], /) -> None:
        with torch.inference_mode():
            found = self._model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True)
        self._cache, self._logits = found.past_key_values, found.logits[0, -1].float()

    def feed_one(self, token: int, /) -> None:
        self.feed([token])

    def sample(self, sampling: Sampling, /) -> int:
        if sampling.temperature == 0:
            return int(self._logits.argmax())
        values, places = (self._logits / sampling.temperature).sort(descending=True)
        chances = values.softmax(-1)
        before = chances.cumsum(-1) - chances
        kept = before < sampling.top_p
        if sampling.top_k:
            kept[sampling.top_k :] = False
        kept[0] = True
        return int(places[torch.multinomial(chances * kept, 1, generator=self._generator)])
