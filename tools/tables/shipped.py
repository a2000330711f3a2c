"""Tables of the card of models/all-minilm-l6-v2-experts."""

from __future__ import annotations

from typing import Any

from experiments.convert.tables import read
from tools.tables.places import ROOT
from tools.tables.places import read as read_results

from fastff.report.markdown import markdown_table

CARD = "models/all-minilm-l6-v2-experts"
DENSE = "dense, openvino int8"
MODELS = {
    DENSE: "dense, OpenVINO int8",
    "dense": "dense",
    "this one": "**this one**",
    "narrow": "narrow dense, 152 neurons",
    "none": "no feedforwards",
}
TAUGHT = {
    "experts-46x32-top2": "this one, fp32, as taught",
    "narrow-152": "narrow dense, 152 neurons, equal work, fp32",
    "none": "no feedforwards, fp32",
}


def quality() -> str:
    taught, here = read("minilm-experts.json"), read("ship-engine.json")["scores"]
    stored = read_results(ROOT / CARD / "scores.json")
    variants = {row["variant"]: row["after"] for row in taught["variants"]}
    rows: dict[str, dict[str, float]] = {
        "all-MiniLM-L6-v2 (dense), fp32": taught["dense"],
        "all-MiniLM-L6-v2 (dense), in fastff's engine": here["dense"],
        "**this one**, as stored in 8 bits": stored,
        "**this one**, in fastff's engine": here["this one"],
        **{name: variants[variant] for variant, name in TAUGHT.items()},
    }
    names = list(taught["dense"])
    head = ["model", "STS-B dev", "STS-B test", "SICK test", "retrieval"]
    return markdown_table(head, [[name, *(f"{row[key]:.2f}" for key in names)] for name, row in rows.items()])


def speed(file: str = "ship-engine.json") -> str:
    run: dict[str, Any] = read(file)
    times = {(cell["model"], cell["shape"]): cell["ms"] for cell in run["cells"]}
    shapes = list(dict.fromkeys(shape for _, shape in times))

    def cell(model: str, shape: str) -> str:
        ms, dense = times[model, shape], times[DENSE, shape]
        return f"{ms:.3g}" if model == DENSE else f"{ms:.3g} ({dense / ms:.1f}x)"

    head = ["model", *(f"{shape.replace('x', ' x ')} tokens" for shape in shapes)]
    table = markdown_table(head, [[name, *(cell(model, shape) for shape in shapes)] for model, name in MODELS.items()])
    return f"{table}\n\n{run['machine']['cpu']}."
