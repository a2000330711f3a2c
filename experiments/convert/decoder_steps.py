"""Tokens a second of a decoder's joint distillation: step by step, recorded as a CUDA graph, and compiled, too.

python experiments/convert/decoder_steps.py OUT.json [--variants experts-50-b narrow-50] [--steps 40]

Random weights of SmolLM2-135M's size; whether recorded steps learn what plain ones do is checked first.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoder import LENGTH, compile_blocks, describe
from transformers import AutoModelForCausalLM, LlamaConfig

from fastff.convert.distil import Recipe, distil, use_masked_training
from fastff.convert.student import dense_layers
from fastff.models.converted import make_converted
from fastff.report.progress import Progress, silent
from fastff.text.examples import TextExamples

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
FORMS = ("plain", "recorded", "compiled")
CHECKED = 8  # steps
BLOCKS = 512


def pair(variant: str, device: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """Teacher and student, the same in every call."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).to(device).eval().requires_grad_(False)
    student = make_converted(teacher, [describe(layer, variant) for layer in dense_layers(teacher)])
    use_masked_training(student.modules(), device == "cuda")
    return teacher, student


def take(variant: str, form: str, steps: int, device: str, sizes: dict[str, Any], progress: Progress = silent) -> Any:
    """The student after so many steps."""
    teacher, student = pair(variant, device, sizes)
    if form == "compiled":
        compile_blocks(teacher)
        compile_blocks(student)
    ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], BLOCKS * LENGTH).astype(np.uint16)
    examples = TextExamples(ids, np.arange(0, len(ids) + 1, LENGTH), 0)
    recipe = Recipe(steps, 32, hidden_share=0.0)
    distil(student, teacher, examples, recipe, kind="causal", progress=progress, recorded=form != "plain")
    return student


@torch.no_grad()
def apart(one: Any, other: Any, start: Any) -> float:
    """How far two students' weights lie apart, of how far they have moved."""
    pairs = list(zip(one.parameters(), other.parameters(), start.parameters(), strict=True))
    distance = sum(float((a - b).square().sum()) for a, b, _ in pairs)
    moved = sum(float((a - c).square().sum()) for a, _, c in pairs)
    return float((distance / moved) ** 0.5)


def seconds_of(variant: str, form: str, steps: int, device: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, of the second half of them."""
    marks: list[float] = []

    def note(_: str, done: float, *__: Any) -> None:
        if done in (steps // 2, steps):
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    began = time.perf_counter()
    take(variant, form, steps, device, sizes, note)
    step = (marks[1] - marks[0]) / (steps - steps // 2)
    return {"step_s": step, "tokens_per_s": 32 * LENGTH / step, "before_s": marks[0] - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", default=["experts-50-b", "narrow-50"])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {**SIZES, "num_hidden_layers": args.layers}
    record: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "variants": {}}
    for variant in args.variants:
        rows: dict[str, Any] = {}
        for form in args.forms:
            try:
                rows[form] = seconds_of(variant, form, args.steps, device, sizes)
            except Exception as error:  # one form that fails leaves the others
                rows[form] = {"failed": repr(error)[:500]}
            if device == "cuda":
                rows[form]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            print(variant, form, rows[form], flush=True)
        record["variants"][variant] = rows
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    variant = args.variants[0]
    plain, start = take(variant, "plain", CHECKED, device, sizes), pair(variant, device, sizes)[1]
    record["apart"] = {
        form: apart(take(variant, form, CHECKED, device, sizes), plain, start)
        for form in ("plain", *args.forms[1:])
        if "failed" not in record["variants"][variant].get(form, {})
    }
    print(record["apart"])
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
