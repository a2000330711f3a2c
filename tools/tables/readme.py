"""Sentences of README.md that hold figures."""

from __future__ import annotations

from experiments.convert.tables import read as read_experiment
from tools.tables.decode import FASTEST_OTHER
from tools.tables.encoder import BEST
from tools.tables.places import INTEL, read
from tools.tables.shipped import CARD, DENSE

from fastff.report.numbers import three_digits

EXPERTS = "flat-96x48-top3"


def gains() -> str:
    """What experts and the engine gain in an encoder, in the one that ships, and in decoding."""
    return " ".join([_encoder(), _shipped(), _decoder()])


def _encoder() -> str:
    cells = [c for c in read(INTEL / "encoder-engines.json")["cells"] if (c["shape"], c["threads"]) == ("1x128", 1)]
    ms = {(cell["feedforward"], cell["engine"]): cell["ms"] for cell in cells}
    experts, own = ms[EXPERTS, "native int8"], ms["dense-gelu", "native int8"]
    other = min(ms["dense-gelu", engine] for engine in BEST)
    return (
        f"With them the encoder is {other / experts:.1f} times as fast as the fastest dense one of other engines, and "
        f"{own / experts:.2f} times as fast as the dense one in fastff's engine."
    )


def _shipped() -> str:
    run = read_experiment("ship-engine.json")
    ms = {cell["model"]: three_digits(cell["ms"]) for cell in run["cells"] if cell["shape"] == "1x128"}
    dense, own = run["scores"]["dense"], run["scores"]["this one"]
    return (
        f"all-MiniLM-L6-v2 [ships with experts]({CARD}/README.md): 128 tokens take {ms['this one']} ms, "
        f"dense {ms['dense']} in the same engine and {ms[DENSE]} in OpenVINO int8; "
        f"of the dense model's retrieval ({dense['retrieval']:.1f}) it keeps {own['retrieval']:.1f}, "
        f"of SICK ({dense['sick test']:.1f}) {own['sick test']:.1f}."
    )


def _decoder() -> str:
    cells = [c for c in read(INTEL / "decode.json")["cells"] if (c["context"], c["threads"]) == (128, 1)]
    speed = {cell["engine"]: 1e3 / cell["ms"] for cell in cells}
    four = max(rate for name, rate in speed.items() if name.startswith("fastff int4"))
    return (
        f"Decoding, SmolLM2-135M makes {speed['fastff int8']:.0f} tokens/s dense in 8 bits and {four:.0f} in 4 "
        f"on one thread, where llama.cpp makes {speed[FASTEST_OTHER]:.0f} ([the native engine](docs/engine.md))."
    )
