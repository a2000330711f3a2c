"""The page of an exploration: its numbers as base64 in one file, which the page's own script draws."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastff.explore.explore_settings import ExploreSettings
from fastff.explore.token_routes import Exploration, LayerRoutes, explored
from fastff.io import write_text
from fastff.report import pages


def explore(settings: ExploreSettings) -> Exploration:
    """Load the model, run the texts and write the page. Raises what loading, `explored` and writing raise."""
    from fastff.engine.export import load_model

    model, tokenizer, _ = load_model(settings.model)
    name = Path(settings.model).name or settings.model
    found = explored(model, tokenizer, name, settings.text, max_tokens=settings.max_tokens)
    write_text(settings.out, page(found))
    return found


def page(found: Exploration) -> str:
    """The page's text."""
    return pages.render("explorer.html", model=found.model, left_out=found.left_out, data=_script_safe(_data(found)))


def _data(found: Exploration) -> dict[str, Any]:
    return {
        "texts": [{"title": text.title, "pieces": text.pieces} for text in found.texts],
        "layers": [_layer(layer) for layer in found.layers],
    }


def _layer(layer: LayerRoutes) -> dict[str, Any]:
    kind = np.uint8 if layer.leaves <= 256 else np.uint16 if layer.leaves <= 65536 else np.uint32
    return {
        "name": layer.name,
        "trees": layer.trees,
        "depth": layer.depth,
        "leaves": layer.leaves,
        "chosen": layer.chosen,
        "surenessIs": layer.sureness_is,
        "bytes": kind().itemsize,
        "leaf": _base64(layer.leaf.numpy().astype(kind)),
        "sureness": _base64(layer.sureness.numpy().astype("<f4")),
    }


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _script_safe(content: Any) -> str:
    """JSON that no text in it can end: `<` is written as an escape."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
