"""Convert an embedding model in several ways, each distilled with the same recipe, and compare them.

python experiments/convert/minilm.py DIR OUT [--seconds 240]       one process for each variant and seed, on a GPU

DIR  what carry.py wrote. Only STS-B dev was looked at while the recipe was chosen. Writes OUT/minilm.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from carry import MAX_LENGTH, restore
from transformers import AutoModel, AutoTokenizer

import fastff.models  # noqa: F401
from fastff.convert.capture import capture
from fastff.convert.conversion_settings import BATCH, ConversionSettings
from fastff.convert.distil import Recipe, distil
from fastff.convert.initialise import contribution
from fastff.convert.quality import read_table, similarity
from fastff.convert.student import build_student, dense_layers, describe_narrow, describe_tree, flops
from fastff.models.families import family_of
from fastff.text.examples import tokenise
from tables import minilm_table

TABLES = {"sts-b dev": "glue/STS-B/dev", "sts-b test": "glue/STS-B/test", "sick test": "extra/SICK/test"}
TIMED_STEPS = 20
EVALUATION_S = 40.0  # kept of the time for evaluation at the end, and for steps that take longer than those timed
FRACTIONS = (0.25, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Variant:
    """A student: `options` of a tree, {"neurons": n} of a narrow layer, or none; and what its recipe has of its own."""

    name: str
    options: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: dict[str, float] = field(default_factory=dict)


def _trees(trees: int, depth: int, leaf_width: int, shared: int = 0) -> dict[str, Any]:
    return {"trees": trees, "depth": depth, "leaf_width": leaf_width, "shared": shared}


# The main comparison, at 10 % and 3 % of the work: trees beside a shared part against a narrow layer, and no layer.
# Then, one seed: a narrower gate, which explained 4 % more of one layer's effect when that was taught alone; dense
# layers that are faded out; an average of the weights.
VARIANTS = [
    Variant("narrow-152", {"neurons": 152}),
    Variant("2x5-leaf15-shared112", _trees(2, 5, 15, 112)),
    Variant("narrow-46", {"neurons": 46}),
    Variant("2x5-leaf6-shared24", _trees(2, 5, 6, 24)),
    Variant("none", {}, (0,)),
    Variant("2x5-leaf15-shared112 tau 0.2", _trees(2, 5, 15, 112) | {"tau": 0.2}, (0,)),
    Variant("2x5-leaf15-shared112 dense_fade", _trees(2, 5, 15, 112), (0,), {"dense_fade": 0.5}),
    Variant("2x5-leaf15-shared112 average", _trees(2, 5, 15, 112), (0,), {"average": 0.98}),
]


def describe(dense: Any, options: dict[str, Any]) -> dict[str, Any]:
    if "trees" in options:
        shape = {name: value for name, value in options.items() if name != "tau"}
        return describe_tree(dense, **shape) | {name: options[name] for name in ("tau",) if name in options}
    return describe_narrow(dense, options["neurons"]) if options else {"kind": "none"}


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
    work = args.out / "work"
    teacher = AutoModel.from_pretrained(work / "model", dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    unused: Any = None  # the text is not read: its tokens are there
    examples = tokenise(tokenizer, unused, work, max_length=MAX_LENGTH, max_tokens=0, whole_blocks=False)
    captured = capture(teacher, examples, work, rows=args.rows, batch=args.batch, progress=lambda *_: None)
    return teacher, tokenizer, examples, captured


@dataclass(frozen=True)
class Turnout:
    """What the processes of a run share: two meetings of all, the slowest one's seconds a step, the finished rows."""

    meeting: Any
    slowest: Any
    results: Any
    deadline: float  # time.time() by which the joint distillation ends


def run_variant(args: Any, variant: Variant, seed: int, shared: Turnout) -> None:
    """One process: build, agree with all others on a number of steps that fits the time, distil, evaluate."""
    built = attempt(lambda: build(args, variant, seed))
    shared.meeting.wait()  # a variant that failed meets the others too, or they would wait for it
    if built is not None and attempt(lambda: time_steps(args, built, shared.slowest)) is None:
        built = None
    shared.meeting.wait()
    if built is None:
        raise SystemExit(f"{variant.name} {seed} failed")
    student, teacher, tokenizer, examples, state, row = built
    seconds = min(args.seconds, shared.deadline - time.time())
    options = {"lr": args.lr, "lr_others": args.lr_others, **variant.recipe}
    recipe = Recipe(max(10, int(seconds / shared.slowest.value)), args.batch, seed=seed, **options)
    student.load_state_dict(state)
    start = time.perf_counter()
    distil(student, teacher, examples, recipe, kind="embedding")
    row |= {"steps": recipe.steps, "distil_s": time.perf_counter() - start, "recipe": variant.recipe}
    shared.results.put(row | {"after": scores(student, tokenizer, args)})


