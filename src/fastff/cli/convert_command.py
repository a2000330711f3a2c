"""`fastff convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastff.cli.console import console
from fastff.convert import ConversionSettings
from fastff.convert.conversion_settings import percent, shape, times
from fastff.report.progress import shown


def convert(
    model: str,
    /,
    *,
    text: Path,
    out: Path,
    active: str | None = None,
    speedup: str | None = None,
    max_loss: str | None = None,
    curve: str | None = None,
    shapes: str = "1x128,32x128",
    time_on: str | None = None,
    shared: int | None = None,
    table: tuple[Path, ...] = (),
    seconds: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    rows: int | None = None,
    dense_fade: float | None = None,
    baselines: str = "narrow,pruned,none",
    keep_slow: bool = False,
) -> int:
    """Make a trained dense model conditional, and report what was lost and gained.

    Parameters
    ----------
    model
        Directory or hub name of a dense Transformers model.
    text
        Unlabelled text, one example a line (.txt, .xz, .gz).
    out
        Directory to write. Run the same command again to resume an interrupted conversion.
    active
        Largest share of the dense layers' work, like 10% (the default).
    speedup
        Instead of --active: how many times faster the whole model must become, like 2x.
    max_loss
        Largest relative loss of the metric, like 1%. Restores the most damaging layers to dense until it is kept.
    curve
        Further shares of the work to convert at, for the report's curve, like 3%,25%.
    shapes
        Calls that are timed: sequences x tokens.
    time_on
        Where models are timed: cpu or cuda. Default: where the conversion computes.
    shared
        Neurons that every token uses beside the trees. Default: by measurement.
    table
        Evaluation table, or text for a causal model. May be repeated: the first decides.
    seconds
        Seconds that the whole conversion may take: fewer steps if need be.
    steps
        Steps of the joint distillation.
    batch
        Examples a step. Default: by the kind of model.
    max_length
        Tokens of an example; the rest is cut.
    rows
        Calibration tokens per layer.
    dense_fade
        Share of the steps in which dense layers fade out.
    baselines
        Baselines distilled with the same recipe, any of narrow,pruned,none.
    keep_slow
        Convert layers that a tree makes slower here, too.
    """
    from fastff.convert import convert as run
    from fastff.convert.conversion_report import summary

    recipe: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "max_length": max_length,
        "rows": rows,
        "dense_fade": dense_fade,
    }
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
        tables=table,
        seconds=seconds,
        baselines=tuple(filter(None, baselines.split(","))),
        keep_slow=keep_slow,
        **{name: value for name, value in recipe.items() if value is not None},
    )
    with shown(console, "convert") as progress:
        record = run(settings, progress=progress, say=lambda line: console.print(line, markup=False))
    console.print(summary(record), markup=False)
    console.print(f"wrote {out} and {out / 'report' / 'index.html'}", markup=False)
    return 0
