"""The parts of the demo, each measured here and now; what a part needs and is not there is said instead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastff
from fastff.demo import search
from fastff.demo.data import documents
from fastff.demo.demo_settings import DemoSettings
from fastff.demo.shipped_models import PACKAGE, Shipped, dense_embedding, in_engine
from fastff.engine.generate import load, pieces
from fastff.explore import ExploreSettings
from fastff.explore.explorer_page import explore
from fastff.machine import machine
from fastff.timing import interleaved

PROMPT = "The old house stood at the end of the lane, and"
EXPLORER = "explorer.html"
EXPLORED_TOKENS = 4000
DEPTH = 11  # of the published tree
WIDTH, DENSE_NEURONS = 768, 3072


@dataclass
class Showcase:
    """What was found. rows: (what, figure, weak point) of the table; the others: what the page shows of each part."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    search: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    layer: dict[str, Any] | None = None
    explorer: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run(settings: DemoSettings, models: Shipped, work: Path, say: Callable[[str], object]) -> Showcase:
    """All parts. work: a folder for what is unpacked and exported."""
    begin = time.perf_counter()
    found = Showcase(machine=machine())
    say("semantic search over novels")
    _search(found, settings, models, work)
    say("text of a conditional model")
    _generation(found, settings, models, work)
    say("one layer")
    _layer(found, settings)
    say("where tokens go")
    _explorer(found, settings, models)
    found.seconds = time.perf_counter() - begin
    return found


def _search(found: Showcase, settings: DemoSettings, models: Shipped, work: Path) -> None:
    dense = dense_embedding(work)
    if dense is None:
        found.missing.append(f"search beside the dense model: the package {PACKAGE} is not installed")
    if models.embedding is None:
        found.missing.append(f"search by a converted model: {settings.models} holds none")
    chosen = {"converted": models.embedding, "dense": dense}
    pairs = search.sentences(settings.sentences)
    texts = [text for _, text in pairs]
    exports = {name: in_engine(path, work) for name, path in chosen.items() if path is not None}
    if not exports:
        return
    results = search.searched(exports, texts)
    shown = results.get("converted") or results["dense"]
    agreed = search.agreement(results["converted"], results["dense"]) if len(results) == 2 else None
    found.search = {
        "sentences": len(texts),
        "rates": {name: one.sentences_per_s for name, one in results.items()},
        "agreement": agreed,
        "by": "converted" if "converted" in results else "dense",
        "hits": [(query, [pairs[i] for i in best[:3]]) for query, best in zip(search.QUERIES, shown.hits, strict=True)],
    }
    for name, one in results.items():
        weak = (
            f"shares {100 * agreed:.0f} % of the dense model's ten best hits"
            if agreed is not None and name == "converted"
            else ""
        )
        found.rows.append((f"MiniLM, {name}: sentences a second", f"{one.sentences_per_s:,.0f}", weak))


def _generation(found: Showcase, settings: DemoSettings, models: Shipped, work: Path) -> None:
    if models.causal is None:
        found.missing.append(f"text by a conditional causal model: {settings.models} holds none")
        return
    if models.dense is None:
        found.missing.append(f"its dense twin: {settings.models} holds none of {models.causal.name}")
    chosen = {"conditional": models.causal, "dense": models.dense}
    texts = _generated({n: in_engine(path, work) for n, path in chosen.items() if path is not None}, settings.tokens)
    found.generation = {"prompt": PROMPT, "texts": texts}
    for name, (_, rate) in texts.items():
        found.rows.append(
            (f"causal model, {name}: tokens a second", f"{rate:,.0f}", "small models: read the text above")
        )


def _generated(models: Mapping[str, Path], tokens: int) -> dict[str, tuple[str, float]]:
    """Texts, and tokens a second: of the median step, models taking turns token by token, so that other work meets all.

    The likeliest tokens, so that another run writes the same.
    """
    engines = {name: load(path) for name, path in models.items()}
    streams = {
        name: engine.generate_ids(engine.encode_prompt(PROMPT), max_new_tokens=tokens)
        for name, engine in engines.items()
    }
    made: dict[str, list[int]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(tokens):
        for name, stream in streams.items():
            start = time.perf_counter()
            made[name] += islice(stream, 1)
            steps[name].append(time.perf_counter() - start)
    return {
        name: (
            "".join(pieces(engine.tokenizer, iter(made[name]))),
            1 / statistics.median(steps[name][: max(1, len(made[name]))]),
        )
        for name, engine in engines.items()
    }


@torch.inference_mode()
def _layer(found: Showcase, settings: DemoSettings) -> None:
    torch.manual_seed(0)
    layer = fastff.FFF(WIDTH, depth=DEPTH).eval()
    dense = nn.Sequential(nn.Linear(WIDTH, DENSE_NEURONS), nn.GELU(), nn.Linear(DENSE_NEURONS, WIDTH)).eval()
    timings = []
    for rows in (1, 128):
        x = torch.randn(rows, WIDTH)
        taken = interleaved({"tree": partial(layer, x), "dense": partial(dense, x)}, settings.seconds / 2)
        timings.append((rows, taken["tree"].p50_us, taken["dense"].p50_us))
    found.layer = {"neurons": layer.neurons, "active": layer.active_neurons, "dense": DENSE_NEURONS, "timings": timings}
    for rows, tree_us, dense_us in timings:
        what = f"one layer, {rows} row{'s' * (rows > 1)}: tree of depth {DEPTH}"
        weak = "worth as little as a dense layer of 8 neurons" if rows == 1 else ""
        found.rows.append((what, f"{tree_us:,.0f} µs; dense {dense_us:,.0f} µs in PyTorch", weak))


def _explorer(found: Showcase, settings: DemoSettings, models: Shipped) -> None:
    """The page of the first shipped model that PyTorch can open: an export holds no module to look into."""
    chosen = next(
        (p for p in (models.embedding, models.causal) if p is not None and (p / "config.json").is_file()), None
    )
    if chosen is None:
        found.missing.append(f"the routing explorer: {settings.models} holds no model that PyTorch opens")
        return
    texts = [" ".join(paragraphs)[:20_000] for paragraphs in list(documents("unseen.txt.xz").values())[:2]]
    made = explore(
        ExploreSettings(str(chosen), text=tuple(texts), out=settings.out / EXPLORER, max_tokens=EXPLORED_TOKENS)
    )
    found.explorer = EXPLORER
    tokens = sum(len(text.pieces) for text in made.texts)
    found.rows.append((f"routes of {chosen.name}", f"{tokens:,} tokens, {len(made.layers)} layers: {EXPLORER}", ""))
