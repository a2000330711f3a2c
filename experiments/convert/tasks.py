"""Convert a causal model and a classifier, both made here, at a share of the work; with baselines.

python experiments/convert/tasks.py DIR OUT [--tasks causal classifier] [--train-seconds 100] [--seconds 45]

DIR  what experiments/convert/carry.py wrote. Writes OUT/tasks.json. The tasks run at the same time, a process each.

causal      a decoder of SIZE is pretrained as `fastff pretrain --objective causal` does, on documents of Wikipedia;
            perplexity on documents that neither pretraining nor conversion saw
classifier  all-MiniLM-L6-v2 is fine-tuned on SST-2; accuracy on its dev part; the conversion reads no labels

Each student gets as many steps as fit into `--seconds`, counted with the tree, the slowest.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from carry import CAUSAL, restore
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastff.convert.capture import capture
from fastff.convert.choose_layers import Shape
from fastff.convert.conversion import split_examples
from fastff.convert.conversion_settings import BATCH, ConversionSettings
from fastff.convert.dense_model import load_dense
from fastff.convert.distill_context import DistillContext, active_share, baseline, teach
from fastff.convert.quality import METRIC, accuracy, perplexity, read_table
from fastff.convert.student import dense_layers
from fastff.convert.time_budget import step_seconds
from fastff.text.examples import tokenise
from fastff.train import presets, pretrain

SIZE = presets.Preset("mini", 256, 6, 8, 128, 8192, 128, 128, 1e-3, 1, 5_000_000)
VARIANTS = ("tree", "narrow", "none")
VALID = 0.05  # of the documents
RATE, EPOCHS = 1e-4, 3  # of fine-tuning


def documents(folder: Path, work: Path) -> tuple[Path, Path]:
    """Text to learn from and text for perplexity, plain."""
    packed = [lzma.decompress((folder / f"text/{name}.txt.xz").read_bytes()).decode() for name in CAUSAL]
    every = "\n\n".join(packed).split("\n\n")
    cut = int((1 - VALID) * len(every))
    paths = work / "train.txt", work / "valid.txt"
    for path, part in zip(paths, (every[:cut], every[cut:]), strict=True):
        path.write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return paths


def make_causal(args: Any, work: Path) -> tuple[Path, Path, dict[str, Any], Callable[[Any, Any], float]]:
    """Model directory, text, record, and the measure of a model."""
    text, valid = documents(args.dir, work)
    presets.PRESETS[SIZE.name] = SIZE
    settings = pretrain.ConversionSettings(
        out=work / "pretrain",
        text=(str(text),),
        valid=(str(valid),),
        preset=SIZE.name,
        batch=args.batch,
        objective="causal",
        seconds=args.train_seconds,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        save_every=10**6,
    )
    record = pretrain.pretrain(settings)
    kept = {name: record[name] for name in ("parameters", "text_tokens", "steps", "tokens", "seconds", "valid_loss")}
    held_out: list[Any] = []

    def measure(model: Any, tokenizer: Any) -> float:
        if not held_out:
            options: dict[str, Any] = {"max_length": SIZE.length, "max_tokens": args.valid_tokens}
            held_out.append(tokenise(tokenizer, valid, work / "valid", whole_blocks=True, **options))
        return perplexity(model, held_out[0])

    return work / "pretrain" / pretrain.MODEL, text, kept, measure


def make_classifier(args: Any, work: Path) -> tuple[Path, Path, dict[str, Any], Callable[[Any, Any], float]]:
    """Model directory, text, record, and the measure of a model."""
    torch.manual_seed(0)
    source = restore(args.dir, work / "source")
    table = read_table(args.dir / "glue/SST-2/train.parquet")
    sentences = [sentence.strip() for sentence in table["sentence"]]
    text = work / "sentences.txt"
    order = np.random.default_rng(0).permutation(len(sentences))
    text.write_text("\n".join(sentences[k] for k in order) + "\n", encoding="utf-8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(source)
    steps = fine_tune(model, tokenizer, sentences, np.asarray(table["label"]), args)
    model.save_pretrained(work / "dense")
    tokenizer.save_pretrained(work / "dense")
    dev = read_table(args.dir / "glue/SST-2/dev.parquet")
    return work / "dense", text, {"steps": steps}, lambda model, tokenizer: accuracy(model, tokenizer, dev)


def fine_tune(model: Any, tokenizer: Any, sentences: list[str], labels: np.ndarray[Any, Any], args: Any) -> int:
    """Ordinary fine-tuning, the lr falling to zero over the time or EPOCHS, whichever ends first."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    rng, start, step = np.random.default_rng(0), time.perf_counter(), 0
    total = EPOCHS * len(sentences) // args.batch
    model.train()
    order = np.concatenate([rng.permutation(len(sentences)) for _ in range(EPOCHS)])
    while step < total and (spent := (time.perf_counter() - start) / args.train_seconds) < 1:
        which = order[step * args.batch : (step + 1) * args.batch]
        inputs = tokenizer(
            [sentences[k] for k in which], padding=True, truncation=True, max_length=64, return_tensors="pt"
        ).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(**inputs).logits
        loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[which]).long().to(model.device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - max(spent, step / total))
        optimiser.step()
        step += 1
    model.eval()
    return step


