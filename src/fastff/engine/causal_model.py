"""A decoder's engine behind Transformers' `generate`: tensors of token ids in, tensors out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastff.engine.generate import Engine, Sampling
from fastff.errors import FastffError

__all__ = ["CausalModel"]

MOST_SEED = 1 << 63


class CausalModel:
    """Stands where a program calls `generate` of a causal model of Transformers.

    folder: written by `fastff export --to native`. What `generate` draws follows `torch.manual_seed`, with other tokens
    than Transformers'. Raises CheckpointError for another directory.
    """

    def __init__(self, folder: str | Path, *, map: bool = False, threads: int = 0) -> None:
        self.engine = Engine(Path(folder), map=map)
        self.threads = threads

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        pad_token_id: int | None = None,
        streamer: Any = None,
    ) -> Tensor:
        """Token ids (batch, length) of the prompts and their continuations, as Transformers gives them.

        inputs or input_ids  (batch, length) int64
        attention_mask       (batch, length), 0 where a prompt is padded: before its first token
        max_new_tokens       after the prompts; without it they end at max_length, prompts included
        do_sample            draw with temperature, top_k and top_p instead of taking the likeliest token
        pad_token_id         fills up continuations that ended earlier than others; by default the first stop token
        streamer             is given tokens as they are made (`put`, `end`); for a single prompt

        Other options are a TypeError. Raises FastffError for prompts that cannot be, or do not fit the positions.
        """
        given = _given(inputs if input_ids is None else input_ids)
        prompts = _prompts(given, attention_mask)
        length = max(map(len, prompts))
        wanted = max_length - length if max_new_tokens is None else max_new_tokens
        if wanted < 1:
            raise FastffError(f"max_length {max_length} leaves no room after prompts of {length} tokens")
        if streamer is not None and len(prompts) > 1:
            raise FastffError(f"a streamer takes one prompt, not {len(prompts)}")
        drawn = temperature if do_sample else 0.0
        stop = sorted(self.engine.stop)
        padding = pad_token_id if pad_token_id is not None else stop[0] if stop else 0
        if streamer is not None:
            streamer.put(given.cpu())
        made = []
        for prompt in prompts:
            seed = int(torch.randint(MOST_SEED - 1, ())) if do_sample else 0
            sampling = Sampling(temperature=drawn, top_k=top_k if do_sample else 0, top_p=top_p, seed=seed)
            made.append(self._continued(prompt, wanted, sampling, streamer))
        longest = max(map(len, made))
        rows = [ids + [padding] * (longest - len(ids)) for ids in made]
        return torch.cat([given.cpu(), torch.tensor(rows, dtype=torch.int64).view(len(rows), longest)], 1)

    def _continued(self, prompt: list[int], wanted: int, sampling: Sampling, streamer: Any) -> list[int]:
        """New tokens, the stop token that ended them included."""
        made: list[int] = []
        for token in self.engine.generate_ids(
            prompt, max_new_tokens=wanted, sampling=sampling, threads=self.threads, keep_stop=True
        ):
            made.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return made


def _given(given: Tensor | None) -> Tensor:
    """Raises FastffError for what is not a batch of prompts."""
    if given is None or given.dim() != 2 or given.numel() == 0 or given.is_floating_point():
        seen = None if given is None else f"{tuple(given.shape)} {given.dtype}"
        raise FastffError(f"input_ids {seen} are not whole numbers (batch, length) of at least one token")
    return given


def _prompts(given: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Without padding. Raises FastffError for a mask that leaves no prompts."""
    if mask is None:
        mask = torch.ones_like(given)
    if mask.shape != given.shape:
        raise FastffError(f"attention_mask {tuple(mask.shape)} is not {tuple(given.shape)}")
    kept = mask.bool()
    if not bool(kept[:, -1].all()) or bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise FastffError("attention_mask hides tokens after a prompt's first one: pad before the prompts")
    return [row[seen].tolist() for row, seen in zip(given, kept, strict=True)]
