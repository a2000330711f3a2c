"""Convert an embedding model in several ways, each distilled with the same recipe, and compare them.

python experiments/convert/minilm.py DIR OUT [--seconds 240]       one process for each variant and seed, on a GPU

DIR  what carry.py wrote. Only STS-B dev was looked at while the recipe was chosen. Writes OUT/minilm.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from carry import MAX_LENGTH, restore
from safetensors.torch import save
from together import by_dense_products, together
from transformers import AutoModel, AutoTokenizer

import fastff.models  # noqa: F401
from fastff.convert.capture import capture
from fastff.convert.conversion_settings import BATCH, ConversionSettings
from fastff.convert.distil import Recipe, distil
from fastff.convert.neurons import contribution
from fastff.convert.quality import embed, read_table, similarity
from fastff.convert.student import build_student, dense_layers, describe_experts, describe_narrow, describe_tree, flops
from fastff.models.families import family_of
from fastff.report.progress import Progress, silent
from fastff.text.examples import tokenise
from tables import minilm_table

TABLES = {"sts-b dev": "glue/STS-B/dev", "sts-b test": "glue/STS-B/test", "sick test": "extra/SICK/test"}
COLUMNS = ("sentence1", "sentence2", "label")
SETTINGS = ("seconds", "rows", "layer_steps", "batch", "lr", "lr_others", "lr_routers")
PIECE = 15 * 2**20
EVALUATION_S = 40.0  # kept of the time for evaluation at the end, and for steps that take longer than those timed
FRACTIONS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Variant:
    """A student: `options` of trees, of experts ("leaves"), {"neurons": n} of a narrow layer, or none; and what its
    recipe has of its own."""

    name: str
    options: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: dict[str, float] = field(default_factory=dict)


def _trees(trees: int, depth: int, leaf_width: int, shared: int = 0) -> dict[str, Any]:
    return {"trees": trees, "depth": depth, "leaf_width": leaf_width, "shared": shared}


def _experts(leaves: int, leaf_width: int, chosen: int, shared: int) -> dict[str, Any]:
    return {"leaves": leaves, "leaf_width": leaf_width, "chosen": chosen, "shared": shared}


# The main comparison, at 10 % and 3 % of the work: experts, trees beside a shared part, a narrow layer, and no layer.
# Then, one seed: a narrower gate, which explained 4 % more of one layer's effect when that was taught alone; dense
# layers that are faded out; an average of the weights.
VARIANTS = [
    Variant("experts-46x32-top2", _experts(46, 32, 2, 64)),
    Variant("experts-44x32-top1", _experts(44, 32, 1, 96)),
    Variant("experts-22x64-top1", _experts(22, 64, 1, 76)),
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
    if "leaves" in options:
        return describe_experts(dense, **options)
    return describe_narrow(dense, options["neurons"]) if options else {"kind": "none"}


def hits(encode: Callable[[list[str]], torch.Tensor], table: dict[str, list[Any]], best: int = 10) -> float:
    """Percent of the answered questions whose sentence is among the nearest `best` of all the table's sentences."""
    sentences = sorted(set(table["sentence2"]))
    pairs = [(q, s) for q, s, label in zip(*(table[c] for c in COLUMNS), strict=True) if label == 0]
    asked, stored = encode([q for q, _ in pairs]), encode(sentences)
    place = {sentence: k for k, sentence in enumerate(sentences)}
    nearest = (asked @ stored.t()).topk(best).indices
    right = torch.tensor([place[s] for _, s in pairs]).unsqueeze(1)
    return 100 * float((nearest == right).any(1).float().mean())


def scores(model: Any, tokenizer: Any, args: Any) -> dict[str, float]:
    out, folder = {}, args.dir
    for name, file in list(TABLES.items())[: 1 if args.dev_only else None]:
        table = read_table(folder / f"{file}.parquet")
        out[name] = similarity(model, tokenizer, table, "relatedness" if "relatedness" in table else "label")
    if not args.dev_only:
        out["retrieval"] = hits(partial(embed, model, tokenizer), read_table(folder / "retrieval.parquet"))
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
    captured = capture(teacher, examples, work, rows=args.rows, batch=args.batch, progress=silent)
    return teacher, tokenizer, examples, captured


