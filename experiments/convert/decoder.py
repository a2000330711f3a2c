"""Convert a Llama-like decoder in several ways, each distilled with the same recipe and tokens, and compare them.

python experiments/convert/decoder.py tokens GGUF DATA OUT.npy wiki-train-00 ...        shards of DATA/text as tokens
python experiments/convert/decoder.py layers GGUF TRAIN.npy,.. WORK OUT.json    blocks alone, in many shapes
python experiments/convert/decoder.py run GGUF TRAIN.npy,.. HELD.npy WORK OUT.json --variants experts-50 narrow-50 ...

Every variant has a process; all share one GPU and take equally many steps, or a share of them. Perplexity is that of
HELD, whose articles are in no TRAIN. A variant may have settings of its own: experts-50-b:0,lr=1.2e-3,beta2=0.999
"""

from __future__ import annotations

import argparse
import fcntl
import json
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from decoder_variants import EXPERTS, TREES, describe, describe_all, sizes_of
from together import together
from transformers import AutoModelForCausalLM

import fastff.models  # noqa: F401
from fastff.convert import distil_loss
from fastff.convert.capture import capture
from fastff.convert.distil import (
    Recipe,
    distil,
    learn_without_dropout,
    normaliser,
    teach_layer,
    use_masked_training,
)
from fastff.convert.experts import group_neurons, kept_share
from fastff.convert.latency import best_selection_unexplained
from fastff.convert.student import build_student, dense_layers, flops
from fastff.engine.gguf import Gguf, GgufWeights, configuration
from fastff.engine.gguf_tokenizer import tokenizer_of
from fastff.models.converted import make_converted
from fastff.models.families import family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.report.progress import Progress, silent
from fastff.text.examples import Examples, TextExamples

LENGTH = 256
EVALUATION_S = 12.0
OPTIONS = ("lr", "lr_others", "lr_routers", "beta2")  # of a recipe, that a variant may have for itself


def tokens(gguf: Path, data: Path, out: Path, shards: Sequence[str]) -> None:
    """All documents of some shards, one end-of-text token (0) after each, as uint16."""
    backend, found = tokenizer_of(Gguf(gguf)).backend_tokenizer, []
    for shard in shards:
        text = lzma.decompress((data / f"text/{shard}.txt.xz").read_bytes()).decode()
        documents = [document for document in text.split("\n\n") if len(document) > 50]
        for start in range(0, len(documents), 512):
            for encoded in backend.encode_batch(documents[start : start + 512], add_special_tokens=False):
                found.append(np.array([*encoded.ids, 0], dtype=np.uint16))
    np.save(out, np.concatenate(found))


