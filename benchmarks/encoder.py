"""How long a whole encoder of BERT-base size takes on one CPU thread, by feedforward layer and engine.

    python benchmarks/encoder.py --models build/encoder --build                 (minutes: export and quantise)
    python benchmarks/encoder.py --models build/encoder --out encoder.json      (seconds: time them, interleaved)

Twelve layers of width 768 with random weights: speed does not depend on their values, except that routing is as even
as random weights make it. Dense layers run in PyTorch, ONNX Runtime and OpenVINO, in fp32 and in int8 (OpenVINO's by
NNCF post-training quantisation, ONNX Runtime's and PyTorch's dynamic). Trees run in PyTorch with the native kernels;
with int8, the trees have int8 weights and every other linear layer is PyTorch's dynamic int8. `none` has no
feedforward: what no feedforward layer can go below. Every engine is compared with PyTorch's fp32 before it is timed;
engines then take turns in one process, each on one thread.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastff import models
from fastff.io import write_json
from fastff.machine import commit, machine
from fastff.timing import interleaved
from fastff.train.presets import feedforward_of

FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "dense-gelu": {"kind": "dense", "intermediate_size": 3072, "bias": True},
    "dense-swiglu": feedforward_of("dense-swiglu", 768),
    "36x5-swiglu4-gate": feedforward_of("36x5-swiglu4-gate", 768),
    "18x6-swiglu8-gate": feedforward_of("18x6-swiglu8-gate", 768),
    "narrow": feedforward_of("narrow:36x5-swiglu4-gate", 768),
    "1x11": feedforward_of("1x11", 768),
    "none": {"kind": "none"},
}
TREES = ("36x5-swiglu4-gate", "18x6-swiglu8-gate", "1x11")
# The engines of each feedforward; those of RUNTIMES load a file that --build wrote.
ENGINES: dict[str, tuple[str, ...]] = {
    "dense-gelu": ("torch", "onnxruntime", "openvino", "torch int8", "onnxruntime int8", "openvino int8"),
    "dense-swiglu": ("torch", "openvino", "torch int8", "openvino int8"),
    "narrow": ("torch", "openvino", "torch int8", "openvino int8"),
    "none": ("torch", "openvino", "torch int8", "openvino int8"),
    **dict.fromkeys(TREES, ("torch", "torch int8")),
}
ERROR_LIMITS = {"fp32": 1e-4, "int8": 0.3}  # relative to the norm of PyTorch's fp32 output; a wrong one errs by 1
CALIBRATION_BATCHES = 8
Run = Callable[[Tensor], Any]


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


def tokens(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(seed))


def build(folder: Path, shape: tuple[int, int]) -> None:
    """Export the dense encoders for the runtimes, in fp32 and int8."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, engines in ENGINES.items():
        module = Hidden(FEEDFORWARDS[name])
        for engine in engines:
            path = _file(folder, name, engine)
            if path is not None and not path.exists():
                _BUILDERS[engine](module, path, shape)
                print(f"wrote {path}", flush=True)


def _file(folder: Path, name: str, engine: str) -> Path | None:
    """Where the model of an engine lies that reads one."""
    suffix = {"onnxruntime": "onnx", "openvino": "xml"}.get(engine.partition(" ")[0])
    return None if suffix is None else folder / f"{name}-{engine.replace(' ', '-')}.{suffix}"