class Student:
    """One variant in its process: built from captured rows, then distilled."""

    def __init__(self, args: Any, variant: Variant, seed: int) -> None:
        torch.manual_seed(seed)
        began = time.perf_counter()
        self.args, self.variant, self.seed = args, variant, seed
        self.teacher, self.tokenizer, self.examples, captured = setup(args)
        dense = dense_layers(self.teacher)
        descriptions = [describe(d, variant.options) for d in dense]
        self.student, errors = build_student(self.teacher, descriptions, captured, steps=args.layer_steps, seed=seed)
        by_dense_products(self.student)
        self.row: dict[str, Any] = {
            "variant": variant.name,
            "seed": seed,
            "description": descriptions[0],
            "active": sum(map(flops, dense, descriptions)) / sum(d.flops_per_row for d in dense),
            "unexplained": errors,
            "before": scores(self.student, self.tokenizer, args),
            "layers_s": time.perf_counter() - began,
        }
        print(f"{variant.name} {seed} built {self.row['layers_s']:.0f}s {self.row['before']}", flush=True)
        self.state = {k: v.clone() for k, v in self.student.state_dict().items()}

    def recipe(self, steps: int) -> Recipe:
        options = {name: getattr(self.args, name) for name in ("lr", "lr_others", "lr_routers")}
        return Recipe(steps, self.args.batch, seed=self.seed, **(options | self.variant.recipe))

    def take_steps(self, steps: int, progress: Progress) -> None:
        recipe = self.recipe(steps)
        distil(self.student, self.teacher, self.examples, recipe, kind="embedding", progress=progress)

    def finish(self, steps: int) -> dict[str, Any]:
        self.student.load_state_dict(self.state)
        distil(self.student, self.teacher, self.examples, self.recipe(steps), kind="embedding")
        after = scores(self.student, self.tokenizer, self.args)
        print(f"{self.variant.name} {self.seed} after {steps} steps {after}", flush=True)
        if self.args.keep is not None and self.seed == 0:
            keep(self.student, self.args.keep / self.variant.name)
        return {**self.row, "recipe": self.variant.recipe, "after": after}


def keep(student: Any, folder: Path) -> None:
    """Write what was taught, in half precision, in files of PIECE bytes: embeddings are the dense model's."""
    folder.mkdir(parents=True, exist_ok=True)
    taught = {
        name: value.half() for name, value in student.state_dict().items() if not name.endswith("_embeddings.weight")
    }
    whole = save({name: value.contiguous().cpu() for name, value in taught.items()})
    for k, start in enumerate(range(0, len(whole), PIECE)):
        (folder / f"taught-{k}").write_bytes(whole[start : start + PIECE])
    descriptions = student.config.fastff_feedforwards
    (folder / "feedforwards.json").write_text(json.dumps(descriptions) + "\n")


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
        "settings": {k: getattr(args, k) for k in SETTINGS},
    }
    print(json.dumps(reference), f"{time.perf_counter() - began:.0f}s", flush=True)
    jobs = [
        (variant, s)
        for variant in VARIANTS
        if not args.variants or variant.name in args.variants
        for s in variant.seeds[: args.seeds]
    ]

    def finished(rows: list[dict[str, Any]]) -> None:
        record = {**reference, "device": _device(), "seconds": time.perf_counter() - began, "variants": rows}
        (args.out / "minilm.json").write_text(json.dumps(record, indent=1) + "\n")

    deadline = time.time() + args.limit - (time.perf_counter() - began) - EVALUATION_S
    rows = together([(args, *job) for job in jobs], Student, seconds=args.seconds, deadline=deadline, finished=finished)
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
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--lr-others", type=float, default=Recipe.lr_others)
    parser.add_argument("--lr-routers", type=float, default=Recipe.lr_routers)
    parser.add_argument("--keep", type=Path, help="folder for what each first seed was taught")
    parser.add_argument("--variants", nargs="*", help="names of variants, all by default")
    parser.add_argument("--dev-only", action="store_true", help="evaluate on STS-B dev alone, without the oracle")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many of each variant")
    args = parser.parse_args()
    run(args)


if __name__ == "__main__":
    main()
