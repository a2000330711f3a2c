"""Tables of a whole encoder: time by engine, and time beside the quality of the same layers."""

from __future__ import annotations

from typing import Any

from tools.tables.places import INTEL, read
from tools.tables.training import records_of

from fastff.report.markdown import markdown_table
from fastff.report.numbers import three_digits
from fastff.train.compare import compare
from fastff.train.presets import feedforward_flops, feedforward_of

WIDTH = 768  # of BERT-base
STRONGEST = "openvino int8"
OURS = "torch int8"
DENSE = "dense-swiglu"
# The layers of the first page: title, name in the encoder's results, variant of the run of 300 M tokens, description.
LAYERS = (
    ("dense SwiGLU", DENSE, "dense", "dense-swiglu"),
    ("36 trees of depth 5, leaves of 4, gated", "36x5-swiglu4-gate", "24x5-leaf4", "36x5-swiglu4-gate"),
    ("18 trees of depth 6, leaves of 8, gated", "18x6-swiglu8-gate", "12x6-leaf8", "18x6-swiglu8-gate"),
    ("narrow dense, the work of 36 trees", "narrow", "narrow-136", "narrow:36x5-swiglu4-gate"),
    ("one tree of depth 11 (`1x11`, as published)", "1x11", "1x11", "1x11"),
    ("none", "none", "none", "none"),
)


def found() -> dict[str, Any]:
    """The last run of benchmarks/encoder.py."""
    run: dict[str, Any] = read(INTEL / "encoder.json")
    return run


def _ms(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(cell["feedforward"], cell["engine"]): cell["ms"] for cell in run["cells"]}


def engines() -> str:
    """Every engine's latency, and how many times faster than the strongest int8 engine's dense layers it is."""
    run = found()
    base = _ms(run)[DENSE, STRONGEST]
    rows = [
        (
            cell["feedforward"],
            cell["engine"],
            f"{three_digits(cell['ms'])} ({three_digits(cell['q1'])}-{three_digits(cell['q3'])})",
            f"{base / cell['ms']:.2f}x",
            f"{cell['relative_error']:.0e}",
        )
        for cell in run["cells"]
    ]
    shape = (run.get("shape") or run["cells"][0]["shape"]).replace("x", " x ")  # runs of one shape named it once
    head = ["feedforward", "engine", f"{shape} tokens, ms (quartiles)", f"over {DENSE} in {STRONGEST}", "error"]
    machine = run["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    return f"{markdown_table(head, rows)}\n\n{machine['cpu']}, one thread; {versions}."


def whole_engines() -> str:
    """Every shape and number of threads: milliseconds, and how many times faster than the fastest dense int8 engine."""
    run: dict[str, Any] = read(INTEL / "encoder-engines.json")
    columns = list(dict.fromkeys((cell["shape"], cell["threads"]) for cell in run["cells"]))
    ms = {(c["feedforward"], c["engine"], c["shape"], c["threads"]): c["ms"] for c in run["cells"]}
    keys = list(dict.fromkeys((cell["feedforward"], cell["engine"]) for cell in run["cells"]))
    errors = {(cell["feedforward"], cell["engine"]): cell["relative_error"] for cell in run["cells"]}
    others = [key for key in keys if key[0] == "dense-gelu" and not key[1].startswith("native")]
    rows = []
    for key in keys:
        row = [key[0], key[1]]
        for column in columns:
            best = min(ms[(*other, *column)] for other in others if (*other, *column) in ms)
            own = ms.get((*key, *column))
            row.append("-" if own is None else f"{three_digits(own)} ({best / own:.2f}x)")
        rows.append((*row, f"{errors[key]:.0e}"))
    heads = [f"{shape.replace('x', ' x ')}, {threads} thread{'s' * (threads > 1)}" for shape, threads in columns]
    machine = run["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    table = markdown_table(["feedforward", "engine", *heads, "error"], rows)
    return f"{table}\n\n{machine['cpu']}; {versions}."


def speed_and_quality() -> str:
    """Work, held-out loss and the time of a whole encoder, each row about one kind of layer."""
    ms = _ms(found())
    losses = {e["name"]: e["loss"] for e in compare([r for r in records_of("small-300m") if r["finished"]])}
    whole = feedforward_flops(feedforward_of(DENSE, WIDTH), WIDTH)
    rows = []
    for title, name, variant, description in LAYERS:
        work = feedforward_flops(feedforward_of(description, WIDTH), WIDTH) / whole
        strongest, ours = ms.get((name, STRONGEST)), ms.get((name, OURS))
        rows.append(
            (
                title,
                f"{work:.1%}",
                f"{losses[variant]:.3f}",
                "cannot" if strongest is None else three_digits(strongest),
                "-" if ours is None else three_digits(ours),
            )
        )
    head = ["feedforward layer", "work", "held-out loss", "BERT-base, OpenVINO int8, ms", "PyTorch int8 + fastff, ms"]
    return markdown_table(head, rows)
