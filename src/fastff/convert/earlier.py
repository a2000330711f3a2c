"""State that the version before left in the folder of an interrupted conversion, under today's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastff.io import read_json, write_json

_RENAMED = {
    "missed": "unexplained",
    "harm": "loss_increase",
    "controls": "baselines",
    "rate": "lr",
    "rate_others": "lr_others",
    "rate_routing": "routing_lr_scale",
    "mild": "dense_fade",
    "clock": "profile",
}


def renamed(content: Any) -> Any:
    """The same dicts and lists with today's names."""
    if isinstance(content, dict):
        return {_RENAMED.get(name, name): renamed(value) for name, value in content.items()}
    return [renamed(value) for value in content] if isinstance(content, list) else content


def upgrade(work: Path) -> None:
    """Write the JSON files of a folder anew if they have earlier names."""
    for path in (work / "settings.json", work / "plan.json"):
        if path.is_file():
            content = read_json(path)
            if renamed(content) != content:
                write_json(path, renamed(content))


def average_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of AveragedModel, from its own or from the earlier one: values and the steps that they average."""
    if "values" not in state:
        return state
    values = {f"module.{k}": value for k, value in enumerate(state["values"])}
    return {"n_averaged": torch.tensor(1 + state["count"]), **values}
