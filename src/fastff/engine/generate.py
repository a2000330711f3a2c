"""Text from an exported decoder: an immutable engine, and generation as a stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastff.engine.facts import MODEL_FILE, DecoderFacts, read_facts
from fastff.errors import CheckpointError, FastffError
from fastff.ops.native_model import NativeModel, NativeSession, Sampling

__all__ = ["Engine", "Sampling", "load"]

Prompt = str | Sequence[int]


class Engine:
    """A decoder from a directory that `fastff export --to native` wrote.

    It never changes: any number of threads may use it, each call with a session of its own.
    """

    def __init__(self, folder: Path, *, map: bool = False) -> None:
        facts = read_facts(folder, DecoderFacts)
        self.model = NativeModel(folder / MODEL_FILE, map=map)
        self.stop = frozenset(facts.stop)
        self._folder = folder

    @cached_property
    def tokenizer(self) -> Any:
        """Made at its first use, since that takes longer than to open the model. None where it came without one: then
        prompts are token ids."""
        return _tokenizer(self._folder)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def positions(self) -> int:
        """Tokens of a prompt and its continuation, at most."""
        return self.model.positions

    def session(self, capacity: int | None = None, *, threads: int = 0) -> NativeSession:
        """A conversation of up to `capacity` tokens (default: all positions of the model)."""
        return NativeSession(self.model, self.positions if capacity is None else capacity, threads=threads)

    def encode_prompt(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with chat as a user's message in the model's own template.

        Raises CheckpointError for text without a tokenizer, FastffError for an empty prompt.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise CheckpointError("this model was exported without a tokenizer: give token ids")
            if chat:
                message = [{"role": "user", "content": prompt}]
                text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                ids = self.tokenizer.encode(text, add_special_tokens=False)
            else:
                ids = prompt_ids(self.tokenizer, prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise FastffError("the prompt is empty: at least one token is needed")
        return list(ids)

    def logits(self, ids: Sequence[int], *, threads: int = 0) -> Tensor:
        """(len(ids), vocab_size): what the model predicts after each of these tokens."""
        logits = self.session(max(1, len(ids)), threads=threads).feed(ids, want_logits=True)
        return torch.empty(0, self.vocab_size) if logits is None else logits

    def generate_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        session: NativeSession | None = None,
        threads: int = 0,
        keep_stop: bool = False,
    ) -> Iterator[int]:
        """Tokens that continue `ids`, one by one, until a stop token, `max_new_tokens`, or the positions end.

        session: one to go on with, whose tokens come before `ids`. keep_stop: yield the stop token too.
        Raises FastffError for a prompt that does not fit.
        """
        sampling = sampling or Sampling()
        if session is None:
            session = self.session(min(self.positions, len(ids) + max_new_tokens), threads=threads)
        session.seed(sampling.seed)
        session.feed(ids)
        for number in range(max_new_tokens):
            token = session.sample(sampling)
            stopped = token in self.stop
            if keep_stop or not stopped:
                yield token
            if stopped:
                return
            if number + 1 < max_new_tokens:
                if len(session) == session.capacity:
                    return
                session.feed_one(token)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        chat: bool = False,
        threads: int = 0,
    ) -> Iterator[str]:
        """Text that continues a prompt, in pieces as they are made; arguments of `generate_ids`, `encode_prompt`."""
        ids = self.encode_prompt(prompt, chat=chat)
        if self.tokenizer is None:
            raise CheckpointError("this model was exported without a tokenizer: use generate_ids")
        made = self.generate_ids(ids, max_new_tokens=max_new_tokens, sampling=sampling, threads=threads)
        yield from pieces(self.tokenizer, made, ids)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to go on: without the end that some tokenizers give a sentence."""
    ids: list[int] = tokenizer.encode(text)
    if ids and ids[-1] == tokenizer.sep_token_id != tokenizer.eos_token_id:
        return ids[:-1]
    return ids


def pieces(tokenizer: Any, tokens: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Text of tokens as soon as it is certain: a character may need several of them. before: as `TokenText`'s."""
    text = TokenText(tokenizer, before)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    if rest := text.rest():
        yield rest


class TokenText:
    """The text of tokens that come one by one. Tokens are read beside the one before them: what joins two words, or
    none, shows in their text together only.

    before: the tokens that these continue
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._before = list(before[-1:])  # whose text is out
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """What is certain now; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def rest(self) -> str:
        """What is left at the end, complete or not."""
        return self._text() if self._pending else ""

    def _text(self) -> str:
        before = len(self._decoded(self._before))
        return self._decoded(self._before + self._pending)[before:]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
        return text


def load(folder: str | Path, *, map: bool = False) -> Engine:
    """Open a directory that `fastff export --to native` wrote.

    map: share the weights' pages with other processes instead of copying them to huge pages, which are faster. Raises
    CheckpointError for another directory, FastffError for a damaged model file.
    """
    return Engine(Path(folder), map=map)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
