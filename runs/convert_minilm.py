"""Convert an embedding model in several ways, each distilled alike, and compare them.

python runs/convert_minilm.py MODEL TEXT TABLES OUT [--seconds 240]

MODEL   directory of all-MiniLM-L6-v2    TEXT  unlabelled sentences, one a line (.xz, .gz or plain)
TABLES  folder with glue-STS-B-dev.parquet, glue-STS-B-test.parquet and extra-SICK-test.parquet
Only STS-B dev was looked at while the recipe was chosen. Writes OUT/minilm.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModel, AutoTokenizer

import fastff.models  # noqa: F401
from fastff.convert.capture import capture
from fastff.convert.distil import distil
from fastff.convert.evaluate import read_table, similarity
from fastff.convert.initialise import contribution
from fastff.convert.student import build_student, dense_layers, describe_narrow, describe_tree, flops
from fastff.convert.text import tokenise

TABLES = {"sts-b dev": "glue-STS-B-dev", "sts-b test": "glue-STS-B-test", "sick test": "extra-SICK-test"}
ARMS: list[tuple[str, dict[str, int], tuple[int, ...]]] = [
    ("8x4-leaf12", {"trees": 8, "depth": 4, "leaf_width": 12}, (0, 1, 2)),
    ("4x5-leaf6", {"trees": 4, "depth": 5, "leaf_width": 6}, (0,)),
    ("narrow-128", {"neurons": 128}, (0, 1, 2)),
    ("narrow-44", {"neurons": 44}, (0,)),
    ("none", {}, (0,)),
]


def describe(dense: Any, options: dict[str, int]) -> dict[str, Any]:
    if "trees" in options:
        return describe_tree(dense, **options)
    return describe_narrow(dense, options["neurons"]) if options else {"kind": "none"}


def scores(model: Any, tokenizer: Any, tables: Path) -> dict[str, float]:
    out = {}
    for name, file in TABLES.items():
        table = read_table(tables / f"{file}.parquet")
        out[name] = similarity(model, tokenizer, table, "relatedness" if "relatedness" in table else "label")
    return out


def oracle(model: Any, tokenizer: Any, tables: Path, fraction: float) -> float:
    """STS-B dev when every token keeps only the dense neurons that contribute most to it."""
    hooks = []
    for block, dense in zip(model.encoder.layer, dense_layers(model), strict=True):
        keep = max(1, round(fraction * dense.neurons))

        def select(_m: Any, a: Any, y: torch.Tensor, dense: Any = dense, keep: int = keep) -> torch.Tensor:
            least = contribution(dense, a[0]).topk(keep, dim=-1).values[..., -1:]
            return torch.where(contribution(dense, a[0]) >= least, y, 0)

        hooks.append(block.intermediate.register_forward_hook(select))
    result = similarity(model, tokenizer, read_table(tables / f"{TABLES['sts-b dev']}.parquet"))
    for hook in hooks:
        hook.remove()
    return result


def setup(args: Any) -> tuple[Any, Any, Any, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    work = args.out / "work" if args.work is None else args.work
    examples = tokenise(tokenizer, args.text, work, max_length=64, max_tokens=args.tokens, whole_blocks=False)
    captured = capture(teacher, examples, work, rows=args.rows, batch=256, progress=lambda *_: None)
    return teacher, tokenizer, examples, captured


def run_arm(args: Any, name: str, options: dict[str, int], seed: int, barrier: Any, slowest: Any, results: Any) -> None:
    """One process: build, agree with all others on a number of steps that fits the time, distil, evaluate."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    began = time.perf_counter()
    teacher, tokenizer, examples, captured = setup(args)
    dense = dense_layers(teacher)
    descriptions = [describe(d, options) for d in dense]
    student, errors = build_student(teacher, descriptions, captured, steps=args.layer_steps, seed=seed)
    row: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "active": sum(map(flops, dense, descriptions)) / sum(d.flops_per_row for d in dense),
        "missed": errors,
        "before": scores(student, tokenizer, args.tables),
        "layers_s": time.perf_counter() - began,
    }
    print(f"{name} {seed} built {row['layers_s']:.0f}s {row['before']['sts-b dev']:.2f}", flush=True)
    torch.set_float32_matmul_precision("high")
    options_of_training = {"kind": "embedding", "batch": args.batch, "seed": seed}
    state = {k: v.clone() for k, v in student.state_dict().items()}
    barrier.wait()
    start = time.perf_counter()
    distil(student, teacher, examples, steps=20, **options_of_training)
    with slowest.get_lock():
        slowest.value = max(slowest.value, (time.perf_counter() - start) / 20)
    barrier.wait()
    steps = max(10, int(args.seconds / slowest.value))
    student.load_state_dict(state)
    start = time.perf_counter()
    distil(student, teacher, examples, steps=steps, rate=args.rate, rate_others=args.rate_others, **options_of_training)
    row |= {"steps": steps, "distil_s": time.perf_counter() - start}
    torch.set_float32_matmul_precision("highest")
    row |= {"after": scores(student, tokenizer, args.tables)}
    if name == args.keep and seed == 0:
        student.half().save_pretrained(args.out / "student", max_shard_size="15MB")
        tokenizer.save_pretrained(args.out / "student")
    results.put(row)


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["arm active% seeds | sts-b dev before -> after (spread) | sts-b test | sick test"]
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        cells = []
        for table in TABLES:
            values = [row["after"][table] for row in mine]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        before = statistics.mean(row["before"]["sts-b dev"] for row in mine)
        lines.append(f"{name} {100 * mine[0]['active']:.1f} {len(mine)} | {before:.2f} -> " + " | ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "tables", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--layer-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rate-others", type=float, default=1e-4)
    parser.add_argument("--keep", default="8x4-leaf12")
    parser.add_argument("--arms", nargs="*")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer, examples, _ = setup(args)
    reference = {
        "dense": scores(teacher, tokenizer, args.tables),
        "oracle": {f: oracle(teacher, tokenizer, args.tables, f) for f in (0.25, 0.1, 0.05, 0.02)},
        "examples": len(examples),
        "tokens": examples.tokens,
    }
    print(json.dumps(reference), f"{time.perf_counter() - began:.0f}s", flush=True)
    jobs = [(n, o, s) for n, o, seeds in ARMS for s in seeds if not args.arms or n in args.arms]
    context = mp.get_context("spawn")
    barrier, slowest, results = context.Barrier(len(jobs)), context.Value("d", 0.0), context.Queue()
    workers = [context.Process(target=run_arm, args=(args, *job, barrier, slowest, results)) for job in jobs]
    for worker in workers:
        worker.daemon = True
        worker.start()
    rows: list[dict[str, Any]] = []
    while len(rows) < len(jobs):
        try:
            rows.append(results.get(timeout=2))
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise SystemExit("an arm failed") from None
            continue
        record = {**reference, "device": _device(), "seconds": time.perf_counter() - began, "arms": rows}
        (args.out / "minilm.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{rows[0]['steps']} steps, {time.perf_counter() - began:.0f} s, dense {reference['dense']}")
    print("\n".join(summarise(sorted(rows, key=lambda r: [a[0] for a in ARMS].index(r["arm"])))))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
