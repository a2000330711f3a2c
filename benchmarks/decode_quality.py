"""What rounding costs a decoder: perplexity, and greedy tokens on the reference's prefix (`decode.py --quality`)."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import decode

WINDOWS, LENGTH, GREEDY, PROMPT = 8, 512, 256, 16
TEXT = Path(__file__).parents[1] / "src" / "fastff" / "demo" / "data" / "unseen.txt.xz"

Logits = Callable[[list[int]], Tensor]  # (tokens, vocabulary)


def quality(folder: Path) -> list[dict[str, Any]]:
    """Of every engine beside Transformers' fp32 with the same numbers. Text: novels of the demo, which none has been
    fitted to."""
    from fastff.engine.generate import Engine

    reference = reference_model()
    engines = {name: Engine(folder / file) for name, file in files().items()}
    tokenizer = engines["fastff int8"].tokenizer
    with lzma.open(TEXT, "rt") as text:
        ids = torch.tensor(tokenizer.encode(text.read(200_000)))
    logits: dict[str, Logits] = {"Transformers fp32": lambda part: reference(torch.tensor([part])).logits[0]}
    logits |= {name: engine.logits for name, engine in engines.items()}
    with torch.inference_mode():
        continued = reference.generate(
            ids[None, :PROMPT], max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
        )[0].tolist()
        rows = [{"engine": name, **measured(of, ids, continued)} for name, of in logits.items()]
    for row in rows:
        row["perplexity_change_percent"] = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
        print(row, flush=True)
    return rows


def files() -> dict[str, str]:
    return {
        name: file
        for name, (make, file) in decode.ENGINES.items()
        if make is decode.Fastff and file in ("dense", "dense-int4", "dense-Q4_0")
    }


def reference_model() -> Any:
    from transformers import LlamaForCausalLM

    from fastff.engine.gguf import Gguf, GgufWeights, configuration

    gguf = Gguf(decode.smol())
    config = configuration(gguf)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(dict(GgufWeights(gguf, config)), strict=False)
    model.tie_weights()
    return model


def measured(logits: Logits, ids: Tensor, continued: list[int]) -> dict[str, float]:
    """continued: a prompt and the reference's greedy tokens after it, which are what it predicts itself."""
    loss = 0.0
    for begin in range(0, WINDOWS * LENGTH, LENGTH):
        target = ids[begin + 1 : begin + LENGTH + 1]
        loss += float(functional.cross_entropy(logits(ids[begin : begin + LENGTH].tolist()).float(), target)) / WINDOWS
    predicted = logits(continued).argmax(1)[PROMPT - 1 : -1]
    agreed = (predicted == torch.tensor(continued[PROMPT:])).double().mean()
    return {
        "perplexity": float(torch.tensor(loss).exp()),
        "tokens": WINDOWS * LENGTH,
        "greedy_tokens": GREEDY,
        "greedy_agreement": float(agreed),
    }