def load(gguf: Path, folder: Path | None = None) -> Any:
    """The model of a GGUF file, or the copy of it that `folder` holds."""
    if folder is None or not (folder / "config.json").exists():
        file = Gguf(gguf)
        config = configuration(file)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(dict(GgufWeights(file, config).items()), strict=False)
        model.tie_weights()
        if folder is not None:
            model.save_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def blocks(paths: str, most: int | None = None) -> Examples:
    ids = np.concatenate([np.load(path) for path in paths.split(",")])
    count = min(len(ids) // LENGTH, most or len(ids))
    return TextExamples(ids[: count * LENGTH], np.arange(0, count * LENGTH + 1, LENGTH), 0)


def compile_blocks(model: Any) -> None:
    """All blocks run one compiled code: without a cache of keys, whose place in it would tell them apart, and with one
    mask, which Transformers would make another way while a CUDA graph is recorded."""
    torch._dynamo.config.recompile_limit = 64  # a layer of another shape is other code
    model.config.use_cache = False
    model.register_forward_pre_hook(_causal_mask, with_kwargs=True)
    for block in family_of("llama").blocks_of(model):
        block.compile(dynamic=False)


def _causal_mask(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows, length = inputs["input_ids"].shape
    mask = torch.ones(length, length, dtype=torch.bool, device=inputs["input_ids"].device).tril()
    return args, {**inputs, "attention_mask": mask.expand(rows, 1, length, length)}


def compile_loss() -> None:
    """The divergence in one pass over both models' logits, without copies of them in float32."""
    distil_loss.VALUES_AT_ONCE = 2**40
    distil_loss.divergence_sum = torch.compile(distil_loss.divergence_sum, dynamic=False)


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def evaluate(model: Any, held: Examples) -> float:
    """Perplexity, in the precision and by the products of training."""
    learn_without_dropout(model)
    total, count = 0.0, 0
    for which in held.in_order(16):
        ids = held.batch(which, model.device)["input_ids"]
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


class Student:
    """One variant in its process: built from captured rows, then distilled."""

    def __init__(self, args: argparse.Namespace, variant: str, seed: int, options: dict[str, float]) -> None:
        torch.manual_seed(seed)
        began = time.perf_counter()
        self.args, self.seed, self.options = args, seed, options
        self.teacher = load(args.gguf, args.work / "model")
        self.examples, self.held = blocks(args.train), blocks(args.held, args.held_blocks)
        dense = dense_layers(self.teacher)
        descriptions = describe_all(dense, variant)
        with one_at_a_time(args.work / f"{variant}-{seed}-start.pt") as start:
            self.student, errors = begin(args, self.teacher, variant, descriptions, seed, start)
        self.compiled = args.compiled
        if self.compiled:
            compile_loss()
            for model in (self.student, self.teacher):
                compile_blocks(model)
        self.row: dict[str, Any] = {
            "variant": variant,
            "seed": seed,
            **options,
            "description": next(filter(None, descriptions)),
            "shares": [flops(*pair) / pair[0].flops_per_row for pair in zip(dense, descriptions, strict=True)],
            "active": sum(map(flops, dense, descriptions)) / sum(layer.flops_per_row for layer in dense),
            "unexplained": errors,
            "layers_s": time.perf_counter() - began,
        }
        self.row["before"] = evaluate(self.student, self.held)
        alone = np.mean([error for error in errors if error is not None])
        print(variant, seed, f"{self.row['layers_s']:.0f} s, {self.row['before']:.2f}", alone, flush=True)
        self.state = {name: value.clone() for name, value in self.student.state_dict().items()}

    @property
    def name(self) -> str:
        return "-".join([self.row["variant"], str(self.seed), *(f"{k}{v}" for k, v in self.options.items())])

    def recipe(self, steps: int) -> Recipe:
        return Recipe(
            steps,
            self.args.batch,
            seed=self.seed,
            hidden_share=self.args.hidden_share,
            **recipe_of(self.args, self.options),
        )

    def distil(self, steps: int, progress: Progress) -> None:
        plain = self.args.plain
        recipe = self.recipe(steps)
        distil(self.student, self.teacher, self.examples, recipe, kind="causal", progress=progress, recorded=not plain)

    def take_steps(self, steps: int, progress: Progress) -> None:
        try:
            self.distil(steps, progress)
        except Exception as error:
            if not self.compiled:
                raise
            print(f"{self.row['variant']}: goes on without the compiler: {error!r:.300}", flush=True)
            self.compiled = False
            torch.compiler.set_stance("force_eager")
            self.student.load_state_dict(self.state)
            self.distil(steps, progress)

    def finish(self, steps: int) -> dict[str, Any]:
        self.student.load_state_dict(self.state)
        name, began, curve = self.name, time.perf_counter(), []
        evaluated = {int(part * steps) for part in self.args.evaluated}

        def note(stage: str, done: float, total: float | None = None, note: str = "") -> None:
            if done in evaluated:
                curve.append([int(done), evaluate(self.student, self.held)])
                torch.cuda.empty_cache()
                print(f"{name} {done}/{total} {time.perf_counter() - began:.0f} s, {curve[-1][1]:.2f}", flush=True)
                (self.args.work / f"{name}.json").write_text(json.dumps({**self.row, "steps": steps, "curve": curve}))

        self.take_steps(steps, note)
        after = evaluate(self.student, self.held)
        print(name, f"after {steps} steps: {after:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
        if self.args.keep is not None and self.row["variant"] in self.args.keep_variants and self.seed == 0:
            self.student.half().save_pretrained(self.args.keep / self.row["variant"])
        figures = {"compiled": self.compiled, "curve": curve, "after": after}
        return {**self.row, **figures, "tokens": steps * self.args.batch * LENGTH}


@contextmanager
def one_at_a_time(path: Path) -> Iterator[Path]:
    """`path`, for one process at a time."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def begin(
    args: argparse.Namespace, teacher: Any, variant: str, descriptions: Sequence[Any], seed: int, path: Path
) -> tuple[Any, list[float | None]]:
    """A student whose layers were taught alone, or, of a variant `kept` or `pruned`, are the dense layers' neurons as
    they are; and what they leave unexplained. Read from `path`, or written there."""
    if path.exists():
        student = make_converted(teacher, descriptions)
        use_masked_training(student.modules(), student.device.type == "cuda")
        stored = torch.load(path, map_location=student.device)
        student.load_state_dict(stored["state"])
        return student, stored["unexplained"]
    as_they_are = variant.startswith("pruned") or variant.endswith("-kept")
    student, errors = build_student(
        teacher,
        descriptions,
        captured_of(args, teacher),
        steps=args.layer_steps,
        seed=seed,
        pruned=range(len(descriptions)) if as_they_are else (),
    )
    torch.save({"state": student.state_dict(), "unexplained": errors}, path)
    return student, errors


def recipe_of(args: argparse.Namespace, options: dict[str, float]) -> dict[str, float]:
    return {name: options.get(name, getattr(args, name)) for name in OPTIONS}


def start(args: argparse.Namespace) -> None:
    """Build what `run` will begin with."""
    args.work.mkdir(parents=True, exist_ok=True)
    teacher = load(args.gguf, args.work / "model")
    for words in args.variants:
        (_, variant, seed, _), _ = job_of(args, words)
        with one_at_a_time(args.work / f"{variant}-{seed}-start.pt") as path:
            torch.manual_seed(seed)
            begin(args, teacher, variant, describe_all(dense_layers(teacher), variant), seed, path)
        print(variant, seed, flush=True)


def layers(args: argparse.Namespace) -> None:
    """Some blocks' layers taught alone in every shape, a process a block; and what the best neurons would leave."""
    began = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    captured_of(args, load(args.gguf, args.work / "model"))
    print(f"captured {time.time() - began:.0f} s", flush=True)
    with mp.get_context("spawn").Pool(len(args.blocks)) as pool:
        rows = pool.starmap(one_block, [(args, block) for block in args.blocks])
    record = {"device": device(), "seconds": time.time() - began, "steps": args.layer_steps, "blocks": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in rows[0]["variants"]:
        figures = [row["variants"][name] for row in rows]
        print(name, " ".join(f"{f['unexplained']:.3f}" for f in figures), figures[0], flush=True)
    print([row["oracle"] for row in rows])


def one_block(args: argparse.Namespace, block: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    teacher = load(args.gguf, args.work / "model")
    captured = captured_of(args, teacher)[block]
    layer = dense_layers(teacher)[block]
    norm = normaliser(teacher, family_of("llama").blocks_of(teacher)[block])
    x = captured.rows(slice(0, 12288), teacher.device)[0]
    found: dict[str, Any] = {}
    for variant in args.variants or [*EXPERTS, *TREES, "narrow-50", "narrow-25"]:
        start = time.perf_counter()
        description = describe(layer, variant)
        module = ConvertedFeedforward(description, x.shape[1]).to(x.device)
        module.masked_training = True
        error = teach_layer(module, layer, norm, captured, steps=args.layer_steps)
        found[variant] = {"active": flops(layer, description) / layer.flops_per_row, "unexplained": error}
        if variant in EXPERTS:
            sizes = sizes_of(variant)
            found[variant] |= kept_share(layer, x[8192:], group_neurons(layer, x[:8192], **sizes), sizes["chosen"])
        found[variant]["seconds"] = time.perf_counter() - start
    return {"block": block, "oracle": best_selection_unexplained(teacher, block, captured), "variants": found}


def captured_of(args: argparse.Namespace, teacher: Any) -> Any:
    return capture(teacher, blocks(args.train), args.work, rows=args.rows, batch=32, progress=silent)


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def job_of(args: argparse.Namespace, words: str) -> tuple[tuple[Any, ...], float]:
    """From NAME[:SEED[:SHARE]][,OPTION=VALUE...]: a job, and its share of the steps."""
    where, *options = words.split(",")
    name, seed, share, *_ = [*where.split(":"), "", ""]
    given = {key: float(value) for key, value in (option.split("=") for option in options)}
    if unknown := set(given) - set(OPTIONS):
        raise SystemExit(f"{words}: {', '.join(sorted(unknown))} is none of {', '.join(OPTIONS)}")
    return (args, name, int(seed or 0), given), float(share or 1)


def run(args: argparse.Namespace) -> None:
    began = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    teacher = load(args.gguf, args.work / "model")
    examples, held = blocks(args.train), blocks(args.held, args.held_blocks)
    captured_of(args, teacher)
    reference: dict[str, Any] = {
        "model": args.gguf.name,
        "dense": evaluate(teacher, held),
        "device": device(),
        "torch": torch.__version__,
        "tokens": examples.tokens,
        "held_tokens": held.tokens,
        "settings": {
            name: getattr(args, name)
            for name in (
                *("rows", "layer_steps", "batch", *OPTIONS),
                *("hidden_share", "compiled", "plain"),
            )
        },
    }
    print(json.dumps(reference), f"{time.time() - began:.0f} s", flush=True)
    del teacher

    def finished(rows: list[dict[str, Any]]) -> None:
        record = {**reference, "seconds": time.time() - began, "variants": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    jobs, shares = zip(*(job_of(args, job) for job in args.variants), strict=True)
    deadline = began + args.limit - EVALUATION_S
    rows = together(jobs, Student, seconds=args.seconds, deadline=deadline, finished=finished, shares=shares)
    for row in sorted(rows, key=lambda row: (row["variant"], row["seed"])):
        print(
            row["variant"],
            row["seed"],
            {name: row[name] for name in OPTIONS if name in row},
            f"{row['active']:.3f} {row['before']:.2f} -> {row['after']:.2f}",
            flush=True,
        )
    if len(rows) < len(jobs):
        raise SystemExit(f"{len(jobs) - len(rows)} of {len(jobs)} variants failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("tokens")
    for name in ("gguf", "data", "out"):
        made.add_argument(name, type=Path)
    made.add_argument("shards", nargs="+")
    ran = commands.add_parser("run")
    ran.add_argument("gguf", type=Path)
    ran.add_argument("train")
    ran.add_argument("held")
    ran.add_argument("work", type=Path)
    ran.add_argument("out", type=Path)
    ran.add_argument("--variants", nargs="+", required=True, help="NAME[:SEED[:SHARE of the steps]][,OPTION=VALUE...]")
    ran.add_argument("--seconds", type=float, default=1500.0, help="of the joint distillation, all variants at once")
    ran.add_argument("--limit", type=float, default=1e9, help="seconds of the whole command: fewer steps are taken")
    alone = commands.add_parser("layers")
    alone.add_argument("gguf", type=Path)
    alone.add_argument("train")
    alone.add_argument("work", type=Path)
    alone.add_argument("out", type=Path)
    alone.add_argument("--blocks", type=int, nargs="*", default=[2, 14, 27])
    alone.add_argument("--variants", nargs="*")
    begun = commands.add_parser("start", help="build what `run` begins with")
    for name in ("gguf", "train", "work"):
        begun.add_argument(name, type=str if name == "train" else Path)
    begun.add_argument("--variants", nargs="+", required=True)
    for both in (ran, alone, begun):
        both.add_argument("--rows", type=int, default=40_960)
        both.add_argument("--layer-steps", type=int, default=100)
    ran.add_argument("--batch", type=int, default=32)
    ran.add_argument("--held-blocks", type=int, default=400)
    ran.add_argument("--lr", type=float, default=6e-4)
    ran.add_argument("--lr-others", type=float, default=2e-4)
    ran.add_argument("--lr-routers", type=float, default=Recipe.lr_routers)
    ran.add_argument("--beta2", type=float, default=Recipe.beta2)
    ran.add_argument("--evaluated", type=float, nargs="*", default=[0.25, 0.5, 0.75, 0.95], help="shares of the steps")
    ran.add_argument("--hidden-share", type=float, default=Recipe.hidden_share)
    ran.add_argument("--compiled", action="store_true", help="compile blocks; needs --hidden-share 0")
    ran.add_argument("--plain", action="store_true", help="record no CUDA graph")
    ran.add_argument("--keep", type=Path, help="folder for the students of --keep-variants, in half precision")
    ran.add_argument("--keep-variants", nargs="*", default=[])
    args = parser.parse_args()
    if args.command == "tokens":
        tokens(args.gguf, args.data, args.out, args.shards)
    else:
        {"layers": layers, "start": start, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
