"""Tables of decoding: every engine beside llama.cpp and OpenVINO, what opening takes, what rounding costs."""

from __future__ import annotations

from typing import Any

from tools.tables.places import INTEL, read

from fastff.models.feedforward import complete
from fastff.report.markdown import markdown_table
from fastff.train.presets import feedforward_flops

OWN, FASTEST_OTHER = "fastff int8", "llama.cpp Q4_0"
WIDTH, NEURONS = 576, 1536  # of SmolLM2-135M


def engines() -> str:
    """Every context and number of threads: tokens a second and, in brackets, over the fastest engine of others."""
    return _speeds("decode.json", FASTEST_OTHER)


def layers() -> str:
    """Other feedforwards: tokens a second, over our dense model in 8 bits and over the fastest other engine."""
    run: dict[str, Any] = read(INTEL / "decode-layers.json")
    speed = {cell["engine"]: 1e3 / cell["ms"] for cell in run["cells"]}
    rows = [
        (name, _share(name), f"{rate:.0f}", f"{rate / speed[OWN]:.2f}x", f"{rate / speed[FASTEST_OTHER]:.2f}x")
        for name, rate in speed.items()
    ]
    head = ["engine, feedforward", "work", "tokens/s", "over ours dense in int8", f"over {FASTEST_OTHER}"]
    return markdown_table(head, rows)


def _share(engine: str) -> str:
    """Operations of a feedforward, routing included, over those of the model's own."""
    layer = engine.partition(", ")[2]
    kind, _, neurons = layer.partition("-")
    dense = {"kind": "dense", "intermediate_size": NEURONS, "activation": "swiglu"}
    described: Any = {**dense, "intermediate_size": int(neurons)} if kind == "narrow" else layer or dense
    flops = 0 if layer == "none" else feedforward_flops(complete(described), WIDTH)
    return f"{flops / feedforward_flops(dense, WIDTH):.0%}"


def _speeds(file: str, yardstick: str) -> str:
    run: dict[str, Any] = read(INTEL / file)
    speed = {(c["engine"], c["context"], c["threads"]): 1e3 / c["ms"] for c in run["cells"]}
    columns = list(dict.fromkeys((cell["context"], cell["threads"]) for cell in run["cells"]))
    names = list(dict.fromkeys(cell["engine"] for cell in run["cells"]))
    rows = [
        (name, *(f"{speed[name, *at]:.0f} ({speed[name, *at] / speed[yardstick, *at]:.2f}x)" for at in columns))
        for name in names
    ]
    heads = [f"context {context}, {threads} thread{'s' * (threads > 1)}" for context, threads in columns]
    reads = ", ".join(f"{median:.1f}" for _, median, _ in run["stream_gb_per_second"])
    machine = f"{run['machine']['cpu']}; openvino {run['machine']['openvino']}."
    return f"{markdown_table(['engine', *heads], rows)}\n\n{machine} One core reads {reads} GB/s beside these runs."


def start() -> str:
    """What opening a model takes, and the first token of a prompt."""
    run: dict[str, Any] = read(INTEL / "decode-start.json")
    cells = run["start"]
    rows = [
        (
            cell["engine"],
            f"{cell['open_s']:.2f}",
            f"{cell['own_mb']:.0f} + {cell['files_mb']:.0f}",
            f"{cell['first_token_ms']:.0f}",
        )
        for cell in cells
    ]
    first = f"first token of {cells[0]['prompt']}, ms"
    return markdown_table(["engine", "opened in, s", "memory, MB (own + shared pages)", first], rows)


def quality() -> str:
    """Perplexity and greedy agreement of every engine."""
    cells: list[dict[str, Any]] = read(INTEL / "decode-quality.json")["quality"]
    rows = [
        (
            cell["engine"],
            f"{cell['perplexity']:.2f} ({cell['perplexity_change_percent']:+.2f} %)",
            f"{100 * cell['greedy_agreement']:.1f} %",
        )
        for cell in cells
    ]
    heads = ["engine", f"perplexity of {cells[0]['tokens']} tokens", f"of {cells[0]['greedy_tokens']} greedy tokens"]
    return markdown_table(heads, rows)


def wide() -> str:
    """Milliseconds a token of a decoder of GPT-3's width, and of its feedforwards."""
    run: dict[str, Any] = read(INTEL / "decode-wide.json")["wide"]
    rows = [(name, f"{cell['ms']:.0f} ({cell['q1']:.0f} to {cell['q3']:.0f})") for name, cell in run["cells"].items()]
    tree = run["tree_alone"]
    rows += [
        ("one dense feedforward: half of dense without none", f"{run['dense_feedforward_ms']:.0f}"),
        ("one tree alone, every row of another path", f"{tree['ms']:.2f} ({tree['q1']:.2f} to {tree['q3']:.2f})"),
    ]
    return markdown_table(["engine, feedforward", "ms a token (quartiles)"], rows)
