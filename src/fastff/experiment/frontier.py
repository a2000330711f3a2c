"""Held-out loss against measured time: what people choose a feedforward by.

Losses come from the records of studies, one panel each, for losses of different texts do not compare. Times are of the
study's model in the native engine, in int8 and with random weights: a token after some others, and a prompt read at
once. All models of a preset are timed in turns, so that what slows the machine meets all of them, each as it runs by
itself: with its weights in the caches, as far as they fit. A dense width that was timed and not trained has the loss
that its arithmetic says, in a straight line over the logarithm between the dense layers of the study.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastff.engine.generate import Engine
from fastff.engine.native_export import export_model
from fastff.errors import FileError
from fastff.experiment.study_settings import FrontierSettings
from fastff.io import read_json, write_json, write_text
from fastff.machine import machine
from fastff.models import UltraFastBertForCausalLM, build_feedforward
from fastff.report.axis import Axis, si
from fastff.report.chart import Panel, Series, chart
from fastff.report.markdown import markdown_table
from fastff.timing import Timing, interleaved
from fastff.train.compare import MARKS, TREE, WIDE, by_router, compare, kind_of, loss_at, losses_of
from fastff.train.presets import Preset, configuration, cost_of, feedforward_of, layer_name, preset_of

SPEEDS, CHART = "speeds.json", "frontier.svg"
GROUP = "causal"
WARMING = 4  # turns of a model before the one that is timed: others have taken its place in the caches
Say = Callable[[str], None]
Entry = dict[str, Any]


def run(asked: FrontierSettings, say: Say = print) -> list[Entry]:
    """Time all layers anew if OUT/speeds.json lacks one or was timed otherwise; write the chart and say the table.

    Raises FileError for a folder without finished records of causal models.
    """
    asked.out.mkdir(parents=True, exist_ok=True)
    preset = preset_of(asked.preset)
    layers = {entry["layer"]: entry["feedforward"] for folder in asked.studies for entry in entries_of(folder)}
    layers |= {layer_name(feedforward_of(name, preset.hidden), preset.hidden): name for name in asked.layer}
    path = asked.out / SPEEDS
    kept = read_json(path) if path.is_file() else {}
    same = all(kept.get(name) == value for name, value in settings_of(asked).items())
    if not same or not set(layers) <= {cell["layer"] for cell in kept.get("cells", [])}:
        cells = measure(preset, layers, asked, say)
        write_json(path, {"machine": machine(), **settings_of(asked), "cells": cells})
    points = points_of(asked.studies, asked.out, asked.gpu_speed)
    write_text(asked.out / CHART, frontier_chart(points, asked.threads))
    say(table(points, asked.prompt))
    return points


def points_of(studies: Sequence[Path], out: Path, gpu_speed: Path | None) -> list[Entry]:
    """The variants of the studies and, last, the layers that are timed alone, from files."""
    cells = {cell["layer"]: cell for cell in read_json(out / SPEEDS)["cells"]}
    trained = trained_per_second(gpu_speed) if gpu_speed else {}
    points = [point for folder in studies for point in joined(folder.name, entries_of(folder), cells)]
    known = {point["layer"] for point in points}
    alone = [{"study": "", "name": "", **speeds(cell)} for name, cell in cells.items() if name not in known]
    return [{**point, "training": trained.get(point["layer"])} for point in (*points, *alone)]


def trained_per_second(folder: Path) -> dict[str, int]:
    """Tokens a second of training on one GPU by layer, compiled and as a CUDA graph."""
    records = [read_json(path) for path in sorted(folder.glob("*-1-compiled-graph.json"))]
    return {record["cost"]["layer"]: record["tokens_per_second"] for record in records}


def settings_of(asked: FrontierSettings) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in ("preset", "context", "prompt", "threads")}


def entries_of(folder: Path) -> list[Entry]:
    """The compared variants of a study, each with the feedforward that `fastff pretrain` was given."""
    records = [r for r in read_json(folder / "records.json") if r["finished"] and r["group"] == GROUP]
    if not records:
        raise FileError(f"{folder / 'records.json'} has no finished record of the group {GROUP!r}")
    given = {record["cost"]["layer"]: record["settings"]["feedforward"] for record in records}
    return [{**entry, "feedforward": given[entry["layer"]]} for entry in compare(records)]


def measure(preset: Preset, layers: dict[str, str], asked: FrontierSettings, say: Say) -> list[dict[str, Any]]:
    """Quartiles of microseconds a token, decoded and read as a prompt, and bytes, of the model with each layer."""
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            layer: _engine(preset, given, Path(folder) / str(n)) for n, (layer, given) in enumerate(layers.items())
        }
        calls = {name: _decoder(engine, asked) for name, engine in engines.items()}
        decode = interleaved(calls, asked.seconds, warming=WARMING)
        say(f"decoding is timed, {len(layers)} layers")
        calls = {name: _reader(engine, asked) for name, engine in engines.items()}
        prefill = interleaved(calls, asked.seconds, warming=WARMING)
    return [
        {
            "layer": layer,
            "kind": cost.kind,
            "flops": cost.flops,
            "decode_us": _quartiles(decode[layer], asked.tokens),
            "prefill_us": _quartiles(prefill[layer], asked.prompt),
            "stored": stored_weights(given, preset.hidden) * preset.layers,
        }
        for layer, given in layers.items()
        for cost in [cost_of(given, preset)]
    ]


def stored_weights(given: str, hidden: int) -> int:
    """Numbers of one feedforward's parameters: as many bytes in int8, without scales."""
    layer = build_feedforward(feedforward_of(given, hidden), hidden, device="meta")
    return 0 if layer is None else sum(parameter.numel() for parameter in layer.parameters())


