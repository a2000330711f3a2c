"""Model sizes and the feedforwards that are compared in them, with the arithmetic of each.

`base` is the paper's model (arXiv:2311.10770): 16 layers of width 768, sequences of 128. The feedforward variants are
given for its width and scaled to the others: one tree loses levels, several trees lose trees, experts lose neurons.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastff.config import TreeConfig
from fastff.errors import ShapeError, TrainingError
from fastff.models import UltraFastBertConfig, build_feedforward
from fastff.models.feedforward import complete

RECOMMENDED = "flat-80-top3"
NARROW = "narrow:"  # prefix: the dense layer with the arithmetic of the variant after it


@dataclass(frozen=True)
class Preset:
    """A model and its recipe. batch: rows of a step at the end of the ramp; micro_batch: rows of one forward pass."""

    name: str
    hidden: int
    layers: int
    heads: int
    seq_len: int
    vocab_size: int
    batch: int
    micro_batch: int
    lr: float
    steps: int
    tokenizer_characters: int


PRESETS = {
    preset.name: preset
    for preset in (
        # name, hidden, layers, heads, seq_len, vocabulary, batch, micro-batch, lr, steps, tokenizer_characters
        Preset("tiny", 128, 2, 4, 64, 4096, 16, 16, 2e-3, 1_000, 5_000_000),
        Preset("mini", 256, 6, 4, 256, 4096, 128, 128, 2e-3, 9_200, 50_000_000),
        Preset("small", 512, 8, 8, 128, 16384, 512, 64, 2e-3, 5_000, 100_000_000),
        Preset("base", 768, 16, 12, 128, 32768, 8192, 256, 1e-3, 10_000, 200_000_000),
    )
}
BASE_HIDDEN = PRESETS["base"].hidden


@dataclass(frozen=True)
class Variant:
    """A feedforward at the width of `base`. per_hidden: dense neurons for each unit of the width."""

    name: str
    note: str
    per_hidden: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


_GATE: dict[str, Any] = {"gate": "boundary"}
_SWIGLU_LEAVES: dict[str, Any] = {"node_output": False, "activation": "swiglu", **_GATE}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense-gelu", "the dense twin", 4.0, {"activation": "gelu"}),
        Variant("dense-swiglu", "the better dense layer, as many parameters", 8 / 3, {"activation": "swiglu"}),
        Variant("none", "attention alone"),
        Variant("1x11", "UltraFastBERT as published", options={"depth": 11}),
        Variant("1x11-gate", "with the boundary gate", options={"depth": 11, **_GATE}),
        Variant("32x6", "many shallow trees, as published", options={"depth": 6, "trees": 32}),
        Variant("32x6-gate", "with the boundary gate", options={"depth": 6, "trees": 32, **_GATE}),
        Variant("128x4", "more, shallower trees", options={"depth": 4, "trees": 128}),
        Variant("128x4-gate", "with the boundary gate", options={"depth": 4, "trees": 128, **_GATE}),
        Variant("16x7-gate", "fewer, deeper trees", options={"depth": 7, "trees": 16, **_GATE}),
        Variant("8x8-gate", "fewer, deeper trees still", options={"depth": 8, "trees": 8, **_GATE}),
        Variant(
            "8x4-leaf16-swiglu-gate",
            "nodes only route, leaves of 16 swiglu neurons",
            options={"depth": 4, "trees": 8, "leaf_width": 16, **_SWIGLU_LEAVES},
        ),
        Variant(
            "18x6-leaf8-swiglu-gate",
            "more trees, narrower leaves",
            options={"depth": 6, "trees": 18, "leaf_width": 8, **_SWIGLU_LEAVES},
        ),
        Variant(
            "36x5-leaf4-swiglu-gate",
            "twice as many with half the leaf: the best trees of 300 M tokens",
            options={"depth": 5, "trees": 36, "leaf_width": 4, **_SWIGLU_LEAVES},
        ),
        Variant(
            RECOMMENDED,
            "80 experts, three for a token: the best of 300 M tokens, and recommended",
            options={"kind": "flat", "leaves": 80, "k": 3, "leaf_width": 54},
        ),
    )
}


def _current(name: str) -> str:
    """The one name of a layer, `TreeConfig.name`, for those that trees had in version 0.1."""
    try:
        return TreeConfig.parse(name, BASE_HIDDEN).name
    except ShapeError:
        return name


def preset_of(name: str) -> Preset:
    """Raises TrainingError for an unknown name."""
    if name not in PRESETS:
        raise TrainingError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def feedforward_of(name: str, hidden: int) -> dict[str, Any]:
    """The description (`fastff.models.feedforward`) of a variant at a width.

    name: a key of VARIANTS; `narrow:VARIANT`, the dense swiglu layer with the arithmetic of a tree, routing included;
    the name of a layer behind another router, such as flat-96x32-top3, the same at every width (`parse_layer`); or a
    description itself as JSON. Raises TrainingError for another name, ValueError for a description that is wrong.
    """
    if name.lstrip().startswith("{"):
        try:
            return complete(json.loads(name))
        except json.JSONDecodeError as error:
            raise TrainingError(f"feedforward {name} is not valid JSON: {error}") from error
    if name.startswith(NARROW):
        flops = feedforward_flops(feedforward_of(name.removeprefix(NARROW), hidden), hidden)
        width = max(1, round(flops / (6 * hidden)))  # two input rows and one output row, two operations each
        return complete({"kind": "dense", "intermediate_size": width, "activation": "swiglu"})
    name = _current(name)
    if name not in VARIANTS:
        try:
            return complete(name)
        except ValueError as error:
            known = f"{', '.join(VARIANTS)}, {NARROW}VARIANT or JSON"
            raise TrainingError(f"feedforward {name!r} is not one of {known}; {error}") from error
    variant = VARIANTS[name]
    if name == "none":
        return complete({"kind": "none"})
    if variant.per_hidden:
        width = max(1, round(variant.per_hidden * hidden))
        return complete({"kind": "dense", "intermediate_size": width, **variant.options})
    return complete({"kind": "fff", **_scaled(variant.options, hidden)})


def _scaled(options: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    share = hidden / BASE_HIDDEN
    if "k" in options:
        return {**options, "leaf_width": max(1, round(options["leaf_width"] * share))}
    if "trees" in options:
        return {**options, "trees": math.ceil(options["trees"] * share)}
    return {**options, "depth": max(1, options["depth"] + round(math.log2(share)))}


def feedforward_flops(description: Mapping[str, Any], hidden: int) -> int:
    """Floating-point operations of one token in one layer, routing included."""
    layer = build_feedforward(description, hidden, device="meta")
    return 0 if layer is None else layer.flops_per_row


@dataclass(frozen=True)
class Cost:
    """One variant in one preset. kind: "none", "tree" or "dense-ACTIVATION"; flops: operations of a token in one
    feedforward; model_flops: in all layers, without the decoder; attention's own products at the preset's seq_len are
    counted."""

    name: str
    kind: str
    layer: str
    neurons: int
    active_neurons: int
    flops: int
    model_flops: int


def cost_of(name: str, preset: Preset) -> Cost:
    """Size and arithmetic of a variant."""
    description = feedforward_of(name, preset.hidden)
    layer = build_feedforward(description, preset.hidden, device="meta")
    flops = feedforward_flops(description, preset.hidden)
    attention = 2 * 4 * preset.hidden**2 + 2 * 2 * preset.seq_len * preset.hidden
    return Cost(
        name=name,
        kind=_kind(description),
        layer=layer_name(description, preset.hidden),
        neurons=0 if layer is None else layer.neurons,
        active_neurons=0 if layer is None else layer.active_neurons,
        flops=flops,
        model_flops=preset.layers * (flops + attention),
    )


def _kind(description: Mapping[str, Any]) -> str:
    match description["kind"]:
        case "dense":
            return f"dense-{description['activation']}"
        case "none":
            return "none"
        case _:
            return "tree"


def layer_name(description: Mapping[str, Any], hidden: int) -> str:
    """A short name of a description, such as `21x4-gate` or `dense-swiglu 341`."""
    options = dict(complete(description))
    kind, beside = options.pop("kind"), f"+{options['shared']}" if options.get("shared") else ""
    match kind:
        case "none":
            return "none"
        case "dense":
            return f"dense-{options['activation']} {options['intermediate_size']}"
        case "fff":
            pass
        case _:  # behind another router than a greedy tree
            layer = build_feedforward({"kind": kind, **options, "shared": None}, hidden, device="meta")
            return str(layer.config.name) + beside  # type: ignore[union-attr]
    own = {key: value for key, value in options.items() if key in TreeConfig.__dataclass_fields__}
    return TreeConfig(in_features=hidden, out_features=hidden, **own).name + beside


def costs(preset: Preset, names: tuple[str, ...] = tuple(VARIANTS)) -> list[Cost]:
    """Size and arithmetic of several variants, for a table."""
    return [cost_of(name, preset) for name in names]


def configuration(preset: Preset, feedforward: Mapping[str, Any], *, vocab_size: int, pad: int, causal: bool) -> Any:
    """The model's configuration for pretraining: no dropout, logits only where something is to be predicted."""
    return UltraFastBertConfig(
        vocab_size=vocab_size,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=preset.seq_len,
        feedforward=dict(feedforward),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        embedding_dropout=0.0,
        classifier_dropout=0.1,
        sparse_prediction=not causal,
        head_dim=max(preset.hidden, 64),
        is_decoder=causal,
        pad_token_id=pad,
    )


def with_changes(preset: Preset, **changes: Any) -> Preset:
    """The preset with the values that were given; None leaves its own."""
    return replace(preset, **{key: value for key, value in changes.items() if value is not None})
