"""What follows from the measured numbers: recovered gaps with their errors, and which parts are still missing."""

from __future__ import annotations

import math
import statistics
from typing import Any

from fastff.demo.settings import ARMS, DENSE
from fastff.train import compare

STAGES = {
    "speed": "layer speed",
    "start": "the shared start",
    "baselines": "the controls without a network",
}


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The derived numbers of a run, finished or not."""
    pretrain = results.get("pretrain", {})
    return {
        "recovered_gap": {
            arm["narrow_of"]: recovered_gap(pretrain, arm["narrow_of"], name)
            for name, arm in pretrain.items()
            if arm["narrow_of"] in pretrain and DENSE in pretrain
        },
        "against_dense": {
            name: dict(zip(("difference", "error"), paired(arm, pretrain[DENSE]), strict=True))
            for name, arm in pretrain.items()
            if name != DENSE and DENSE in pretrain
        },
        "training_speed": {name: arm["tokens"] / arm["seconds"] for name, arm in pretrain.items()},
        "missing": missing_parts(results),
    }


def paired(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean difference of two arms' losses on the same windows, and the standard error of that mean."""
    differences = [a - b for a, b in zip(one["valid_losses"], other["valid_losses"], strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def recovered_gap(pretrain: dict[str, Any], arm: str, narrow: str) -> dict[str, Any]:
    """`(L_narrow - L_fff) / (L_narrow - L_wide)`: 0, the tree is worth nothing; 1, as good as the full width.

    Without a value, and with the reason, when the dense twin is not better than its narrow control by two standard
    errors: a quotient of noise would say nothing.
    """
    gap, gap_error = paired(pretrain[narrow], pretrain[DENSE])
    gain, gain_error = paired(pretrain[narrow], pretrain[arm])
    found: dict[str, Any] = {
        "gap": gap,
        "gap_error": gap_error,
        "gain": gain,
        "gain_error": gain_error,
        "value": None,
        "reason": None,
    }
    if gap < 2 * gap_error:
        found["reason"] = "the dense twin is not clearly better than the narrow control"
    else:
        found["value"] = compare.recovered_gap(
            *(statistics.fmean(pretrain[of]["valid_losses"]) for of in (narrow, arm, DENSE))
        )
    return found


def missing_parts(results: dict[str, Any]) -> list[str]:
    """What a finished run would have and this one has not, in words."""
    missing = [words for stage, words in STAGES.items() if stage not in results]
    quick = results["settings"]["quick"]
    wanted = [arm for arm in ARMS if not quick or arm.name in (DENSE, "tree", "tree-narrow")]
    for stage, words in (("pretrain", "pretraining"), ("finetune", "fine-tuning")):
        done = results.get(stage, {})
        missing += [f"{words} of {arm.title}" for arm in wanted if arm.name not in done]
    return missing
