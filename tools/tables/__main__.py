"""Write the tables of README.md and of every page with tables from the result files: `python -m tools.tables`.

`--check` only says whether they are up to date. A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from experiments.convert import tables as convert
from tools.tables import conditional, cpu, decode, encoder, gpu, readme, rules, serving, shipped, training
from tools.tables.places import INTEL, ROOT

from fastff.report.markdown import replace_marked

PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed-and-quality": encoder.speed_and_quality, "gains": readme.gains},
    "CONTRIBUTING.md": {"imports": rules.imports},
    "docs/benchmarks-cpu.md": {
        "encoder": encoder.engines,
        "encoder-dense": encoder.dense_engines,
        "encoder-engines": encoder.whole_engines,
        "encoder-engines-amd": encoder.engines_without_amx,
        "encoder-lengths": encoder.lengths,
        "layer-cpu": cpu.published_layer,
        "recommended-cpu": cpu.recommended_layers,
        "layers-cpu": cpu.other_layers,
        "conditional-cpu": conditional.layers,
    },
    "docs/engine.md": {
        "decode": decode.engines,
        "decode-layers": decode.layers,
        "decode-wide": decode.wide,
        "decode-start": decode.start,
        "decode-quality": decode.quality,
        "embeddings": encoder.embeddings,
    },
    "docs/benchmarks-gpu.md": {
        "layer-gpu": gpu.layers,
        "conditional-gpu": gpu.conditional,
        "one-gpu": training.one_gpu,
        "gpus": training.gpus,
    },
    "docs/quality.md": training.QUALITY,
    "models/README.md": {"pair": training.pair_table},
    "docs/serving.md": {"serving": serving.serving},
    f"{shipped.CARD}/README.md": {
        "shipped-quality": shipped.quality,
        "shipped-speed": shipped.speed,
        "shipped-speed-amd": lambda: shipped.speed("ship-engine-amd.json"),
    },
    "docs/convert.md": {
        name: convert.TABLES[name]
        for name in ("convert-decoder", "convert-experts", "convert-minilm", "convert-latency")
    },
    f"{INTEL.relative_to(ROOT)}/NOTES.md": {
        "goals-cpu": cpu.goals,
        "threads-cpu": cpu.threads,
        "slower-cpu": cpu.slower,
    },
    "experiments/convert/README.md": convert.TABLES,
    **{f"experiments/{study}/README.md": made for study, made in training.STUDIES.items()},
}


def updated(page: str, text: str) -> str:
    """The text of a page with every table written anew. Raises SystemExit if a place is missing or there twice."""
    for name, made in PAGES[page].items():
        try:
            text = replace_marked(text, name, made())
        except ValueError as error:
            raise SystemExit(f"{page}: {error}") from error
    return text


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = updated(page, before)
        if "--check" not in sys.argv[1:]:
            path.write_text(after)
        elif after != before:
            raise SystemExit(f"{page} does not match the result files: run python -m tools.tables")


if __name__ == "__main__":
    main()
