"""The table at the end, from `results.json` alone."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_summary(results: dict[str, Any], console: Console) -> None:
    """Print layer speed and the models' scores, as far as there are any."""
    if "speed" in results:
        console.print(speed_table(results["speed"]))
    if results.get("pretrain"):
        console.print(model_table(results))
        console.print(
            "gap: share of the gain from narrow to wide that the trees recover; tokens/s: in training", style="dim"
        )


def speed_table(speed: dict[str, Any]) -> Table:
    title = f"one layer of width {speed['width']}, fp32, one thread: microseconds a row"
    table = Table(
        "rows", f"fastff {speed['tree']}", f"fastest dense {speed['dense_neurons']}", "times faster", title=title
    )
    for rows in speed["rows"]:
        ours, best = speed_pair(speed, rows)
        ratio = best["latency_us_p50"] / ours["latency_us_p50"]
        dense = f"{best['latency_us_p50']:.1f} ({best['provider']})"
        table.add_row(str(rows), f"{ours['latency_us_p50']:.2f}", dense, f"{ratio:.0f}")
    return table


def speed_pair(speed: dict[str, Any], rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """fastff's timing and that of the fastest dense provider, for one number of rows."""
    timings = [timing for timing in speed["timings"] if timing["rows"] == rows]
    ours = next(timing for timing in timings if timing["provider"] == "fastff")
    dense = (timing for timing in timings if timing["kind"] == "dense")
    return ours, min(dense, key=lambda timing: timing["latency_us_p50"])


def model_table(results: dict[str, Any]) -> Table:
    table = Table(title="the same tokens, the same seed; unseen books", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("feedforward", no_wrap=True)
    for head in ("active/stored", "loss", "gap", "author", "F1", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    finetune, gaps = results.get("finetune", {}), results["summary"]["recovered_gap"]
    for name, variant in results["pretrain"].items():
        author = finetune.get(name)
        table.add_row(
            variant["title"],
            f"{variant['active_neurons']}/{variant['neurons']}",
            f"{variant['valid_loss']:.3f}",
            gap_words(gaps.get(name)),
            percent(author),
            f"{author['macro_f1']:.3f}" if author else "-",
            f"{results['summary']['training_speed'][name]:,.0f}",
        )
    for name, title in (("bag_of_words", "bag of words"), ("majority", "always one author")):
        author = results.get("baselines", {}).get(name)
        if author:
            table.add_row(title, "", "", "", percent(author), f"{author['macro_f1']:.3f}", "")
    return table


def gap_words(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return "-"
    return "unclear" if gap["value"] is None else f"{gap['value']:.2f}"


def percent(author: dict[str, Any] | None) -> str:
    """Accuracy with its standard error, in percent."""
    return f"{100 * author['accuracy']:.1f} ± {100 * author['accuracy_error']:.1f} %" if author else "-"