def _onnx(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    torch.onnx.export(module, (tokens(shape, 0),), path, input_names=["ids"], dynamo=False)


def _onnx_int8(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = path.with_suffix(".fp32.onnx")
    _onnx(module, plain, shape)
    quantize_dynamic(plain, path, weight_type=QuantType.QInt8, per_channel=True)
    plain.unlink()


def _openvino(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    import openvino as ov

    ov.save_model(ov.convert_model(module, example_input=tokens(shape, 0)), path, compress_to_fp16=False)


def _openvino_int8(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    import nncf
    import openvino as ov

    model = ov.convert_model(module, example_input=tokens(shape, 0))
    calibration = nncf.Dataset([tokens(shape, seed).numpy() for seed in range(1, 1 + CALIBRATION_BATCHES)])
    quantised = nncf.quantize(
        model, calibration, subset_size=CALIBRATION_BATCHES, model_type=nncf.ModelType.TRANSFORMER
    )
    ov.save_model(quantised, path, compress_to_fp16=False)


_BUILDERS: dict[str, Callable[[Hidden, Path, tuple[int, int]], None]] = {
    "onnxruntime": _onnx,
    "onnxruntime int8": _onnx_int8,
    "openvino": _openvino,
    "openvino int8": _openvino_int8,
}


def load(folder: Path, name: str, engine: str) -> Run:
    """The encoder with a feedforward in an engine, as a function of token ids."""
    path = _file(folder, name, engine)
    if path is not None:
        return _read_openvino(path) if path.suffix == ".xml" else _read_onnx(path)
    module = Hidden(FEEDFORWARDS[name])
    return _torch_int8(module, trees=name in TREES) if engine.endswith("int8") else module


def _torch_int8(module: Hidden, *, trees: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package that has no faster form of it
        from torch.ao.quantization import quantize_dynamic

        if trees:
            models.quantize(module.model, "int8")
        run: Run = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    return run


def _read_onnx(path: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"ids": ids.numpy()})[0]


def _read_openvino(path: Path) -> Run:
    import openvino as ov

    # Its default would use bf16 for whatever is not int8 on a CPU that has it: precision is what the table compares.
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(path, "CPU", options)
    return lambda ids: compiled(ids.numpy())[0]


def relative_error(run: Run, reference: nn.Module, shape: tuple[int, int]) -> float:
    """Of the hidden states of other tokens than the timed ones, against PyTorch's fp32, as a ratio of norms."""
    ids = tokens(shape, 100)
    with torch.inference_mode():
        want = reference(ids)
        return float((torch.as_tensor(run(ids)) - want).norm() / want.norm())


def prepared(folder: Path, shape: tuple[int, int], chosen: Iterable[str]) -> tuple[dict[str, Run], dict[str, float]]:
    """Every engine of the chosen feedforwards, checked, and its error. Raises SystemExit for a wrong output."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name in chosen:
        reference = Hidden(FEEDFORWARDS[name])
        for engine in ENGINES[name]:
            key = f"{name}, {engine}"
            runs[key] = load(folder, name, engine)
            errors[key] = relative_error(runs[key], reference, shape)
            if not errors[key] < ERROR_LIMITS["int8" if "int8" in engine else "fp32"]:
                raise SystemExit(f"{key}: the output differs from PyTorch's fp32 by {errors[key]:.2g} of its norm")
    return runs, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--build", action="store_true", help="export and quantise them")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", default="1x128", help="sequences x tokens")
    parser.add_argument("--feedforwards", nargs="+", default=list(FEEDFORWARDS), choices=list(FEEDFORWARDS))
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing, all engines together")
    asked = parser.parse_args()
    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")
    torch.set_num_threads(1)
    sequences, length = map(int, asked.shape.split("x"))
    shape = sequences, length
    if asked.build:
        return build(asked.models, shape)
    runs, errors = prepared(asked.models, shape, asked.feedforwards)
    ids = tokens(shape, 0)
    with torch.inference_mode():
        timed = interleaved({key: lambda run=run: run(ids) for key, run in runs.items()}, asked.seconds)  # type: ignore[misc]
    cells = []
    for key, timing in timed.items():
        name, engine = key.split(", ")
        quartiles = {"ms": timing.p50_us / 1e3, "q1": timing.p25_us / 1e3, "q3": timing.p75_us / 1e3}
        cells.append({"feedforward": name, "engine": engine, "relative_error": errors[key], **quartiles})
        print(f"{key:32} {quartiles['ms']:8.1f} ms ({quartiles['q1']:.1f} to {quartiles['q3']:.1f})", flush=True)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        about = {**machine(), "commit": commit()}
        write_json(asked.out, {"machine": about, "threads": 1, "shape": asked.shape, "cells": cells})
    return None


if __name__ == "__main__":
    main()
