"""Convert an embedding model in several ways, each distilled alike, and compare them.

python runs/convert_minilm.py prepare MODEL TEXT TABLES DIR     on any machine: writes what the run reads, under 60 MiB
python runs/convert_minilm.py run DIR OUT [--seconds 240]       one process an arm and seed, on a GPU if there is one

MODEL   directory of all-MiniLM-L6-v2    TEXT  unlabelled sentences, one a line (.xz, .gz or plain)
TABLES  folder with glue/STS-B/dev.parquet, glue/STS-B/test.parquet and extra/SICK/test.parquet
Only STS-B dev was looked at while the recipe was chosen. `run` writes OUT/minilm.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import queue
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModel, AutoTokenizer

import fastff.models  # noqa: F401
from fastff.convert.capture import capture
from fastff.convert.distil import Recipe, distil
from fastff.convert.evaluate import read_table, similarity
from fastff.convert.initialise import contribution
from fastff.convert.student import build_student, dense_layers, describe_narrow, describe_tree, flops
from fastff.convert.text import tokenise
from fastff.models.families import family_of

TABLES = {"sts-b dev": "glue/STS-B/dev", "sts-b test": "glue/STS-B/test", "sick test": "extra/SICK/test"}
MAX_LENGTH = 64
TIMED_STEPS = 20
FRACTIONS = (0.25, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Arm:
    """A student: `options` of a tree, {"neurons": n} of a narrow layer, or none; and what its recipe has of its own."""

    name: str
    options: dict[str, int]
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: dict[str, float] = field(default_factory=dict)


# The main comparison first, at 10 % and 3 % of the work; then, one seed each, what might make trees better.
ARMS = [
    Arm("narrow-154", {"neurons": 154}),
    Arm("8x4-leaf15", {"trees": 8, "depth": 4, "leaf_width": 15}),
    Arm("2x4-leaf32-shared80", {"trees": 2, "depth": 4, "leaf_width": 32, "shared": 80}),
    Arm("narrow-46", {"neurons": 46}),
    Arm("4x4-leaf7", {"trees": 4, "depth": 4, "leaf_width": 7}),
    Arm("none", {}, (0,)),
    Arm("16x4-leaf5", {"trees": 16, "depth": 4, "leaf_width": 5}, (0,)),
    Arm("8x6-leaf13", {"trees": 8, "depth": 6, "leaf_width": 13}, (0,)),
    Arm("8x4-leaf15 slow turns", {"trees": 8, "depth": 4, "leaf_width": 15}, (0,), {"rate_routing": 0.1}),
    Arm("8x4-leaf15 mild", {"trees": 8, "depth": 4, "leaf_width": 15}, (0,), {"mild": 0.3}),
    Arm("8x4-leaf15 average", {"trees": 8, "depth": 4, "leaf_width": 15}, (0,), {"average": 0.98}),
    Arm("8x4-leaf15 rate 3e-3", {"trees": 8, "depth": 4, "leaf_width": 15}, (0,), {"rate": 3e-3}),
    Arm("narrow-154 average", {"neurons": 154}, (0,), {"average": 0.98}),
]


def describe(dense: Any, options: dict[str, int]) -> dict[str, Any]:
    if "trees" in options:
        return describe_tree(dense, **options)
    return describe_narrow(dense, options["neurons"]) if options else {"kind": "none"}


def prepare(model: Path, text: Path, tables: Path, out: Path, tokens: int) -> None:
    """Write half-precision weights, packed token ids and the tables to a folder that can be carried elsewhere."""
    out.mkdir(parents=True, exist_ok=True)
    AutoModel.from_pretrained(model, dtype=torch.float16).save_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(out / "model")
    work = out / "plain"
    examples = tokenise(tokenizer, text, work, max_length=MAX_LENGTH, max_tokens=tokens, whole_blocks=False)
    for name in ("tokens.bin", "offsets.npy"):
        with lzma.open(out / f"{name}.xz", "wb", preset=1) as packed, (work / name).open("rb") as plain:
            shutil.copyfileobj(plain, packed)
    for name in TABLES.values():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables / f"{name}.parquet", out / f"{name}.parquet")
    print(f"{len(examples)} examples, {examples.tokens} tokens")
    del examples
    shutil.rmtree(work)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {out}")


def scores(model: Any, tokenizer: Any, args: Any) -> dict[str, float]:
    out, folder = {}, args.dir
    for name, file in list(TABLES.items())[: 1 if args.dev_only else None]:
        table = read_table(folder / f"{file}.parquet")
        out[name] = similarity(model, tokenizer, table, "relatedness" if "relatedness" in table else "label")
    return out


def oracle(model: Any, tokenizer: Any, folder: Path, fraction: float) -> float:
    """STS-B dev when every token keeps only the dense neurons that contribute most to it."""
    hooks = []
    family = family_of(model.config.model_type)
    for block, dense in zip(family.blocks_of(model), dense_layers(model), strict=True):
        keep = max(1, round(fraction * dense.neurons))

        def select(_m: Any, a: Any, y: torch.Tensor, dense: Any = dense, keep: int = keep) -> torch.Tensor:
            least = contribution(dense, a[0]).topk(keep, dim=-1).values[..., -1:]
            return torch.where(contribution(dense, a[0]) >= least, y, 0)

        hooks.append(family.slot_of(block).register_forward_hook(select))
    result = similarity(model, tokenizer, read_table(folder / f"{TABLES['sts-b dev']}.parquet"))
    for hook in hooks:
        hook.remove()
    return result


def setup(args: Any) -> tuple[Any, Any, Any, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModel.from_pretrained(args.dir / "model", dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.dir / "model")
    work = args.out / "work"
    if not work.exists():
        work.mkdir(parents=True)
        for name in ("tokens.bin", "offsets.npy"):
            with lzma.open(args.dir / f"{name}.xz") as packed, (work / name).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    unused: Any = None  # the text is not read: its tokens are there
    examples = tokenise(tokenizer, unused, work, max_length=MAX_LENGTH, max_tokens=0, whole_blocks=False)
    captured = capture(teacher, examples, work, rows=args.rows, batch=args.batch, progress=lambda *_: None)
    return teacher, tokenizer, examples, captured


def run_arm(args: Any, arm: Arm, seed: int, barrier: Any, slowest: Any, results: Any) -> None:
    """One process: build, agree with all others on a number of steps that fits the time, distil, evaluate."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    began = time.perf_counter()
    teacher, tokenizer, examples, captured = setup(args)
    dense = dense_layers(teacher)
    descriptions = [describe(d, arm.options) for d in dense]
    student, errors = build_student(teacher, descriptions, captured, steps=args.layer_steps, seed=seed)
    row: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "active": sum(map(flops, dense, descriptions)) / sum(d.flops_per_row for d in dense),
        "missed": errors,
        "before": scores(student, tokenizer, args),
        "layers_s": time.perf_counter() - began,
    }
    print(f"{arm.name} {seed} built {row['layers_s']:.0f}s {row['before']['sts-b dev']:.2f}", flush=True)
    torch.set_float32_matmul_precision("high")
    state = {k: v.clone() for k, v in student.state_dict().items()}
    barrier.wait()
    start = time.perf_counter()
    distil(student, teacher, examples, Recipe(steps=TIMED_STEPS, batch=args.batch, seed=seed), kind="embedding")
    with slowest.get_lock():
        slowest.value = max(slowest.value, (time.perf_counter() - start) / TIMED_STEPS)
    barrier.wait()
    recipe = Recipe(
        **{
            "steps": max(10, int(args.seconds / slowest.value)),
            "batch": args.batch,
            "rate": args.rate,
            "rate_others": args.rate_others,
            "seed": seed,
            **arm.recipe,
        }
    )
    student.load_state_dict(state)
    start = time.perf_counter()
    distil(student, teacher, examples, recipe, kind="embedding")
    row |= {"steps": recipe.steps, "distil_s": time.perf_counter() - start, "recipe": arm.recipe}
    torch.set_float32_matmul_precision("highest")
    results.put(row | {"after": scores(student, tokenizer, args)})


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["arm active% seeds | sts-b dev before -> after (spread) | sts-b test | sick test"]
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        cells = []
        for table in mine[0]["after"]:
            values = [row["after"][table] for row in mine]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        before = statistics.mean(row["before"]["sts-b dev"] for row in mine)
        lines.append(f"{name} {100 * mine[0]['active']:.1f} {len(mine)} | {before:.2f} -> " + " | ".join(cells))
    return lines


