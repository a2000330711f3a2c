"""Time a joint step of every student of a conversion on this machine's CPU: what a night is enough for.

python experiments/convert/steps.py PACKED WORK OUT.json --students tree narrow none [--threads 2]

PACKED is what carry.py wrote. The students are those of `fastff convert --active 10%` on all-MiniLM-L6-v2,
with fresh weights, their steps those of its defaults. Later calls find the model in WORK and add to OUT.json, so that
each can be short.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from carry import MAX_LENGTH, restore
from latency import cpu

from fastff.convert.choose_layers import Shape
from fastff.convert.conversion_settings import BATCH, DEFAULT_ACTIVE, ConversionSettings
from fastff.convert.dense_model import load_dense
from fastff.convert.distill_context import DistillContext, baseline
from fastff.convert.student import dense_layers
from fastff.convert.time_budget import step_seconds
from fastff.text.examples import tokenise

TREE = Shape(2, 5, part=0.75)  # the shape that was measured most: experiments/convert/README.md


def measure(packed: Path, students: list[str], work: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of a step by student, and what a step is."""
    if not (work / "offsets.npy").exists():
        work.mkdir(parents=True, exist_ok=True)
        restore(packed, work)
    teacher, tokenizer, kind = load_dense(str(work / "model"))
    unused: Any = None  # the text is not read: its tokens are there
    examples = tokenise(tokenizer, unused, work, max_length=MAX_LENGTH, max_tokens=0, whole_blocks=False)
    settings = ConversionSettings(model="model", text=Path("text"), out=work, batch=BATCH[kind])
    context = DistillContext(settings, kind, teacher, [], examples, examples, lambda _: None, {}, lambda *_: None)
    dense = dense_layers(teacher)
    trees = [TREE.fit(layer, DEFAULT_ACTIVE) for layer in dense]
    found = {
        name: step_seconds(context, trees if name == "tree" else baseline(name, dense, trees)) for name in students
    }
    return found, {"batch": settings.batch, "steps": settings.steps, "tree": trees[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("packed", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--students", nargs="+", choices=("tree", "narrow", "none"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, step = measure(args.packed, args.students, args.work)
    record = json.loads(args.out.read_text()) if args.out.exists() else {"step_s": {}}
    record |= {**step, "cpu": cpu(), "threads": args.threads, "torch": torch.__version__}
    record["step_s"] |= found
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(record["step_s"])


if __name__ == "__main__":
    main()