def run_task(args: Any, task: str, results: Any) -> None:
    """Make the dense model, convert it, put the record into the queue."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    work = args.out / f"work-{task}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    folder, text, made, measure = (make_causal if task == "causal" else make_classifier)(args, work)
    print(f"{task}: made in {time.perf_counter() - began:.0f} s {made}", flush=True)
    teacher, tokenizer, kind = load_dense(str(folder))
    options: dict[str, Any] = {
        "model": str(folder),
        "text": text,
        "out": work / "converted",
        "active": args.active,
        "rows": args.rows,
        "layer_steps": args.layer_steps,
        "max_length": SIZE.length if task == "causal" else 64,
        "batch": BATCH[kind],
        "max_tokens": args.tokens,
        "routing_lr_scale": args.routing_lr_scale,
    }
    settings = ConversionSettings(**options)
    examples, held_out = split_examples(settings, tokenizer, kind, work)
    captured = capture(teacher, examples, work, rows=args.rows, batch=settings.batch, progress=lambda *_: None)
    torch.manual_seed(0)
    dense = dense_layers(teacher)
    trees = [Shape(args.trees, args.depth, part=args.part).fit(layer, args.active) for layer in dense]

    quality = lambda model: measure(model, tokenizer)  # noqa: E731
    context = DistillContext(settings, kind, teacher, captured, examples, held_out, quality, {}, lambda *_: None)
    steps = max(5, int(args.seconds / step_seconds(context, trees)))
    record: dict[str, Any] = {
        "task": task,
        "metric": METRIC[kind],
        "made": made,
        "description": trees[0],
        "steps": steps,
        "dense": measure(teacher, tokenizer),
        "examples": len(examples),
        "tokens": examples.tokens,
        "variants": {},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    print(f"{task}: dense {record['dense']:.3f}, {steps} steps {time.perf_counter() - began:.0f} s", flush=True)
    for name in args.variants:
        start = time.perf_counter()
        descriptions = trees if name == "tree" else baseline(name, dense, trees)
        _, facts = teach(context, name, descriptions, work / name, steps)
        share = active_share(dense, descriptions)
        record["variants"][name] = {**facts, "active": share, "seconds": time.perf_counter() - start}
        record["seconds"] = time.perf_counter() - began
        print(f"{task}: {name} {share:.4f} {facts['before']:.3f} -> {facts['after']:.3f}", flush=True)
        results.put(json.loads(json.dumps(record)))
    shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["causal", "classifier"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--train-seconds", type=float, default=100.0, help="of making the dense model")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each student's joint distillation")
    parser.add_argument("--batch", type=int, default=128, help="examples a step, of making the dense model")
    parser.add_argument("--active", type=float, default=0.1)
    parser.add_argument("--trees", type=int, default=2)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--part", type=float, default=0.75, help="of the work, for shared neurons")
    parser.add_argument("--lr-routing", type=float, default=ConversionSettings.routing_lr_scale)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--layer-steps", type=int, default=ConversionSettings.layer_steps)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="read of the text in converting")
    parser.add_argument("--valid-tokens", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    workers = [context.Process(target=run_task, args=(args, task, results)) for task in args.tasks]
    for worker in workers:
        worker.start()
    records: dict[str, Any] = {}
    while any(worker.is_alive() for worker in workers) or not results.empty():
        time.sleep(0.2)
        while not results.empty():
            record = results.get()
            records[record["task"]] = record
            (args.out / "tasks.json").write_text(json.dumps(list(records.values()), indent=1) + "\n")
    for record in records.values():
        change = {name: variant["after"] / record["dense"] - 1 for name, variant in record["variants"].items()}
        print(record["task"], record["metric"], f"dense {record['dense']:.3f}", change)
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a task failed")


if __name__ == "__main__":
    main()