def run(args: Any) -> None:
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer, examples, _ = setup(args)
    reference = {
        "dense": scores(teacher, tokenizer, args),
        "oracle": {f: oracle(teacher, tokenizer, args.dir, f) for f in (() if args.dev_only else FRACTIONS)},
        "examples": len(examples),
        "tokens": examples.tokens,
        "settings": {k: getattr(args, k) for k in ("seconds", "rows", "layer_steps", "batch", "rate", "rate_others")},
    }
    print(json.dumps(reference), f"{time.perf_counter() - began:.0f}s", flush=True)
    jobs = [(arm, s) for arm in ARMS if not args.arms or arm.name in args.arms for s in arm.seeds[: args.seeds]]
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
    shutil.rmtree(args.out / "work")
    print(f"{rows[0]['steps']} steps, {time.perf_counter() - began:.0f} s, dense {reference['dense']}")
    names = [arm.name for arm in ARMS]
    print("\n".join(summarise(sorted(rows, key=lambda r: names.index(r["arm"])))))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    for name in ("model", "text", "tables", "dir"):
        first.add_argument(name, type=Path)
    first.add_argument("--tokens", type=int, default=7_000_000)
    second = commands.add_parser("run")
    second.add_argument("dir", type=Path)
    second.add_argument("out", type=Path)
    second.add_argument("--seconds", type=float, default=240.0, help="of the joint distillation, all arms at once")
    second.add_argument("--rows", type=int, default=200_000)
    second.add_argument("--layer-steps", type=int, default=150)
    second.add_argument("--batch", type=int, default=256)
    second.add_argument("--rate", type=float, default=1e-3)
    second.add_argument("--rate-others", type=float, default=1e-4)
    second.add_argument("--arms", nargs="*", help="names of arms, all by default")
    second.add_argument("--dev-only", action="store_true", help="evaluate on STS-B dev alone, without the oracle")
    second.add_argument("--seeds", type=int, default=3, help="at most so many of each arm")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.model, args.text, args.tables, args.dir, args.tokens)
    else:
        run(args)


if __name__ == "__main__":
    main()
