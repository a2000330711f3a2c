"""The converted model of the repository's models/ in fastff's engine, beside the dense one: what it keeps and how fast.

python experiments/convert/ship_engine.py speed MODEL DIR OUT.json     [--seconds 20]
python experiments/convert/ship_engine.py score MODEL DIR OUT.json --packed PACKED

MODEL the dense directory, DIR the converted one, PACKED what carry.py wrote; parts of OUT.json that are not
measured stay.
speed: one thread; narrow and none have random weights, whose speed is that of taught ones. OpenVINO gets the dense
model in int8 and may compute what is not int8 in bfloat16. Tokens are those of novels, for routes are not even.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minilm import TABLES, hits
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from fastff.convert.quality import read_table
from fastff.demo.search import sentences
from fastff.engine.encode import EncoderEngine
from fastff.engine.export import export
from fastff.engine.extension import openvino_core
from fastff.io import read_json, write_json
from fastff.machine import commit, machine
from fastff.models.converted import make_converted
from fastff.timing import interleaved

SHAPES = ((1, 16), (32, 16), (1, 128), (8, 128))
BESIDE: dict[str, dict[str, Any]] = {
    "narrow": {"kind": "dense", "intermediate_size": 152, "activation": "gelu", "bias": True},
    "none": {"kind": "none"},
}
MOST_APART = 0.2  # of the norm of hidden states, between two engines in int8
Rows = list[list[int]]
Run = Callable[[Rows], Any]


def native(model: Path, work: Path) -> Run:
    export(model, work, to="native")
    run: Run = EncoderEngine(work, threads=1).hidden_states
    return run


def openvino(model: Path, work: Path) -> Run:
    export(model, work, to="openvino", weights="int8", texts=[text for _, text in sentences(64)])
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino_core().compile_model(work / "openvino_model.xml", "CPU", options)

    def run(rows: Rows) -> Any:
        ids = np.array(rows)
        return compiled({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})[
            0
        ]

    return run


def beside(model: Path, description: dict[str, Any], out: Path) -> Path:
    """The model with such feedforwards in all blocks."""
    dense = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    make_converted(dense, [description] * dense.config.num_hidden_layers).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def speed(model: Path, shipped: Path, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of a call, in turns. Raises SystemExit where two engines differ about the dense model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        runs = {
            "dense, openvino int8": openvino(model, work / "openvino"),
            "dense": native(model, work / "dense"),
            "this one": native(shipped, work / "shipped"),
        }
        for name, description in BESIDE.items():
            runs[name] = native(beside(model, description, work / f"{name}-model"), work / name)
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer(" ".join(text for _, text in sentences(3000)), add_special_tokens=False)["input_ids"]
        cells = []
        for count, length in SHAPES:
            parts = [ids[k * (length - 2) : (k + 1) * (length - 2)] for k in range(count)]
            rows = [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts]
            want, got = torch.stack(list(runs["dense"](rows))), torch.as_tensor(runs["dense, openvino int8"](rows))
            if not (apart := float((want - got).norm() / want.norm())) < MOST_APART:
                raise SystemExit(f"the dense models of two engines differ by {apart:.2g} of their norm")
            timed = interleaved({name: partial(run, rows) for name, run in runs.items()}, seconds)
            for name, timing in timed.items():
                quartiles = {"q1": timing.p25_us / 1e3, "q3": timing.p75_us / 1e3}
                cells.append({"model": name, "shape": f"{count}x{length}", "ms": timing.p50_us / 1e3, **quartiles})
                print(f"{count}x{length} {name:24} {timing.p50_us / 1e3:8.2f} ms", flush=True)
    return cells


def score(model: Path, packed: Path) -> dict[str, float]:
    """Spearman x 100 of the tables of pairs, and percent of hits, of an export in 8 bits."""
    with tempfile.TemporaryDirectory() as made:
        export(model, Path(made, "out"), to="native")
        engine = EncoderEngine(Path(made, "out"))

        def encode(texts: list[str]) -> torch.Tensor:
            return torch.as_tensor(engine.encode(texts, normalize_embeddings=True))

        found = {}
        for name, file in TABLES.items():
            table = read_table(packed / f"{file}.parquet")
            a, b = encode([*table["sentence1"], *table["sentence2"]]).chunk(2)
            labels = table["relatedness" if "relatedness" in table else "label"]
            found[name] = 100 * float(spearmanr((a * b).sum(1).numpy(), labels).statistic)
        found["retrieval"] = hits(encode, read_table(packed / "retrieval.parquet"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("speed", "score"))
    for name in ("model", "dir", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a shape, all models together")
    args = parser.parse_args()
    record = read_json(args.out, needs={}, remedy="name another file") if args.out.is_file() else {}
    if args.command == "speed":
        cells = speed(args.model, args.dir, args.seconds)
        record |= {"cells": cells, "machine": {**machine(), "commit": commit()}}
    else:
        record["scores"] = {
            name: score(path, args.packed) for name, path in (("dense", args.model), ("this one", args.dir))
        }
    write_json(args.out, record)


if __name__ == "__main__":
    main()
