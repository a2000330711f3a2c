"""Do quantised layers take the leaves of the fp32 layer? On the real inputs of a trained model's feedforward layers.

`python benchmarks/quantized_routing.py MODEL_DIR TEXT --rows 1000000 --out quantized-routing.json`

Every feedforward input of an encoder (its activations, layer by layer) goes through 1x11 trees with three kinds of
routing directions: random ones, differences of two activations with the threshold halfway between them, and the same
with the threshold at an activation, which puts scores as near to zero as data can.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import fastff
from fastff.ops import native

DEPTH, BATCH, LENGTH = 11, 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a BERT-like encoder")
    parser.add_argument("text", type=Path, help="text file, one passage to a line")
    parser.add_argument("--rows", type=int, default=1_000_000, help="activations to route, over all layers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    activations = feedforward_inputs(options.model, options.text, options.rows)
    counts: dict[str, dict[str, float]] = {}
    for block, x in enumerate(activations):
        for kind in ("random", "halfway", "touching"):
            layer = make_layer(x, kind, seed=block)
            plain = layer.routed(x)
            for quantization in ("bf16", "int8"):
                got = layer.quantize(quantization).routed(x)
                add(counts, f"{kind} {quantization}", plain, got)
            layer.quantize(None)
        print(f"layer {block}: {len(x)} rows", flush=True)
    report = {
        "model": options.model.name,
        "width": activations[0].shape[1],
        "layers": len(activations),
        "depth": DEPTH,
        "isa": native.isa(),
        "machine": platform.machine(),
        "directions": {
            name: {
                "rows": int(c["rows"]),
                "changed_leaves": int(c["changed"]),
                "output_error": round((c["error"] / c["norm"]) ** 0.5, 6),
            }
            for name, c in counts.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["directions"], indent=2))


@torch.inference_mode()
def feedforward_inputs(model_dir: Path, text: Path, rows: int) -> list[Tensor]:
    """Of each encoder layer, about rows / layers activations (rows, hidden)."""
    model = AutoModel.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    blocks = model.encoder.layer
    found: list[list[Tensor]] = [[] for _ in blocks]
    mask = torch.empty(0)

    def keep(block: int):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: found[block].append(inputs[0][mask])

    for block, layer in enumerate(blocks):
        layer.intermediate.register_forward_pre_hook(keep(block))
    wanted, seen = rows // len(blocks) + 1, 0
    with text.open(encoding="utf-8") as lines:
        batch: list[str] = []
        for line in lines:
            if len(line.split()) >= 8:
                batch.append(line.strip())
            if len(batch) == BATCH:
                inputs = tokenizer(batch, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
                mask = inputs["attention_mask"].bool()
                model(**inputs)
                seen += int(mask.sum())
                batch = []
            if seen >= wanted:
                break
    if seen < wanted:
        raise SystemExit(f"{text} gives {seen} tokens, {wanted} are needed for {rows} rows")
    return [torch.cat(parts)[:wanted].clone() for parts in found]


def make_layer(x: Tensor, kind: str, seed: int) -> fastff.FFF:
    torch.manual_seed(seed)
    layer = fastff.FFF(x.shape[1], depth=DEPTH, bias=True).eval()
    if kind != "random":
        nodes = layer.config.leaves - 1
        first, second = x[torch.randint(len(x), (2, nodes))]
        direction = first - second
        middle = (first + second) / 2 if kind == "halfway" else first
        with torch.no_grad():
            assert layer.b_in is not None
            layer.w_in[0, :nodes] = direction
            layer.b_in[0, :nodes] = -(direction * middle).sum(-1)
    return layer.requires_grad_(False)


def add(counts: dict[str, dict[str, float]], name: str, plain: fastff.ops.Routed, got: fastff.ops.Routed) -> None:
    total = counts.setdefault(name, {"rows": 0, "changed": 0, "error": 0, "norm": 0})
    total["rows"] += len(got.y)
    total["changed"] += int((got.leaf != plain.leaf).any(-1).sum())
    total["error"] += float((got.y - plain.y).double().square().sum())
    total["norm"] += float(plain.y.double().square().sum())


if __name__ == "__main__":
    main()
