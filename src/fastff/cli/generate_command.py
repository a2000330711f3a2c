"""`fastff generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from fastff.cli.console import console


def generate(
    model: Path,
    prompt: str,
    /,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    threads: int = 0,
) -> int:
    """Stream text from a model that `fastff export --to native` wrote, and say how fast it came.

    Parameters
    ----------
    model
        Directory of the export.
    prompt
        Text to continue.
    max_new_tokens
        Most tokens to generate.
    temperature
        0 takes the likeliest token; above, tokens are drawn.
    top_k
        Draw from this many of the likeliest tokens; 0 for all.
    top_p
        Draw from the likeliest tokens whose probabilities add up to this; 1 for all.
    seed
        Seed of the random numbers.
    chat
        Put the prompt into the model's chat template.
    threads
        Threads to work on; 0 for all that this process may use.
    """
    from fastff.engine.generate import Sampling, load, pieces

    engine = load(model)
    ids = engine.encode_prompt(prompt, chat=chat)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    times = [time.perf_counter()]

    def timed() -> Iterator[int]:
        for token in engine.generate_ids(ids, max_new_tokens=max_new_tokens, sampling=sampling, threads=threads):
            times.append(time.perf_counter())
            yield token

    for piece in pieces(engine.tokenizer, timed(), ids):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    tokens = len(times) - 1
    if tokens > 1:
        first, rate = times[1] - times[0], (tokens - 1) / (times[-1] - times[1])
        console.print(
            f"{tokens} tokens, {rate:.1f} a second; the first after {1e3 * first:.0f} ms ({len(ids)} of prompt)",
            style="dim",
            markup=False,
        )
    return 0
