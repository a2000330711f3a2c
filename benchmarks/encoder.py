"""How long a whole encoder of the size of BERT-base or all-MiniLM-L6-v2 takes on the CPU, by feedforward and engine.

    python benchmarks/encoder.py --models build/encoder --build                 (minutes: export and quantise)
    python benchmarks/encoder.py --models build/encoder --out encoder.json      (seconds: time them, interleaved)

    python benchmarks/encoder.py --models build/encoder --engines native --shapes 1x128 8x128 --threads 1 2
    python benchmarks/encoder.py --models build/minilm --encoder minilm --engines native --shapes 1x16 1x64

Random weights: speed does not depend on their values, except that routing is as even as random weights make it. With
--out, cells of other shapes, threads and encoders that the file holds stay.

Dense layers run in PyTorch, ONNX Runtime and OpenVINO, in fp32 and in int8 (OpenVINO's by NNCF post-training
quantisation, ONNX Runtime's and PyTorch's dynamic). Trees run in PyTorch with the native kernels; with int8, the trees
have int8 weights and every other linear layer is PyTorch's dynamic int8. `openvino int8` runs the conditional layers as
fastff's operations; `openvino int8 bf16` is its setting for the least time, in which what is not int8 may be bfloat16.
`native int8` is fastff's own engine. `none` has no feedforward: what no feedforward layer can go below. Every engine is
compared with PyTorch's fp32 before it is timed; engines then take turns in one process, each on one thread.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastff import models
from fastff.bench.result_cells import kept_cells
from fastff.engine import openvino
from fastff.engine.encoders import describe
from fastff.engine.extension import extended_core
from fastff.engine.native_file import write_model
from fastff.io import write_json
from fastff.machine import commit, machine
from fastff.models.feedforward import complete
from fastff.ops.native_encoder import NativeEncoder
from fastff.timing import interleaved
from fastff.train.presets import feedforward_of

# Layers, width, heads.
ENCODERS = {"bert-base": (12, 768, 12), "minilm": (6, 384, 12)}
FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "dense-gelu": {"kind": "dense", "intermediate_size": 3072, "bias": True},
    "dense-gelu-1536": {"kind": "dense", "intermediate_size": 1536, "bias": True},
    "dense-swiglu": feedforward_of("dense-swiglu", 768),
    "36x5-leaf4-swiglu-gate": feedforward_of("36x5-leaf4-swiglu-gate", 768),
    "18x6-leaf8-swiglu-gate": feedforward_of("18x6-leaf8-swiglu-gate", 768),
    "narrow": feedforward_of("narrow:36x5-leaf4-swiglu-gate", 768),
    "1x11": feedforward_of("1x11", 768),
    "flat-96x32-top3": complete("flat-96x32-top3"),
    "flat-96x48-top3": complete("flat-96x48-top3"),
    "flat-48x40-top2": complete("flat-48x40-top2"),
    "none": {"kind": "none"},
}
TREES = ("36x5-leaf4-swiglu-gate", "18x6-leaf8-swiglu-gate", "1x11")
EXPERTS = ("flat-96x32-top3", "flat-96x48-top3", "flat-48x40-top2")
# The engines of each feedforward; those of RUNTIMES load a file that --build wrote.
ENGINES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("dense-gelu", "dense-gelu-1536"),
        ("torch", "torch compile", "onnxruntime", "openvino", "torch int8", "onnxruntime int8", "openvino int8"),
    ),
    "dense-swiglu": ("torch", "openvino", "torch int8", "openvino int8"),
    "narrow": ("torch", "openvino", "torch int8", "openvino int8"),
    "none": ("torch", "openvino", "torch int8", "openvino int8"),
    **dict.fromkeys((*TREES, *EXPERTS), ("torch", "torch int8", "openvino int8")),
}
ENGINES = {name: (*engines, "openvino int8 bf16", "native int8") for name, engines in ENGINES.items()}
ERROR_LIMITS = {"fp32": 1e-4, "int8": 0.3}  # relative to the norm of PyTorch's fp32 output; a wrong one errs by 1
CALIBRATION_BATCHES = 8
LENGTH = 128  # of a sequence that calibrates, and that checks the output
LONGEST = 512
PLACE = ("encoder", "feedforward", "engine", "shape", "threads")  # what tells cells apart
Run = Callable[[Tensor], Any]


class Hidden(nn.Module):
    """Token ids (sequences, tokens) to the last hidden states."""

    def __init__(self, feedforward: dict[str, Any], size: tuple[int, int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers, hidden, heads = size
        config = models.UltraFastBertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            vocab_size=1000,
            max_position_embeddings=LONGEST,
            feedforward=feedforward,
        )
        self.model = models.UltraFastBertModel(config).requires_grad_(False)
        self.eval()  # this module too: the ONNX exporter would put the model back into training

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(ids).last_hidden_state
        return hidden


def tokens(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(seed))


def build(asked: argparse.Namespace) -> None:
    """Export the encoders for the engines that read a file."""
    folder = asked.models
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked.feedforwards:
        module = Hidden(FEEDFORWARDS[name], ENCODERS[asked.encoder])
        for engine in engines_of(name, asked.engines):
            path = _file(folder, name, engine)
            if path is not None and not path.exists():
                _BUILDERS[engine](module, path, (1, LENGTH))
                print(f"wrote {path}", flush=True)


def _file(folder: Path, name: str, engine: str) -> Path | None:
    """Where the model of an engine lies that reads one."""
    suffix = {"onnxruntime": "onnx", "openvino": "xml", "native": "fastff"}.get(engine.partition(" ")[0])
    stored = engine.removesuffix(" bf16").replace(" ", "-")
    return None if suffix is None else folder / f"{name}-{stored}.{suffix}"


def _onnx(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    axes = {"ids": {1: "length"}}  # the exporter keeps the batch that it traced
    torch.onnx.export(module, (tokens(shape, 0),), path, input_names=["ids"], dynamic_axes=axes, dynamo=False)


def _onnx_int8(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = path.with_suffix(".fp32.onnx")
    _onnx(module, plain, shape)
    quantize_dynamic(plain, path, weight_type=QuantType.QInt8, per_channel=True)
    plain.unlink()


def _openvino(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    _save(module, path, shape, "fp32")


def _openvino_int8(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    _save(module, path, shape, "int8")


def _save(module: Hidden, path: Path, shape: tuple[int, int], weights: openvino.Weights) -> None:
    import openvino as ov

    samples = [{"ids": tokens(shape, seed).numpy()} for seed in range(1, 1 + CALIBRATION_BATCHES)]
    model = openvino.convert(module, (tokens(shape, 0),), ["ids"], weights=weights, samples=samples)
    ov.save_model(model, path, compress_to_fp16=False)


def _native(module: Hidden, path: Path, shape: tuple[int, int]) -> None:
    described = describe(module.model)
    write_model(path, described.model, described.tensors)


_BUILDERS: dict[str, Callable[[Hidden, Path, tuple[int, int]], None]] = {
    "onnxruntime": _onnx,
    "onnxruntime int8": _onnx_int8,
    "openvino": _openvino,
    "openvino int8": _openvino_int8,
    "openvino int8 bf16": _openvino_int8,
    "native int8": _native,
}


def load(asked: argparse.Namespace, name: str, engine: str, threads: int) -> Run:
    """The encoder with a feedforward in an engine, as a function of token ids."""
    path = _file(asked.models, name, engine)
    if path is not None:
        if path.suffix == ".fastff":
            return _read_native(path, threads)
        hint = "bf16" if engine.endswith("bf16") else "f32"
        return _read_openvino(path, threads, hint) if path.suffix == ".xml" else _read_onnx(path, threads)
    module = Hidden(FEEDFORWARDS[name], ENCODERS[asked.encoder])
    if engine.endswith("compile"):
        compiled: Run = torch.compile(module)
        return compiled
    return _torch_int8(module, trees=name in TREES) if engine.endswith("int8") else module


def _torch_int8(module: Hidden, *, trees: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package that has no faster form of it
        from torch.ao.quantization import quantize_dynamic

        if trees:
            models.quantize(module.model, "int8")
        run: Run = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    return run


def _read_onnx(path: Path, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"ids": ids.numpy()})[0]


def _read_openvino(path: Path, threads: int, hint: str) -> Run:
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
    compiled = extended_core().compile_model(path, "CPU", options)
    return lambda ids: compiled(ids.numpy())[0]


def _read_native(path: Path, threads: int) -> Run:
    encoder = NativeEncoder(path)

    def run(ids: Tensor) -> Tensor:
        sequences, length = ids.shape
        return encoder.run(ids.flatten(), [length] * sequences, threads=threads).view(sequences, length, -1)

    return run


def relative_error(run: Run, reference: nn.Module, shape: tuple[int, int]) -> float:
    """Of the hidden states of other tokens than the timed ones, against PyTorch's fp32, as a ratio of norms."""
    ids = tokens(shape, 100)
    with torch.inference_mode():
        want = reference(ids)
        return float((torch.as_tensor(run(ids)) - want).norm() / want.norm())


