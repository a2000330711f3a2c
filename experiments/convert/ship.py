"""The converted model of the repository's models/, from what minilm.py --keep wrote, in 8 bits; or its figures.

python experiments/convert/ship.py write MODEL KEPT OUT         MODEL the dense directory, KEPT/taught-*, OUT is written
python experiments/convert/ship.py score DIR PACKED OUT.json    of a directory, on the tables that carry.py packed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from minilm import scores
from safetensors.torch import load
from transformers import AutoModel, AutoTokenizer

from fastff.models.carried_files import carry
from fastff.models.converted import make_converted
from fastff.models.int8_files import INT8_FILE, write_int8


def write(model: Path, kept: Path, out: Path) -> None:
    dense = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    descriptions = json.loads((kept / "feedforwards.json").read_text())
    student: Any = make_converted(dense, descriptions)
    pieces = sorted(kept.glob("taught-*"), key=lambda path: int(path.name.split("-")[1]))
    taught = load(b"".join(path.read_bytes() for path in pieces))
    full = {name: value.float() if value.is_floating_point() else value for name, value in taught.items()}
    missing, unexpected = student.load_state_dict(full, strict=False)
    wrong = [name for name in missing if not name.endswith("_embeddings.weight")] + list(unexpected)
    if wrong:
        raise SystemExit(f"{kept} is not of this model: {', '.join(wrong)}")
    write_int8(student, out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    carry(str(model), out)
    print(f"{(out / INT8_FILE).stat().st_size / 1e6:.1f} MB")


def score(folder: Path, packed: Path, out: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = scores(model, tokenizer, SimpleNamespace(dir=packed, dev_only=False))
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "score"))
    parser.add_argument("paths", type=Path, nargs=3)
    args = parser.parse_args()
    (write if args.command == "write" else score)(*args.paths)


if __name__ == "__main__":
    main()
