"""The command line: one thin function a command, whose module is imported when it is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Conditional feedforward layers.")
console = Console()
LINE_SECONDS = 30.0  # between two lines of progress in a log


@app.callback()
def _root() -> None:
    """Conditional feedforward layers."""


@app.command()
def bench(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results, and of what an interrupted run left.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small part of the table, in a few minutes.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only KIND=VALUE[,VALUE]: layer, provider, rows, visits or threads; may be repeated."
        ),
    ] = None,
    anew: Annotated[
        bool,
        typer.Option(help="On a CPU: put the scenes measured now into the results that --out holds, keep the others."),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="On a CPU, timed seconds of each provider and case; on a GPU, of the whole run."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="With cuda: processes that compile kernels ahead.")] = 1,
    tune: Annotated[bool, typer.Option(help="With cuda: search faster block sizes first, and keep them.")] = False,
) -> None:
    """Time conditional layers beside the fastest dense layers that this machine can run.

    The same command goes on with an interrupted run in the same folder.
    """
    from fastff.bench.cpu_command import bench_cpu, settings_of

    if device == "cuda":
        from fastff.bench.gpu_command import bench_gpu
        from fastff.bench.gpu_run import Settings

        chosen = Settings(seconds=seconds, jobs=jobs, tune=tune, only=tuple(only or ()))
        raise typer.Exit(bench_gpu(chosen, out or Path("bench-results"), console))
    if device != "cpu":
        raise typer.BadParameter(f"{device!r} is not cpu or cuda", param_hint="--device")
    try:
        settings = settings_of(quick=quick, only=only or (), seconds=seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    if anew and (out is None or not (out / "layer-cpu.json").is_file()):
        raise typer.BadParameter(f"{out} holds no layer-cpu.json", param_hint="--anew with --out")
    try:
        raise typer.Exit(bench_cpu(settings, out, console, anew=anew))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--anew") from error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo-report"),
    seconds: Annotated[float, typer.Option(min=60.0, help="Seconds the whole run may take.")] = 270.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and masks.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that everything works.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget an earlier run in the same folder.")] = False,
) -> None:
    """Train a small UltraFastBERT, its dense twin and controls on bundled novels; write a report.

    Ctrl-C leaves a partial report; the same command then goes on from there.
    """
    from fastff.demo import Settings
    from fastff.demo.run import run_demo

    settings = Settings(seconds=seconds, seed=seed, out=out, quick=quick)
    raise typer.Exit(run_demo(settings, console, restart=restart))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a dense Transformers model.")],
    text: Annotated[Path, typer.Option(help="Unlabelled text, one example a line (.txt, .xz, .gz).")],
    out: Annotated[Path, typer.Option(help="Directory to write; holds the state of an interrupted run too.")],
    active: Annotated[
        str | None, typer.Option(help="Largest share of the dense layers' work, like 10% (default).")
    ] = None,
    speedup: Annotated[
        str | None, typer.Option(help="Instead: times faster the whole model must become, like 2x.")
    ] = None,
    max_loss: Annotated[str | None, typer.Option(help="Largest relative loss of the metric, like 1%.")] = None,
    curve: Annotated[str | None, typer.Option(help="Further shares for the report's curve, like 3%,25%.")] = None,
    shapes: Annotated[str, typer.Option(help="Timed calls: sequences x tokens.")] = "1x128,32x128",
    time_on: Annotated[
        str | None, typer.Option(help="Where models are timed: cpu or cuda; default: the device.")
    ] = None,
    shared: Annotated[int | None, typer.Option(min=0, help="Neurons for every row beside the trees.")] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluation table, or text of a causal model; may be repeated, the first decides."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds the whole run may take: fewer steps if need be.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of all layers together.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples a step; default: by the kind of model.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of an example; the rest is cut.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Tokens captured a block.")] = None,
    dense_fade: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Share of the steps in which dense layers fade out.")
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Baselines distilled with the same recipe, any of narrow,pruned,none.")
    ] = "narrow,pruned,none",
    mild: Annotated[float | None, typer.Option(hidden=True)] = None,
    controls: Annotated[str | None, typer.Option(hidden=True)] = None,
    keep_slow: Annotated[bool, typer.Option(help="Convert layers that a tree makes slower here, too.")] = False,
) -> None:
    """Make an existing dense model conditional and report what was lost and gained."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from fastff.convert import ConversionSettings
    from fastff.convert import convert as run
    from fastff.convert.conversion_report import summary
    from fastff.convert.conversion_settings import percent, shape, times

    if mild is not None:
        console.print("--mild is now --dense-fade; the old name goes with the next version", markup=False)
        dense_fade = mild
    if controls is not None:
        console.print("--controls is now --baselines; the old name goes with the next version", markup=False)
        baselines = controls
    recipe: dict[str, Any] = {"steps": steps, "batch": batch, "max_length": max_length, "rows": rows}
    recipe["dense_fade"] = dense_fade
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}
        line = _lines("convert")

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        progress = bar if console.is_terminal else lambda what, done, total: line(done / total, what)
        try:
            settings = ConversionSettings(
                model=model,
                text=text,
                out=out,
                active=None if active is None else percent(active),
                speedup=None if speedup is None else times(speedup),
                max_loss=None if max_loss is None else percent(max_loss),
                curve=tuple(map(percent, curve.split(","))) if curve else (),
                shapes=tuple(map(shape, shapes.split(","))),
                time_on=time_on,
                shared=shared,
                tables=tuple(table or ()),
                seconds=seconds,
                baselines=tuple(filter(None, baselines.split(","))),
                keep_slow=keep_slow,
                **{name: value for name, value in recipe.items() if value is not None},
            )
            record = run(settings, progress=progress, say=lambda line: console.print(line, markup=False))
        except ValueError as error:
            console.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
    console.print(summary(record), markup=False)
    console.print(f"wrote {out} and {out / 'report' / 'index.html'}", markup=False)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, model and result.json; an equal run goes on.")],
    text: Annotated[
        list[str], typer.Option(help="File, directory, or datasets:NAME[:CONFIG[:SPLIT]]; may be repeated.")
    ],
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    feedforward: Annotated[str, typer.Option(help="A name of `fastff variants`, narrow:NAME, or JSON.")] = "dense-gelu",
    objective: Annotated[str, typer.Option(help="masked or causal.")] = "masked",
    steps: Annotated[int | None, typer.Option(help="Budget in optimiser steps.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds, over all continuations.")] = None,
    valid: Annotated[list[str] | None, typer.Option(help="Held-out text; default: the end of the text.")] = None,
    valid_windows: Annotated[int, typer.Option(min=1, help="Windows that are held out.")] = 256,
    column: Annotated[str, typer.Option(help="Text column of tables.")] = "text",
    batch: Annotated[int | None, typer.Option(help="Rows of a step, all processes together.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows of one forward pass.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warm_up: Annotated[float, typer.Option(help="Share of the budget in which the rate rises.")] = 0.15,
    ramp: Annotated[float, typer.Option(help="Share of the budget in which the batch grows.")] = 0.3,
    start: Annotated[Path | None, typer.Option(help="Model directory whose weights are taken over.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Directory, file or hub name; default: train one.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Entries of a tokenizer that is trained.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of tokenizer and tokens, to share between runs.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more of the text.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and masks.")] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    log_every: Annotated[int, typer.Option(help="Steps between points of the loss curve.")] = 10,
    eval_every: Annotated[int | None, typer.Option(help="Steps between scores on held-out text.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    piece_seconds: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard logs.")] = False,
    cpu: Annotated[bool, typer.Option(help="Use the CPU even if there is a GPU.")] = False,
    sharded: Annotated[bool, typer.Option(help="On several GPUs: FSDP2 instead of DDP.")] = False,
    layer: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of LayerTraining; may be repeated.")] = None,
) -> None:
    """Pretrain a model on your text; Ctrl-C leaves a checkpoint, the same command goes on."""
    from accelerate import PartialState

    from fastff.train.pretrain import Settings
    from fastff.train.pretrain import pretrain as run
    from fastff.train.routing import layer_training

    options: dict[str, Any] = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__}
    with _errors_as_messages(), _bar("pretrain") as move:
        options |= {"text": tuple(text), "valid": tuple(valid or ()), "layer": layer_training(layer or [])}
        record = run(
            Settings(**options),
            report=lambda step, loss, progress: move(progress, f"step {step}, loss {loss:.3f}"),
            progress=lambda what, count: move(None, f"reading, {count:,} {what}"),
        )
    PartialState().destroy_process_group()  # of torchrun; NCCL warns of a group that is left
    if not _first_process():
        return
    cost = record["cost"]
    neurons = f"{cost['active_neurons']} of {cost['neurons']} neurons"
    console.print(f"{cost['layer']}: {neurons}, {cost['flops']} FLOP a token and layer")
    done = "finished" if record["finished"] else "stopped; the same command goes on"
    loss = f"held-out loss {record['valid_loss']:.4f} after {record['steps']} steps and {record['tokens']} tokens"
    console.print(f"{done}: {loss}, {record['seconds']} s; {out}", markup=False)
    if record["stopped_by"]:
        raise typer.Exit(128 + record["stopped_by"])