def prepared(asked: argparse.Namespace, threads: int) -> tuple[dict[str, Run], dict[str, float]]:
    """The engines of the chosen feedforwards, checked, and their errors. Raises SystemExit for a wrong output."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name in asked.feedforwards:
        reference = Hidden(FEEDFORWARDS[name], ENCODERS[asked.encoder])
        for engine in engines_of(name, asked.engines):
            key = f"{name}, {engine}"
            runs[key] = load(asked, name, engine, threads)
            errors[key] = relative_error(runs[key], reference, (1, LENGTH))
            if not errors[key] < ERROR_LIMITS["int8" if "int8" in engine else "fp32"]:
                raise SystemExit(f"{key}: the output differs from PyTorch's fp32 by {errors[key]:.2g} of its norm")
    return runs, errors


def engines_of(name: str, kinds: Iterable[str]) -> list[str]:
    """The engines of a feedforward whose names start with one of `kinds`."""
    return [engine for engine in ENGINES[name] if engine.startswith(tuple(kinds))]


def measured(asked: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """A cell for every engine and shape, in turns within a shape."""
    torch.set_num_threads(threads)
    runs, errors = prepared(asked, threads)
    for shape in asked.shapes:
        sequences, length = map(int, shape.split("x"))
        ids = tokens((sequences, length), 0)
        with torch.inference_mode():
            calls = {key: partial(run, ids) for key, run in runs.items() if sequences == 1 or "onnx" not in key}
            timed = interleaved(calls, asked.seconds)
        for key, timing in timed.items():
            name, engine = key.split(", ")
            quartiles = {"ms": timing.p50_us / 1e3, "q1": timing.p25_us / 1e3, "q3": timing.p75_us / 1e3}
            place = {
                "encoder": asked.encoder,
                "feedforward": name,
                "engine": engine,
                "shape": shape,
                "threads": threads,
            }
            yield {**place, "relative_error": errors[key], **quartiles}
            spread = f"({quartiles['q1']:.1f} to {quartiles['q3']:.1f})"
            print(f"{shape} {threads} threads {key:40} {quartiles['ms']:8.1f} ms {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--encoder", default="bert-base", choices=list(ENCODERS))
    parser.add_argument("--build", action="store_true", help="export and quantise them")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=[f"1x{LENGTH}"], help="sequences x tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--feedforwards", nargs="+", default=list(FEEDFORWARDS), choices=list(FEEDFORWARDS))
    parser.add_argument("--engines", nargs="+", default=[""], help="those whose names start so")
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing a shape, all engines together")
    asked = parser.parse_args()
    if asked.build:
        return build(asked)
    cells = [cell for threads in asked.threads for cell in measured(asked, threads)]
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        machine_now = {**machine(), "commit": commit()}
        write_json(asked.out, {"machine": machine_now, "cells": [*kept_cells(asked.out, cells, PLACE), *cells]})
    return None


if __name__ == "__main__":
    main()