def _engine(preset: Preset, given: str, out: Path) -> Engine:
    torch.manual_seed(0)
    description = feedforward_of(given, preset.hidden)
    config = configuration(preset, description, vocab_size=preset.vocab_size, pad=0, causal=True)
    export_model(UltraFastBertForCausalLM(config).train(False), None, out)
    return Engine(out)


def _ids(count: int) -> list[int]:
    return [1000 + 7 * i % 997 for i in range(count)]


def _decoder(engine: Engine, asked: FrontierSettings) -> Callable[[], object]:
    session, following = engine.session(threads=asked.threads), _ids(asked.tokens)
    session.feed(_ids(asked.context))

    def call() -> None:
        session.rewind(asked.context)
        for token in following:
            session.feed_one(token)

    return call


def _reader(engine: Engine, asked: FrontierSettings) -> Callable[[], object]:
    session, prompt = engine.session(threads=asked.threads), _ids(asked.prompt)

    def call() -> None:
        session.rewind()
        session.feed(prompt)

    return call


def _quartiles(timing: Timing, tokens: int) -> list[float]:
    return [value / tokens for value in (timing.p25_us, timing.p50_us, timing.p75_us)]


def speeds(cell: Mapping[str, Any]) -> Entry:
    """A timed layer with its tokens a second."""
    return {**cell, "decode": 1e6 / cell["decode_us"][1], "prefill": 1e6 / cell["prefill_us"][1]}


def joined(study: str, entries: Sequence[Entry], cells: Mapping[str, dict[str, Any]]) -> list[Entry]:
    """The variants of a study whose layers were timed, with their tokens a second, fastest decoding first; with them
    dense widths that were timed only, `line` for their loss. Layers behind a router have `equal_dense`, the loss of a
    dense layer that decodes as fast, between the two around it."""
    timed = [entry for entry in entries if entry["layer"] in cells]
    points = [{**speeds(cells[entry["layer"]]), **entry, "study": study} for entry in timed]
    dense = {point["flops"]: point["loss"] for point in points if kind_of(point) == WIDE}
    for cell in cells.values():
        trained = cell["layer"] in {point["layer"] for point in points}
        if cell["kind"] == WIDE and not trained and (line := loss_at(cell["flops"], dense)) is not None:
            points.append({**speeds(cell), "study": study, "name": "", "line": line})
    plain = {point["decode"]: loss_of(point) for point in points if kind_of(point) in (WIDE, "none")}
    for point in points:
        point["equal_dense"] = loss_at(point["decode"], plain) if kind_of(point) == TREE else None
    return sorted(points, key=lambda point: -point["decode"])


def loss_of(point: Entry) -> float:
    """Measured, or read off the line of the dense layers."""
    return float(point["loss"] if "loss" in point else point["line"])


def table(points: Sequence[Entry], prompt: int) -> str:
    """As a Markdown table; a loss in brackets is read off."""
    head = ["study", "feedforward", "layer"]
    head += ["decoding, tokens/s", f"{prompt}-token prompt, tokens/s", "training, tokens/s"]
    head += ["feedforwards, MB in int8", "held-out loss", "dense of equal decoding", "ahead, nats"]
    rows = []
    for point in points:
        equal, training = point.get("equal_dense"), point["training"]
        measured = [f"{point['decode']:,.0f}", f"{point['prefill']:,.0f}", f"{training:,}" if training else ""]
        loss = losses_of(point) if "loss" in point else f"({point['line']:.3f})" if "line" in point else ""
        compared = ["", ""] if equal is None else [f"{equal:.3f}", f"{equal - point['loss']:+.3f}"]
        names = [point["study"], point["name"], point["layer"]]
        rows.append([*names, *measured, f"{point['stored'] / 1e6:.1f}", loss, *compared])
    return markdown_table(head, rows)


def frontier_chart(points: Sequence[Entry], threads: int) -> str:
    """One panel a study, as SVG text: held-out loss against tokens a second; dense layers are joined by a line."""
    cores = "one thread" if threads == 1 else f"{threads} threads"
    panels = []
    for study in dict.fromkeys(point["study"] for point in points if "loss" in point):
        mine = [point for point in points if point["study"] == study]
        kinds = (
            ("dense swiglu", [p for p in mine if kind_of(p) == WIDE], "circle", "solid"),
            *((name, those, MARKS[name], "") for name, those in by_router(mine).items()),
            ("no feedforward", [p for p in mine if kind_of(p) == "none"], "triangle", ""),
        )
        series = [
            Series(
                name, [(p["decode"], loss_of(p)) for p in of], color, mark, line, [p["name"] or p["layer"] for p in of]
            )
            for color, (name, of, mark, line) in enumerate(kinds)
            if of
        ]
        x = Axis(f"tokens a second, decoded, int8, {cores}", log=True, format=si, margin=0.2)
        panels.append(Panel(series, x, Axis("held-out loss, nats a token"), title=study))
    return chart(panels, title="Held-out loss against the speed of decoding", width=480 * len(panels), height=420)