@app.command()
def glue(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a model with its tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder of scores and predictions; a second run adds what is missing.")],
    data: Annotated[Path | None, typer.Option(help="Folder with TASK/*.parquet; default: the hub.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; may be repeated; default: all nine.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunings of each task.")] = 5,
    epochs: Annotated[int | None, typer.Option(help="Passes; default: 5, CoLA 15.")] = None,
    steps: Annotated[int | None, typer.Option(help="So many updates of every task instead of epochs.")] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-5,
    layer_rate: Annotated[float, typer.Option(help="Factor on it for conditional layers; 0 keeps them.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Use the first rows only, for a trial.")] = None,
    max_train_rows: Annotated[int | None, typer.Option(help="Learn from so many rows of a longer train split.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    cpu: Annotated[bool, typer.Option(help="Use the CPU even if there is a GPU.")] = False,
) -> None:
    """Fine-tune a model on GLUE and score it: median and spread over seeds."""
    from fastff.train.glue import GlueSettings
    from fastff.train.glue import glue as run

    options: dict[str, Any] = {
        name: value for name, value in locals().items() if name in GlueSettings.__dataclass_fields__
    }
    with _errors_as_messages(), _bar("glue") as move:
        if task:
            options["tasks"] = tuple(task)
        summary = run(
            GlueSettings(**options), report=lambda name, seed, progress: move(progress, f"{name}, seed {seed}")
        )
    table = Table("task", "metrics", "median", "least - greatest", "note")
    for name, found in summary["tasks"].items():
        score = ["undefined"] * 2
        if found["median"] is not None:
            score = [f"{found['median']:.2f}", f"{found['least']:.2f} - {found['greatest']:.2f}"]
        table.add_row(name, ", ".join(found["metrics"]), *score, found["note"])
    console.print(table)
    if not summary["comparable_with_published"]:
        console.print("not comparable with published GLUE scores: see the notes")


@app.command()
def variants(preset: Annotated[str, typer.Argument(help="tiny, small or base.")] = "base") -> None:
    """List the feedforwards of a preset with what a token costs in each."""
    from fastff.train.presets import NARROW, VARIANTS, costs, preset_of

    with _errors_as_messages():
        trees = [name for name, variant in VARIANTS.items() if "depth" in variant.options]
        found = costs(preset_of(preset), (*VARIANTS, *(f"{NARROW}{name}" for name in trees)))
    dense = next(cost for cost in found if cost.name == "dense-gelu")
    table = Table("name", "layer", "active / stored neurons", "FLOP a token", "of dense", "whole model, of dense")
    for c in found:
        shares = f"{c.flops / dense.flops:.2%}", f"{c.model_flops / dense.model_flops:.1%}"
        table.add_row(c.name, c.layer, f"{c.active_neurons} / {c.neurons}", f"{c.flops:,}", *shares)
    console.print(table)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """What the user can put right is said in one line."""
    from fastff.errors import FastffError

    try:
        yield
    except (FastffError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


def _first_process() -> bool:
    """Whether this is the one of torchrun's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float | None, str], None]]:
    """move(done, words): a bar at `done` of 1, None for where it is; only the first of several processes shows it.

    Where nobody watches a terminal, a line now and then in the bar's place.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not _first_process()) as bars:
        bar = bars.add_task(what, total=1.0)
        yield lambda done, words: bars.update(bar, completed=done, description=f"{what}: {words}")


def _lines(what: str) -> Callable[[float | None, str], None]:
    """As `_bar`, for a log: a line at most every LINE_SECONDS."""
    shown = _first_process()
    last = time.monotonic()

    def move(done: float | None, words: str) -> None:
        nonlocal last
        if shown and time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            share = "" if done is None else f", {done:.0%}"
            console.print(f"{what}: {words}{share}", markup=False)

    return move


def main() -> None:
    """Entry point of the `fastff` command."""
    app()


if __name__ == "__main__":
    main()
