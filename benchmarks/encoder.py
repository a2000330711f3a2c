"""How long a whole encoder takes with dense, conditional and no feedforward layers, on one CPU thread.

`python benchmarks/encoder.py --out benchmarks/results/intel-xeon-amx-2-cores/end-to-end.json`

Twelve layers of BERT-base size with random weights: speed does not depend on their values, except that routing is as
even as random weights make it. The dense model runs in PyTorch, `torch.compile`, ONNX Runtime and OpenVINO, all in
fp32; the model with 1x11 trees in PyTorch, with fp32 and with quantised trees; the model without feedforward layers
shows what no feedforward layer can go below. The three then run with every linear layer in PyTorch's dynamic int8 (of
the dense model the feedforward too) and under bf16 autocast, the trees in int8. Engines take turns in one process,
each on one thread.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from fastff import models
from fastff.bench.machine import machine

FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "intermediate_size": 3072, "bias": True},
    "1x11": {"kind": "fff", "depth": 11},
    "none": {"kind": "none"},
}
Run = Callable[[Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"], help="sequences x tokens")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for shape in options.shapes:
        sequences, tokens = map(int, shape.split("x"))
        ids = torch.randint(1000, (sequences, tokens), generator=torch.Generator().manual_seed(0))
        seconds = time_in_turns(engines(ids), ids, options.repeats)
        for name, taken in seconds.items():
            low, median, high = statistics.quantiles(taken, n=4)
            cells.append({"shape": shape, "engine": name, "ms": median * 1e3, "q1": low * 1e3, "q3": high * 1e3})
            print(f"{shape} {name:28} {median * 1e3:9.1f} ms  ({low * 1e3:.1f} to {high * 1e3:.1f})", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "threads": 1, "cells": cells}, indent=1) + "\n")


def engines(example: Tensor) -> dict[str, Run]:
    """By name, functions of token ids of example's shape that run the encoder."""
    dense, tree, none = (Hidden(description) for description in FEEDFORWARDS.values())
    runs: dict[str, Run] = {"dense, torch": dense, "dense, torch.compile": torch.compile(dense)}
    runs["dense, onnxruntime"] = onnxruntime(dense, example)
    runs["dense, openvino"] = openvino(dense, example)
    runs["1x11, torch"] = tree
    for kind in ("bf16", "int8"):
        quantised = Hidden(FEEDFORWARDS["1x11"])
        models.quantize(quantised.model, kind)
        runs[f"1x11 {kind}, torch"] = quantised
    runs["no feedforward, torch"] = none
    for name, module in (("dense", dense), ("1x11", quantised), ("no feedforward", none)):
        runs[f"{name}, torch, int8 projections"] = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
        runs[f"{name}, torch, bf16 autocast"] = autocast(module)
    return runs


def autocast(module: Hidden) -> Run:
    def run(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(ids)

    return run


class Hidden(nn.Module):
    """Token ids (sequences, tokens) to the last hidden states."""

    def __init__(self, feedforward: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = models.UltraFastBertConfig(
            num_hidden_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=1000, feedforward=feedforward
        )
        self.model = models.UltraFastBertModel(config).requires_grad_(False)
        self.eval()  # this module too: the ONNX exporter would put the model back into training

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(ids).last_hidden_state
        return hidden


def onnxruntime(module: Hidden, example: Tensor) -> Run:
    import onnxruntime as ort

    file = io.BytesIO()
    torch.onnx.export(module, (example,), file, input_names=["ids"], dynamo=False)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = ort.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    return checked(lambda ids: session.run(None, {"ids": ids.numpy()})[0], module, example)


def openvino(module: Hidden, example: Tensor) -> Run:
    import openvino as ov

    compiled = ov.Core().compile_model(
        ov.convert_model(module, example_input=example),
        "CPU",
        {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"},
    )
    return checked(lambda ids: compiled(ids.numpy())[0], module, example)


def checked(run: Run, module: Hidden, example: Tensor) -> Run:
    """The run, after a look at its output: an engine that computes something else has no place in the table."""
    ids = torch.randint(1000, example.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        error = (torch.as_tensor(run(ids)) - module(ids)).abs().max().item()
    if not error < 1e-3:
        raise SystemExit(f"an engine's output differs from PyTorch's by {error}")
    return run


def time_in_turns(runs: dict[str, Run], ids: Tensor, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run(ids)
                if turn:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
