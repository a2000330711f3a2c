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
_NEW_SETTINGS = {"lr_routers": 5e-5, "beta2": 0.98, "hidden_share": 0.1, "bf16": True, "gguf": False, "beside": None}


def renamed(content: Any) -> Any:
    """The same dicts and lists with today's names."""
    if isinstance(content, dict):
        return {_RENAMED.get(name, name): renamed(value) for name, value in content.items()}
    return [renamed(value) for value in content] if isinstance(content, list) else content


def upgrade(work: Path) -> None:
    """Write the JSON files of a folder anew if they have earlier names, or lack what is new."""
    for path, complete in ((work / "settings.json", _settings), (work / "plan.json", _plan)):
        if path.is_file():
            content = read_json(path)
            if complete(renamed(content)) != content:
                write_json(path, complete(renamed(content)))


def _settings(content: Any) -> Any:
    """With the settings that did not exist, at their defaults."""
    return {**_NEW_SETTINGS, **content} if isinstance(content, dict) and "text" in content else content


def _plan(content: Any) -> Any:
    """With the kinds of candidates: trees were the only ones."""
    if not isinstance(content, dict) or not {"tried", "options"} <= set(content):
        return content
    try:
        tried = [{"kind": "trees", **shape} for shape in content["tried"]]
        options = [
            [{"kind": "dense" if option["description"] is None else "trees", **option} for option in block]
            for block in content["options"]
        ]
    except (TypeError, KeyError):
        return content  # damaged: whoever reads it says so
    return {**content, "tried": tried, "options": options}


def average_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of AveragedModel, from its own or from the earlier one: values and the steps that they average."""
    if "values" not in state:
        return state
    values = {f"module.{k}": value for k, value in enumerate(state["values"])}
    return {"n_averaged": torch.tensor(1 + state["count"]), **values}
