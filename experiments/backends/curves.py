"""Train one small model on several backends from one seed and say how far their loss curves are apart.

python experiments/backends/curves.py DATA --out experiments/NAME [--backends native,reference] [--steps 200]

DATA is a folder of tokens named train and valid (`fastff experiment unpack-tokens`). Also trained is the first backend
from another seed: what a run differs by for no reason that matters. Without a GPU, `triton` needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastff.io import write_json
from fastff.ops.interface import use_backend
from fastff.train.pretrain import pretrain
from fastff.train.pretrain_settings import PretrainSettings


def train(asked: argparse.Namespace, backend: str, seed: int) -> dict[str, Any]:
    """The record of one run."""
    with tempfile.TemporaryDirectory() as folder, use_backend(backend):
        return pretrain(
            PretrainSettings(
                out=Path(folder),
                text=("train",),
                valid=("valid",),
                data=asked.data,
                feedforward=asked.feedforward,
                objective="causal",
                steps=asked.steps,
                batch=8,
                micro_batch=8,
                ramp=0.0,
                seq_len=32,
                log_every=1,
                save_every=10**9,
                seed=seed,
                cpu=not (backend == "triton" and torch.cuda.is_available()),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default="native,reference")
    parser.add_argument("--feedforward", default="16x7-gate")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    names = asked.backends.split(",")
    records = {name: train(asked, name, 0) for name in names}
    records[f"{names[0]}, another seed"] = train(asked, names[0], 1)
    first = [loss for _, loss in records[names[0]]["curve"]]
    found = {}
    for name, record in records.items():
        curve = [loss for _, loss in record["curve"]]
        apart = [abs(a - b) for a, b in zip(first, curve, strict=True)]
        found[name] = {
            "valid_loss": record["valid_loss"],
            "furthest_apart": max(apart),
            "mean_apart": sum(apart) / len(apart),
            "curve": curve,
        }
        print(f"{name}: held-out loss {record['valid_loss']:.5f}; from {names[0]}: at most {max(apart):.2g} apart")
    settings = {"feedforward": asked.feedforward, "steps": asked.steps, "machine": records[names[0]]["machine"]}
    write_json(asked.out / "backends.json", {**settings, "runs": found})


if __name__ == "__main__":
    main()
