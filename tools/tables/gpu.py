"""Tables of layers and training steps on the GPU, from what `fastff bench --device cuda` wrote."""

from __future__ import annotations

from typing import Any

from tools.tables.places import H200, read

from fastff.report.markdown import markdown_table
from fastff.report.numbers import three_digits


def layers() -> str:
    """Every bf16 case with a flushed cache beside the fastest dense provider; then the steps of a whole model."""
    found = read(H200 / "layer-gpu.json")
    about = found["about"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton"))
    copy = about["copy_bytes_per_s"] / 1e12
    machine = f"{about['device']}, {versions}; a copy reads and writes {copy:.1f} TB/s."
    return f"{_cases(found)}\n\n{_steps()}\n\n{machine}"


def conditional() -> str:
    """Layers behind routers beside the compiled dense layer, routing included, by width, rows and direction."""
    found = read(H200 / "conditional.json")
    widths = dict.fromkeys(cell["width"] for cell in found["cells"])
    tables = [_by_rows([cell for cell in found["cells"] if cell["width"] == width]) for width in widths]
    return "\n\n".join([*tables, f"{found['gpu']}, torch {found['torch']}, triton {found['triton']}."])


def _by_rows(found: list[dict[str, Any]]) -> str:
    cells = {(cell["layer"], cell["rows"], cell["training"]): cell for cell in found}
    counts = sorted({cell["rows"] for cell in found}, reverse=True)
    ways = [(rows, training) for training in (False, True) for rows in counts]
    rows = []
    for layer in dict.fromkeys(cell["layer"] for cell in found):
        measured = [cells[layer, *way] for way in ways]
        kept = cells[layer, counts[0], True]["activation_bytes"] / 2**20
        rows.append((layer, *map(_beside_dense, measured), f"{kept:,.0f}"))
    named = [f"{rows:,} rows{', forward + backward' if training else ''}" for rows, training in ways]
    return markdown_table(["layer", *named, f"kept for the backward of {counts[0]:,} rows, MiB"], rows)


def _beside_dense(cell: dict[str, Any]) -> str:
    ratio = cell["times_dense"]
    faster = "" if cell["layer"].startswith("dense") else f" (**{ratio:.{1 if ratio >= 10 else 2}f}x**)"
    return f"{three_digits(cell['us'])}{faster}"


def _cases(found: dict[str, Any]) -> str:
    by_key = {timing["key"]: timing for timing in found["timings"]}
    shown = [(by_key[best["dense"]], by_key[best["ours"]], best["ratio"]) for best in found["best"]]
    order = list(dict.fromkeys(ours["layer"] for _, ours, _ in shown))
    shown.sort(key=lambda entry: (order.index(entry[1]["layer"]), entry[1]["training"], entry[1]["rows"]))
    rows = []
    for dense, ours, ratio in shown:
        if not ours["cold"] or ours["dtype"] != "bf16":
            continue
        chain = f", one of {ours['layers']} layers in turn" if ours["layers"] > 1 else ""
        rows.append(
            (
                ours["layer"],
                ours["dense"],
                f"{ours['rows']}{chain}",
                "forward + backward" if ours["training"] else "forward",
                f"{three_digits(dense['latency_us_p50'])}, {dense['provider'].removeprefix('dense ')}",
                three_digits(ours["latency_us_p50"]),
                f"**{ratio:.{1 if ratio >= 2 else 2}f}x**",
            )
        )
    return markdown_table(["layer", "against dense", "rows", "", "fastest dense, us", "fastff, us", "faster"], rows)


def _steps() -> str:
    rows = []
    for step in read(H200 / "training-step.json")["steps"]:
        spread = f"({three_digits(step['step_ms_p25'])}-{three_digits(step['step_ms_p75'])})"
        # A graph's memory is taken when it is captured, before the peak is noted.
        peak = "" if step["name"].endswith("graph") else three_digits(step["peak_bytes"] / 2**30)
        rows.append((step["name"], f"{three_digits(step['step_ms_p50'])} {spread}", peak))
    title = "training step of 12 layers, 256 x 128 tokens, eager unless it says graph"
    return markdown_table([title, "ms (quartiles)", "peak GiB"], rows)
