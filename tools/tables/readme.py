"""Sentences of README.md that hold figures."""

from __future__ import annotations

from pathlib import Path

from experiments.convert.tables import read as read_experiment
from tools.tables.decode import FASTEST_OTHER, OWN
from tools.tables.encoder import BEST
from tools.tables.places import AMD, INTEL, read
from tools.tables.shipped import CARD, DENSE

from fastff.report.numbers import three_digits

EXPERTS, DECODED = "flat-96x48-top3", "fastff int8, flat-96x32-top3"


def gains() -> str:
    """What experts and the engine gain in an encoder, in the one that ships, and in decoding."""
    return " ".join([_encoder(), _shipped(), _decoder()])


def _encoder() -> str:
    one, eight = (_faster(INTEL, shape) for shape in ("1x128", "8x128"))
    plain = _faster(AMD, "1x128")
    return (
        f"With them the encoder is {one[0]:.1f} times as fast as the fastest dense one of other engines, and "
        f"{one[1]:.2f} times as fast as the dense one in fastff's engine; eight sequences at once {eight[0]:.1f} and "
        f"{eight[1]:.2f} times. **Without AMX they gain more**: on an AMD EPYC {plain[0]:.1f} and {plain[1]:.1f} times."
    )


def _faster(machine: Path, shape: str) -> tuple[float, float]:
    """How many times faster experts are in our engine than dense layers in the best other one, and in ours."""
    cells = [c for c in read(machine / "encoder-engines.json")["cells"] if (c["shape"], c["threads"]) == (shape, 1)]
    ms = {(cell["feedforward"], cell["engine"]): cell["ms"] for cell in cells}
    experts, own = ms[EXPERTS, "native int8"], ms["dense-gelu", "native int8"]
    return min(ms["dense-gelu", e] for e in BEST if ("dense-gelu", e) in ms) / experts, own / experts


def _shipped() -> str:
    run = read_experiment("ship-engine.json")
    ms = {cell["model"]: three_digits(cell["ms"]) for cell in run["cells"] if cell["shape"] == "1x128"}
    dense, own = run["scores"]["dense"], run["scores"]["this one"]
    return (
        f"all-MiniLM-L6-v2 [ships with experts]({CARD}/README.md): 128 tokens take {ms['this one']} ms, "
        f"dense {ms['dense']} in the same engine and {ms[DENSE]} in OpenVINO int8; "
        f"it scores {own['retrieval']:.1f} in retrieval (dense {dense['retrieval']:.1f}) "
        f"and {own['sick test']:.1f} on SICK (dense {dense['sick test']:.1f})."
    )


def _decoder() -> str:
    cells = [c for c in read(INTEL / "decode.json")["cells"] if (c["context"], c["threads"]) == (128, 1)]
    speed = {cell["engine"]: 1e3 / cell["ms"] for cell in cells}
    four = max(rate for name, rate in speed.items() if name.startswith("fastff int4"))
    others = {cell["engine"]: 1e3 / cell["ms"] for cell in read(INTEL / "decode-layers.json")["cells"]}
    return (
        f"Decoding, SmolLM2-135M makes {speed['fastff int8']:.0f} tokens/s dense in 8 bits and {four:.0f} in 4 "
        f"on one thread, where llama.cpp makes {speed[FASTEST_OTHER]:.0f}; with experts of a tenth of the work (random "
        f"weights: speed alone) {others[DECODED] / others[OWN]:.1f} times as many in 8 bits "
        "([the native engine](docs/engine.md))."
    )
