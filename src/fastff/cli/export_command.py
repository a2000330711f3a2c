"""`fastff export`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Literal

from fastff.cli.console import console

CALIBRATION_LINES = 64


def export(
    model: str,
    /,
    *,
    to: Literal["native", "openvino"],
    out: Path,
    weights: Literal["int8", "int4", "fp32"] = "int8",
    text: Path | None = None,
) -> int:
    """Write a model for inference without PyTorch.

    Parameters
    ----------
    model
        Directory or hub name of a Transformers model, dense or conditional; for native also a GGUF file.
    to
        What runs it: native (fastff's own engine) or openvino (encoders and classifiers).
    out
        Directory to write; an earlier export there is replaced.
    weights
        Form of the weights: int8; also fp32 for OpenVINO, and int4 for causal models in the native engine.
    text
        Text, one example a line, whose first 64 lines calibrate int8 activations (OpenVINO).
    """
    from fastff.engine.export import export as run
    from fastff.text.reading import lines

    texts = None if text is None else list(islice(lines(text), CALIBRATION_LINES))
    run(model, out, to=to, weights=weights, texts=texts)
    console.print(f"wrote {out}", markup=False)
    return 0
