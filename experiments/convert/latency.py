"""Time a converted embedding model beside the dense one: whole calls, and the feedforward layers alone.

python experiments/convert/latency.py MODEL STUDENTS OUT [--seconds 2]

MODEL     directory of all-MiniLM-L6-v2
STUDENTS  folder of the models that are timed, made by the first call, which then times nothing: their layers are
          initialised from the dense ones on rows of random tokens and not distilled. Their quality is worth nothing,
          their work and memory are those of distilled models.
One thread. Every model is checked to give finite values, then their calls alternate; medians are kept, with the
20th and 80th percentiles. Writes OUT/latency.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

import fastff.models  # noqa: F401
from fastff.convert.choose_layers import Shape
from fastff.convert.conversion_report import layer_name
from fastff.convert.distill_context import active_share, baseline
from fastff.convert.initialise import initialise
from fastff.convert.student import dense_layers
from fastff.machine import cpu_name
from fastff.models.converted import make_converted
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.timing import interleaved
from tables import latency_table

SHAPES = ((1, 128), (32, 128))
TREES = (  # shapes, and the share of the dense layer's work: those whose quality was measured, and trees alone
    (Shape(2, 5, part=0.75), 0.1),
    (Shape(2, 5, part=0.5), 0.03),
    (Shape(8, 4), 0.1),
)
ROWS = 4096  # that the trees are initialised on


@torch.no_grad()
def inputs_of(model: Any) -> list[torch.Tensor]:
    """What each feedforward sees on random tokens: (ROWS, hidden) a block."""
    family, seen = family_of(model.config.model_type), []
    blocks = family.blocks_of(model)
    hooks = [family.slot_of(b).register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for b in blocks]
    model(input_ids=tokens(model, (ROWS // 128, 128)))
    for hook in hooks:
        hook.remove()
    return [x.reshape(-1, x.shape[-1]) for x in seen]


def tokens(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(1000, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def student(model: Any, descriptions: list[dict[str, Any]], inputs: list[torch.Tensor]) -> Any:
    copy, family = make_converted(model, descriptions).eval(), family_of(model.config.model_type)
    for block, dense, x in zip(family.blocks_of(copy), dense_layers(model), inputs, strict=True):
        module = family.slot_of(block)
        assert isinstance(module, ConvertedFeedforward)
        if module.layer is not None:
            initialise(module, dense, x, lambda x=x: iter([(x, x)]))
    return copy


def time_all(calls: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of calls that take decisions: median and spread."""
    found = {}
    for name, timing in interleaved(calls, seconds).items():
        taken = [us / 1e3 for us in timing.samples_us]
        spread = {"p20_ms": quantile(taken, 0.2), "p80_ms": quantile(taken, 0.8)}
        found[name] = {"median_ms": timing.p50_us / 1e3, **spread}
    return found


def quantile(taken: list[float], at: float) -> float:
    return sorted(taken)[round(at * (len(taken) - 1))]


def layer_of(model: Any, k: int) -> Any:
    family = family_of(model.config.model_type)
    block = family.blocks_of(model)[k]
    slot = family.slot_of(block)
    return slot if isinstance(slot, ConvertedFeedforward) else family.dense_of(block)


def feedforwards(model: Any, inputs: list[torch.Tensor], shape: tuple[int, int]) -> Any:
    """A call of all feedforward layers, each on its own rows."""
    xs = [x[: shape[0] * shape[1]].view(*shape, -1) for x in inputs]
    layers = [layer_of(model, k) for k in range(len(xs))]

    def call() -> None:
        for layer, x in zip(layers, xs, strict=True):
            layer(x)

    return call


def wanted(dense: DenseWeights) -> dict[str, dict[str, Any]]:
    """Descriptions by name: every entry of TREES, narrow layers of equal work, none."""
    out: dict[str, dict[str, Any]] = {}
    for shape, active in TREES:
        fitted = shape.fit(dense, active)
        if fitted is None:
            raise SystemExit(f"{shape} does not fit active {active}")
        (narrow,) = baseline("narrow", [dense], [fitted])
        assert narrow is not None
        out |= {layer_name(fitted): fitted, f"narrow, {narrow['intermediate_size']}": narrow}
    return out | {"none": {"kind": "none"}}


def make(model: Any, folder: Path) -> bool:
    """Write a student for every description, each into a folder of its name; False if all exist."""
    dense, inputs = dense_layers(model), inputs_of(model)
    missing = {name: d for name, d in wanted(dense[0]).items() if not (folder / name).exists()}
    for name, description in missing.items():
        student(model, [description] * len(dense), inputs).save_pretrained(folder / name)
    return bool(missing)


def share_of(model: Any, dense: list[Any]) -> float:
    """Share of the dense layers' floating-point operations that a model's feedforwards spend."""
    descriptions = getattr(model.config, "fastff_feedforwards", [None] * len(dense))
    return active_share(dense, descriptions)


def measure(
    models: dict[str, Any], inputs: list[torch.Tensor], shape: tuple[int, int], seconds: float
) -> dict[str, Any]:
    """Times of all models and of their feedforwards at one shape; raises SystemExit for values that are not finite."""
    ids = tokens(models["dense"], shape)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, model in models.items():
        if not bool(model(**given)[0].isfinite().all()):
            raise SystemExit(f"{name} gives values that are not finite")
    whole = {name: lambda model=model: model(**given) for name, model in models.items()}
    layers = {name: feedforwards(model, inputs, shape) for name, model in models.items()}
    return {"shape": shape, "whole": time_all(whole, seconds), "feedforward": time_all(layers, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "students", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    if make(model, args.students):
        print(f"wrote {args.students}: call again to time them")
        return
    models = {"dense": model}
    for folder in sorted(args.students.iterdir()):
        models[folder.name] = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = inputs_of(model)
        shapes = [measure(models, inputs, shape, args.seconds) for shape in SHAPES]
    record = {
        "threads": 1,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "students": "initialised, not distilled: only times mean anything",
        "active": {name: share_of(other, dense_layers(model)) for name, other in models.items()},
        "shapes": shapes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "latency.json").write_text(json.dumps(record, indent=1) + "\n")
    print(latency_table(record))


if __name__ == "__main__":
    main()