def build(args: Any, variant: Variant, seed: int) -> tuple[Any, ...]:
    """The student taught layer by layer, what it needs to go on, its weights, its figures."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    began = time.perf_counter()
    teacher, tokenizer, examples, captured = setup(args)
    dense = dense_layers(teacher)
    descriptions = [describe(d, variant.options) for d in dense]
    student, errors = build_student(teacher, descriptions, captured, steps=args.layer_steps, seed=seed)
    row: dict[str, Any] = {
        "variant": variant.name,
        "seed": seed,
        "description": descriptions[0],
        "active": sum(map(flops, dense, descriptions)) / sum(d.flops_per_row for d in dense),
        "unexplained": errors,
        "before": scores(student, tokenizer, args),
        "layers_s": time.perf_counter() - began,
    }
    print(f"{variant.name} {seed} built {row['layers_s']:.0f}s {row['before']['sts-b dev']:.2f}", flush=True)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    return student, teacher, tokenizer, examples, state, row


def time_steps(args: Any, built: tuple[Any, ...], slowest: Any) -> bool:
    """Take a few steps, at the same time as all others; keep the longest time of one."""
    student, teacher, _, examples, *_ = built
    start = time.perf_counter()
    distil(student, teacher, examples, Recipe(steps=TIMED_STEPS, batch=args.batch), kind="embedding")
    with slowest.get_lock():
        slowest.value = max(slowest.value, (time.perf_counter() - start) / TIMED_STEPS)
    return True


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns; None, and its error on the terminal, if it fails."""
    try:
        return work()
    except Exception:
        traceback.print_exc()
        return None


def run(args: Any) -> None:
    began = time.perf_counter()
    shutil.rmtree(args.out / "work", ignore_errors=True)
    (args.out / "work").mkdir(parents=True)
    restore(args.dir, args.out / "work")
    teacher, tokenizer, examples, _ = setup(args)
    reference = {
        "dense": scores(teacher, tokenizer, args),
        "oracle": {f: oracle(teacher, tokenizer, args.dir, f) for f in (() if args.dev_only else FRACTIONS)},
        "examples": len(examples),
        "tokens": examples.tokens,
        "settings": {k: getattr(args, k) for k in ("seconds", "rows", "layer_steps", "batch", "lr", "lr_others")},
    }
    print(json.dumps(reference), f"{time.perf_counter() - began:.0f}s", flush=True)
    jobs = [
        (variant, s)
        for variant in VARIANTS
        if not args.variants or variant.name in args.variants
        for s in variant.seeds[: args.seeds]
    ]
    context = mp.get_context("spawn")
    shared = Turnout(
        context.Barrier(len(jobs)),
        context.Value("d", 0.0),
        context.Queue(),
        time.time() + args.limit - (time.perf_counter() - began) - EVALUATION_S,
    )
    workers = [context.Process(target=run_variant, args=(args, *job, shared), daemon=True) for job in jobs]
    for worker in workers:
        worker.start()
    rows: list[dict[str, Any]] = []
    while len(rows) < len(jobs):
        try:
            rows.append(shared.results.get(timeout=2))
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        record = {**reference, "device": _device(), "seconds": time.perf_counter() - began, "variants": rows}
        (args.out / "minilm.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(args.out / "work")
    print(f"{rows[0]['steps']} steps, {time.perf_counter() - began:.0f} s, dense {reference['dense']}")
    print(minilm_table(reference["dense"], rows))
    if len(rows) < len(jobs):
        raise SystemExit(f"{len(jobs) - len(rows)} of {len(jobs)} variants failed")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="of the joint distillation, all variants at once")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of the whole command: fewer steps are taken")
    # The command's own settings, which this comparison tries out.
    parser.add_argument("--rows", type=int, default=ConversionSettings.rows)
    parser.add_argument("--layer-steps", type=int, default=ConversionSettings.layer_steps)
    parser.add_argument("--batch", type=int, default=BATCH["embedding"])
    parser.add_argument("--lr", type=float, default=ConversionSettings.lr)
    parser.add_argument("--lr-others", type=float, default=ConversionSettings.lr_others)
    parser.add_argument("--variants", nargs="*", help="names of variants, all by default")
    parser.add_argument("--dev-only", action="store_true", help="evaluate on STS-B dev alone, without the oracle")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many of each variant")
    args = parser.parse_args()
    run(args)


if __name__ == "__main__":
    main()
