"""The command line: one thin function a command, whose module is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Conditional feedforward layers.")
console = Console()


@app.callback()
def _root() -> None:
    """Conditional feedforward layers."""


@app.command()
def bench(
    out: Annotated[Path | None, typer.Option(help="Directory for layer-cpu.csv and layer-cpu.json.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of timing a case.")] = 8.0,
    skip: Annotated[list[str] | None, typer.Option(help="A provider to leave out; may be repeated.")] = None,
) -> None:
    """Time the layer beside the fastest dense layer that this machine can run."""
    from fastff.bench import CASES, run_cases
    from fastff.bench.run import machine, ratios, save

    def progress(name: str) -> None:
        console.print(f"measuring {name}", style="dim")

    timings, left_out = run_cases(CASES, seconds=seconds, skip=skip or (), progress=progress)
    faster = ratios(timings)
    table = Table("case", "provider", "us a row, median", "20-80 %", "max error", "x faster than best dense")
    for t in timings:
        spread = f"{t.latency_us_p20:.2f}-{t.latency_us_p80:.2f}"
        ratio = f"{faster[t.case]:.1f}" if t.provider == "fastff" else ""
        table.add_row(t.case, t.provider, f"{t.latency_us_p50:.2f}", spread, f"{t.max_abs_error:.0e}", ratio)
    console.print(table)
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}")
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if out is not None:
        for path in save(out, timings, left_out):
            console.print(f"wrote {path}")


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
    active: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest share of a dense layer's work.")] = 0.1,
    table: Annotated[Path | None, typer.Option(help="Evaluation table (.parquet, .tsv, .csv).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of all layers together.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Tokens captured a block.")] = 200_000,
    controls: Annotated[bool, typer.Option(help="Also teach a narrow dense layer of equal work.")] = True,
    keep_slow: Annotated[bool, typer.Option(help="Convert layers that a tree makes slower here, too.")] = False,
) -> None:
    """Make an existing dense model conditional and report what was lost and gained."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from fastff.convert import Settings
    from fastff.convert import convert as run
    from fastff.convert.report import summary

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        try:
            settings = Settings(
                model=model,
                text=text,
                out=out,
                active=active,
                table=table,
                steps=steps,
                batch=batch,
                rows=rows,
                controls=controls,
                keep_slow=keep_slow,
            )
            record = run(settings, progress=progress)
        except ValueError as error:
            console.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
    console.print(summary(record), markup=False)
    console.print(f"wrote {out} and {out / 'report' / 'index.html'}", markup=False)


def main() -> None:
    """Entry point of the `fastff` command."""
    app()


if __name__ == "__main__":
    main()
