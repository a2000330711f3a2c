"""The stages of a run, in order. Each is skipped when `results.json` already holds what it finds out."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastff import bench
from fastff.bench.cpu_report import best_of
from fastff.bench.workloads import BERT, BERT_BASE, label
from fastff.demo.data import Corpus, manifest
from fastff.inspect import collect
from fastff.machine import commit, machine
from fastff.ops import available_backends
from fastff.timing import seconds_of
from fastff.train.interrupt import Stop
from train_tiny import settings as sizes
from train_tiny import training
from train_tiny.authors import bag_of_words, score
from train_tiny.explain import fill
from train_tiny.report_page import write_report
from train_tiny.settings import Settings, Variant
from train_tiny.store import RunError, Store
from train_tiny.summary import missing_parts, summarise
from train_tiny.terminal import print_summary

SPEED_ROWS = (1, 128, 1024)
SPEED_PROVIDERS = ("torch eager", "torch.compile", "torch packed", "onnxruntime", "openvino", "fastff", "fastff C")
REPORT_SECONDS = 8.0  # kept for the charts and the report
MARGIN = 0.9  # of the time left is planned for: a machine slows down while it works
START_SHARE, PRETRAIN_SHARE = 0.08, 0.27  # of the training time; fine-tuning, where most is learnt, gets the rest
EVALUATION_COST = 0.4  # of a training step, on as many tokens
MIN_STEPS = 20
QUICK_STEPS = {"start": 24, "pretrain": 24, "finetune": 12}


def run_stages(settings: Settings, console: Console, *, restart: bool = False) -> int:
    """Run, or go on with, a run; returns the exit code: 0 finished, 130 interrupted with a partial report, 1 failed.

    Writes `results.json` and `index.html` into `settings.out`.
    """
    stop = Stop()
    try:
        with stop.watching():
            store = Store(settings.out, settings.identity, restart=restart)
            try:
                Run(settings, store, console, stop).run()
            except KeyboardInterrupt:
                console.print("\ninterrupted: writing what there is", style="yellow")
                conclude(store, console)
                console.print("run the same command again to resume; `--restart` begins again")
                return stop.exit_status
            conclude(store, console)
            return 0
    except RunError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1


def conclude(store: Store, console: Console) -> None:
    """Derive the summary, write the report from the results alone, and print the table."""
    store.finish("summary", summarise(store.results))
    path = write_report(store.out, store.results)
    print_summary(store.results, console)
    missing = missing_parts(store.results)
    if missing:
        console.print("missing: " + ", ".join(missing), style="yellow")
    console.print(f"wrote {path} and {store.out / 'results.json'}")


class Run:
    """One run. Every method that measures finds its text in `corpus` and leaves its numbers in `store.results`."""

    def __init__(self, settings: Settings, store: Store, console: Console, stop: Stop) -> None:
        self.settings = settings
        self.store = store
        self.console = console
        self.stop = stop

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus(self.settings.book_characters, self.settings.test_sentences if self.settings.quick else None)

    def run(self) -> None:
        stages: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("machine", self.describe),
            ("data", self.read_text),
            ("speed", self.measure_speed),
            ("plan", self.plan),
            ("start", self.train_start),
        )
        for name, stage in stages:
            if name not in self.store.results:
                self.store.finish(name, stage())
        for variant in self.settings.variants:
            self.once("pretrain", variant, self.pretrain)
        if "plan_finetune" not in self.store.results:
            self.store.finish("plan_finetune", self.plan_finetune())
        for variant in self.settings.variants:
            self.once("finetune", variant, self.finetune)
        if "baselines" not in self.store.results:
            self.store.finish("baselines", self.baselines())

    def once(self, stage: str, variant: Variant, work: Callable[[Variant], dict[str, Any]]) -> None:
        done: dict[str, Any] = self.store.results.get(stage, {})
        if variant.name not in done:
            self.store.finish(stage, {**done, variant.name: work(variant)})

    def describe(self) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {
            **machine(),
            "backends": list(available_backends()),
            "commit": commit(),
            "started": now,
        }

    def read_text(self) -> dict[str, Any]:
        self.console.print("reading the bundled novels", style="dim")
        corpus = self.corpus
        return {
            "source": manifest()["source"],
            "books": manifest()["books"],
            "authors": corpus.full_names,
            "vocab_size": corpus.vocab_size,
            "learn_tokens": sum(map(len, corpus.learn.values())),
            "unseen_tokens": sum(map(len, corpus.unseen.values())),
            "learn_sentences": len(corpus.learn_sentences.tokens),
            "unseen_sentences": len(corpus.unseen_sentences.tokens),
        }

    def measure_speed(self) -> dict[str, Any]:
        """One layer of BERT-base's width against the dense layer that it replaces."""
        skip = {"torch.compile": "left out of a quick run"} if self.settings.quick else {}
        chosen = tuple(name for name in SPEED_PROVIDERS if name not in skip)
        only = bench.Only(layer=(label(BERT_BASE),), provider=chosen)
        grid = bench.Grid((1,), SPEED_ROWS, layers=(1,), gpt3_rows=(), train_rows=(), only=only)
        seconds = self.settings.speed_seconds / len(chosen)

        told: list[str] = []

        def progress(stage: str, done: float, total: float | None = None, note: str = "") -> None:
            workload = note.partition(":")[0]
            if workload not in told:
                told.append(workload)
                self.console.print(f"layer speed: {workload}", style="dim")

        settings = bench.Settings(grid, seconds=seconds, seed=self.settings.seed, separate=False, limits=False)
        record = bench.run_grid(settings, progress=progress)
        return {
            "timings": [asdict(timing) for timing in record.timings],
            "left_out": {**record.left_out, **skip},
            "times_faster": {best.case: best.ratio("fp32") for best in best_of(record.timings)},
            "rows": list(SPEED_ROWS),
            "dense_neurons": BERT.neurons,
            "tree": BERT_BASE.name,
            "width": BERT_BASE.in_features,
        }

    def plan(self) -> dict[str, Any]:
        """Steps of pretraining, the same for all variants, from what a step of each costs here and the time left."""
        if self.settings.quick:
            return {"start": QUICK_STEPS["start"], "pretrain": QUICK_STEPS["pretrain"]}
        self.console.print("measuring a training step of every model", style="dim")
        variants = self.settings.variants
        start = self.step_seconds(sizes.START, "start")
        pretrain = {variant.name: self.step_seconds(variant, "pretrain") for variant in variants}
        finetune = {variant.name: self.step_seconds(variant, "finetune") for variant in variants}
        valid_steps = self.settings.valid_windows * sizes.WINDOW / sizes.BATCH_TOKENS
        evaluation = EVALUATION_COST * valid_steps * sum(pretrain.values())
        left = MARGIN * (self.seconds_left() - evaluation - self.scoring_seconds(finetune))
        start_steps = max(MIN_STEPS, int(left * START_SHARE / start))
        steps = max(MIN_STEPS, int(left * PRETRAIN_SHARE / sum(pretrain.values())))
        return {
            "start": start_steps,
            "pretrain": steps,
            "step_seconds": {"start": start, "pretrain": pretrain, "finetune": finetune},
            "pretrain_seconds": start * start_steps + evaluation + steps * sum(pretrain.values()),
        }

    def plan_finetune(self) -> dict[str, Any]:
        """Steps of fine-tuning for every variant alike. A machine that has become slower since the plan gets fewer."""
        if self.settings.quick:
            return {"finetune": QUICK_STEPS["finetune"], "slower": 1.0}
        results, plan = self.store.results, self.store.results["plan"]
        took = results["start"]["seconds"] + sum(
            variant["seconds"] + variant["scoring_seconds"] for variant in results["pretrain"].values()
        )
        slower = took / plan["pretrain_seconds"]
        finetune = {name: slower * seconds for name, seconds in plan["step_seconds"]["finetune"].items()}
        left = MARGIN * (self.seconds_left() - self.scoring_seconds(finetune))
        return {"finetune": max(MIN_STEPS, int(left / sum(finetune.values()))), "slower": slower}

    def seconds_left(self) -> float:
        """For training and scoring, of what the user gave to the run and its continuations."""
        return self.settings.seconds - self.store.seconds_used() - REPORT_SECONDS

    def scoring_seconds(self, finetune: dict[str, float]) -> float:
        """Expected seconds of scoring every variant on the unseen sentences."""
        return EVALUATION_COST * self.settings.test_sentences / sizes.BATCH_SENTENCES * sum(finetune.values())

    def step_seconds(self, variant: Variant, task: str) -> float:
        """Median seconds of a training step, after one to warm up."""
        model, batch = self.trial(variant, task)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def train(inputs: training.Batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()
            optimizer.step()

        batches = [batch(step) for step in range(5)]
        seconds = [seconds_of(partial(train, inputs)) for inputs in batches]
        return statistics.median(seconds[1:])

    def trial(self, variant: Variant, task: str) -> tuple[Any, Callable[[int], training.Batch]]:
        seed, vocab_size = self.settings.seed, self.corpus.vocab_size
        model = training.masked_word_model(variant, vocab_size, seed, None)
        if task == "start":
            return model, training.start_batches(self.corpus, 5, seed)
        if task == "pretrain":
            return model, self.pretrain_batches
        labels = len(self.corpus.authors)
        author = training.author_model(variant, vocab_size, labels, seed, model.state_dict())
        return author, training.author_batches(self.corpus.learn_sentences, 5, seed)

    @cached_property
    def pretrain_batches(self) -> Callable[[int], training.Batch]:
        return training.pretrain_batches(self.corpus, self.settings.seed)

    def train_start(self) -> dict[str, Any]:
        steps, seed = self.store.results["plan"]["start"], self.settings.seed
        model = training.masked_word_model(sizes.START, self.corpus.vocab_size, seed, None)
        batch = training.start_batches(self.corpus, steps, seed)
        return self.train(training.Job("start", steps, sizes.START_LR, batch, seed), model, "shared start")

    def pretrain(self, variant: Variant) -> dict[str, Any]:
        steps, seed = self.store.results["plan"]["pretrain"], self.settings.seed
        model = training.masked_word_model(variant, self.corpus.vocab_size, seed, self.weights("start"))
        job = training.Job(f"pretrain-{variant.name}", steps, sizes.PRETRAIN_LR, self.pretrain_batches, seed)
        trained = self.train(job, model, f"pretrain {variant.title}")
        inputs, labels = self.valid
        begin = time.perf_counter()
        losses: list[float] = []
        routing = collect(model, lambda: losses.extend(training.masked_word_losses(model, inputs, labels, self.stop)))
        return {
            **trained,
            **cost(variant, model),
            "scoring_seconds": time.perf_counter() - begin,
            "valid_loss": statistics.fmean(losses),
            "valid_losses": [round(loss, 5) for loss in losses],
            "routing": {name: layer.as_dict() for name, layer in routing.items()},
            "fill": fill(model, self.corpus, sizes.MASKED_SENTENCE),
        }

    def finetune(self, variant: Variant) -> dict[str, Any]:
        steps, seed, corpus = self.store.results["plan_finetune"]["finetune"], self.settings.seed, self.corpus
        weights = self.weights(f"pretrain-{variant.name}")
        model = training.author_model(variant, corpus.vocab_size, len(corpus.authors), seed, weights)
        batch = training.author_batches(corpus.learn_sentences, steps, seed)
        job = training.Job(f"finetune-{variant.name}", steps, sizes.FINETUNE_LR, batch, seed)
        trained = self.train(job, model, f"fine-tune {variant.title}")
        found = training.author_predictions(model, corpus.unseen_sentences, self.stop)
        return {**trained, **score(found, corpus.unseen_sentences.labels.tolist(), len(corpus.authors))}

    def baselines(self) -> dict[str, Any]:
        learn, unseen = self.corpus.learn_sentences, self.corpus.unseen_sentences
        want, authors = unseen.labels.tolist(), len(self.corpus.authors)
        counts = torch.bincount(learn.labels, minlength=authors)
        return {
            "majority": score([int(counts.argmax())] * len(want), want, authors),
            "bag_of_words": score(bag_of_words(learn, unseen), want, authors),
        }

    @cached_property
    def valid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked windows of unseen books, spread evenly over them."""
        windows = self.corpus.windows(self.corpus.unseen, sizes.WINDOW)
        chosen = torch.linspace(0, len(windows) - 1, min(len(windows), self.settings.valid_windows)).long()
        return self.corpus.mask(windows[chosen], seed=12345)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        state = self.store.load_state(name)
        if state is None:
            raise RunError(f"{self.store.state / name}.pt is missing: `--restart` begins again")
        weights: dict[str, torch.Tensor] = state["model"]
        return weights

    def train(self, job: training.Job, model: Any, title: str) -> dict[str, Any]:
        with self.progress(title, job.steps) as report:
            return training.train(job, model, self.store, self.stop, report)

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=steps, loss=float("nan"))
            yield lambda step, loss: bar.update(task, completed=step, loss=loss)


def cost(variant: Variant, model: Any) -> dict[str, Any]:
    """Size and arithmetic of one layer's feedforward, and the model's parameters."""
    layer = model.encoder.layers[0].feedforward
    numbers = (0, 0, 0) if layer is None else (layer.neurons, layer.active_neurons, layer.flops_per_row)
    return {
        "title": variant.title,
        "note": variant.note,
        "narrow_of": variant.narrow_of,
        "neurons": numbers[0],
        "active_neurons": numbers[1],
        "flops_per_token": numbers[2],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
