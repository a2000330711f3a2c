"""What follows from the measured numbers: recovered gaps with their errors, and which parts are still missing."""

from __future__ import annotations

import math
import statistics
from typing import Any

from fastff.train import compare
from train_tiny.settings import DENSE, VARIANTS

STAGES = {
    "speed": "layer speed",
    "start": "the shared start",
    "baselines": "the baselines without a network",
}


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The derived numbers of a run, finished or not."""
    pretrain = results.get("pretrain", {})
    return {
        "recovered_gap": {
            variant["narrow_of"]: recovered_gap(pretrain, variant["narrow_of"], name)
            for name, variant in pretrain.items()
            if variant["narrow_of"] in pretrain and DENSE in pretrain
        },
        "against_dense": {
            name: dict(zip(("difference", "error"), paired(variant, pretrain[DENSE]), strict=True))
            for name, variant in pretrain.items()
            if name != DENSE and DENSE in pretrain
        },
        "training_speed": {name: variant["tokens"] / variant["seconds"] for name, variant in pretrain.items()},
        "missing": missing_parts(results),
    }


def paired(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean difference of two variants' losses on the same windows, and the standard error of that mean."""
    differences = [a - b for a, b in zip(one["valid_losses"], other["valid_losses"], strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def recovered_gap(pretrain: dict[str, Any], variant: str, narrow: str) -> dict[str, Any]:
    """`(L_narrow - L_fff) / (L_narrow - L_wide)`: 0, the tree is worth nothing; 1, as good as the full width.

    Without a value, and with the reason, when the dense twin is not better than its narrow baseline by two standard
    errors: a quotient of noise would say nothing.
    """
    gap, gap_error = paired(pretrain[narrow], pretrain[DENSE])
    gain, gain_error = paired(pretrain[narrow], pretrain[variant])
    found: dict[str, Any] = {
        "gap": gap,
        "gap_error": gap_error,
        "gain": gain,
        "gain_error": gain_error,
        "value": None,
        "reason": None,
    }
    if gap < 2 * gap_error:
        found["reason"] = "the dense twin is not clearly better than the narrow baseline"
    else:
        found["value"] = compare.recovered_gap(
            *(statistics.fmean(pretrain[of]["valid_losses"]) for of in (narrow, variant, DENSE))
        )
    return found


def missing_parts(results: dict[str, Any]) -> list[str]:
    """What a finished run would have and this one has not, in words."""
    missing = [words for stage, words in STAGES.items() if stage not in results]
    quick = results["settings"]["quick"]
    wanted = [variant for variant in VARIANTS if not quick or variant.name in (DENSE, "tree", "tree-narrow")]
    for stage, words in (("pretrain", "pretraining"), ("finetune", "fine-tuning")):
        done = results.get(stage, {})
        missing += [f"{words} of {variant.title}" for variant in wanted if variant.name not in done]
    return missing
