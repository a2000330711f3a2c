"""Tables of a whole encoder: time by engine, and time beside the quality of the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.tables.places import AMD, INTEL, read
from tools.tables.training import records_of

from fastff.report.markdown import markdown_table
from fastff.report.numbers import three_digits
from fastff.train.compare import compare
from fastff.train.presets import feedforward_flops, feedforward_of

WIDTH = 768  # of BERT-base
STRONGEST = "openvino int8"
DENSE = "dense-swiglu"
BEST = ("openvino int8", "openvino int8 bf16", "onnxruntime int8")
# The layers of the first page: title, name in the encoder's results, study and variant of its quality, description.
LAYERS = (
    ("dense", "dense-gelu", "small-300m", "dense", "dense-swiglu"),
    ("96 experts of 48 neurons, 3 for a token", "flat-96x48-top3", "routers-300m", "flat", "flat-96x48-top3"),
    (
        "36 trees of depth 5, leaves of 4, gated",
        "36x5-leaf4-swiglu-gate",
        "small-300m",
        "24x5-leaf4",
        "36x5-leaf4-swiglu-gate",
    ),
    ("narrow dense, the work of 36 trees", "narrow", "small-300m", "narrow-136", "narrow:36x5-leaf4-swiglu-gate"),
    ("one tree of depth 11 (`1x11`, as published)", "1x11", "small-300m", "1x11", "1x11"),
    ("none", "none", "small-300m", "none", "none"),
)


def found() -> dict[str, Any]:
    """The last run of benchmarks/encoder.py."""
    run: dict[str, Any] = read(INTEL / "encoder.json")
    return run


def _ms(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(cell["feedforward"], cell["engine"]): cell["ms"] for cell in run["cells"]}


def _versions(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {run['machine'][name]}" for name in ("torch", "onnxruntime", "openvino", "nncf"))


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
    return f"{markdown_table(head, rows)}\n\n{run['machine']['cpu']}, one thread; {_versions(run)}."


def whole_engines() -> str:
    """Every feedforward; see `_by_shape`."""
    return _by_shape("encoder-engines.json")


def engines_without_amx() -> str:
    """The same on a CPU without matrix tiles."""
    return _by_shape("encoder-engines.json", AMD)


def dense_engines() -> str:
    """The dense model alone; see `_by_shape`."""
    return _by_shape("encoder-dense.json")


def lengths() -> str:
    """Short and long sequences; see `_by_shape`."""
    return _by_shape("encoder-lengths.json")


def embeddings() -> str:
    """What 8 bits cost a sentence model."""
    run: dict[str, Any] = read(INTEL / "embeddings.json")
    rows = [
        (
            cell["task"],
            f"{cell['examples']:,}",
            f"{cell['cosine_mean']:.4f}",
            f"{cell['cosine_least']:.4f}",
            cell["metric"],
            f"{cell['fp32']:.2f}",
            f"{cell['int8']:.2f}",
        )
        for cell in run["cells"]
    ]
    head = [
        "task",
        "examples",
        "cosine to fp32, mean",
        "least",
        "metric, percent",
        "SentenceTransformer, fp32",
        "fastff",
    ]
    return markdown_table(head, rows)


def _by_shape(file: str, machine: Path = INTEL) -> str:
    """Every shape and number of threads: milliseconds, and how many times faster than the fastest dense int8 engine of
    others, and than fastff's own dense engine."""
    run: dict[str, Any] = read(machine / file)
    columns = list(dict.fromkeys((cell["shape"], cell["threads"]) for cell in run["cells"]))
    ms = {(c["feedforward"], c["engine"], c["shape"], c["threads"]): c["ms"] for c in run["cells"]}
    keys = list(dict.fromkeys((cell["feedforward"], cell["engine"]) for cell in run["cells"]))
    errors = {(cell["feedforward"], cell["engine"]): cell["relative_error"] for cell in run["cells"]}
    others = [key for key in keys if key[0].startswith("dense-gelu") and not key[1].startswith("native")]
    rows = []
    for key in keys:
        row = [key[0], key[1]]
        for column in columns:
            best = min(ms[(*other, *column)] for other in others if (*other, *column) in ms)
            own = ms.get((*key, *column))
            ours = ms.get((others[0][0], "native int8", *column), best)
            row.append("-" if own is None else f"{three_digits(own)} ({best / own:.2f}x, {ours / own:.2f}x)")
        rows.append((*row, f"{errors[key]:.0e}"))
    heads = [f"{shape.replace('x', ' x ')}, {threads} thread{'s' * (threads > 1)}" for shape, threads in columns]
    table = markdown_table(["feedforward", "engine", *heads, "error"], rows)
    return f"{table}\n\n{run['machine']['cpu']}; {_versions(run)}."


def speed_and_quality() -> str:
    """Work, quality and the time of a whole encoder, each row about one kind of layer."""
    cells = [c for c in read(INTEL / "encoder-engines.json")["cells"] if (c["shape"], c["threads"]) == ("1x128", 1)]
    ms = {(cell["feedforward"], cell["engine"]): cell["ms"] for cell in cells}
    losses = {study: _losses(study) for study in {layer[2] for layer in LAYERS}}
    whole = feedforward_flops(feedforward_of(DENSE, WIDTH), WIDTH)
    rows = []
    for title, name, study, variant, description in LAYERS:
        work = feedforward_flops(feedforward_of(description, WIDTH), WIDTH) / whole
        loss = losses[study]
        gap = (loss["narrow-136"] - loss[variant]) / (loss["narrow-136"] - loss["dense"])
        best = min((ms[name, engine] for engine in BEST if (name, engine) in ms), default=None)
        times = ["-" if time is None else three_digits(time) for time in (best, ms.get((name, "native int8")))]
        rows.append((title, f"{work:.1%}", f"{gap:.2f}", *times))
    head = ["feedforward layer", "work", "quality", "BERT-base, best other int8 engine, ms", "fastff's engine, ms"]
    return markdown_table(head, rows)


def _losses(study: str) -> dict[str, float]:
    """Mean held-out loss by variant of the finished causal runs of a study."""
    return {e["name"]: e["loss"] for e in compare([r for r in records_of(study) if r["finished"]])}
