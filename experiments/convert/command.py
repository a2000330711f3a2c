"""Run the whole `fastff convert` on a real model and keep its report as one file.

python experiments/convert/command.py embedding PACKED WORK OUT.json [--options "--seconds 480 --curve 3%"]
python experiments/convert/command.py causal TOKENS.tar WORK OUT.json [--pretrain "--seconds 60 ..."] [--options "..."]

embedding  all-MiniLM-L6-v2. PACKED is what carry.py wrote. Evaluated on STS-B dev, which decides, and on
           STS-B test and SICK test (relatedness), which are only told
causal     a decoder that `fastff pretrain --objective causal` makes first, or has made of these tokens (--dense).
           TOKENS.tar is of `fastff experiment pack-tokens`. The conversion reads part of the text of the pretraining;
           perplexity is that of its held-out text

Both commands run as a user would run them, in WORK; the report stays there, in converted/report.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from carry import restore
from transformers import AutoTokenizer

from fastff.experiment.pack_tokens import unpack
from tables import command_table

TABLES = ("STS-B/dev.parquet", "STS-B/test.parquet", "SICK/test.parquet")
PRETRAIN = "--preset small --precision bf16 --compile --batch 256 --micro-batch 256 --ramp 0 --seconds 60"
VALID = "pretraining/valid.txt"
PIECE = 4096  # examples decoded at once


def fastff(*arguments: str, work: Path) -> None:
    """Run the command in WORK; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "fastff.cli", *arguments]
    print("fastff", shlex.join(arguments), flush=True)
    subprocess.run(command, cwd=work, check=True, env={**os.environ, "PYTHONPATH": _source()})


def _source() -> str:
    return str(Path(__file__).resolve().parents[2] / "src")


def decoded(tokenizer: Any, rows: list[np.ndarray[Any, Any]], special: bool) -> Iterator[str]:
    """A line of text for every row of tokens."""
    for first in range(0, len(rows), PIECE):
        piece = [row.tolist() for row in rows[first : first + PIECE]]
        yield from tokenizer.backend_tokenizer.decode_batch(piece, skip_special_tokens=not special)


def write_lines(path: Path, lines: Iterator[str]) -> None:
    path.write_text("".join(f"{' '.join(line.split())}\n" for line in lines), encoding="utf-8")


def prepare_embedding(packed: Path, work: Path) -> list[str]:
    """model/, text.txt and the tables. Returns the arguments of the conversion."""
    restore(packed, work)
    ids, offsets = np.fromfile(work / "tokens.bin", dtype=np.uint32), np.load(work / "offsets.npy")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    write_lines(work / "text.txt", decoded(tokenizer, np.split(ids, offsets[1:-1]), special=False))
    for name in TABLES:
        source = packed / ("extra" if name.startswith("SICK") else "glue") / name
        table = pq.read_table(source)
        if "relatedness" in table.column_names:
            table = table.drop_columns(["label"]).rename_columns({"relatedness": "label"})
        (work / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(table), work / name)
    return ["model", "--text", "text.txt", *(part for name in TABLES for part in ("--table", name))]


def prepare_causal(packed: Path, work: Path, pretrain: str, dense: Path | None, tokens: int) -> list[str]:
    """The pretrained model, text.txt of so many tokens, and VALID. Returns the arguments of the conversion."""
    unpack(packed, work / "data")
    if dense is not None:
        shutil.copytree(dense / "model", work / "pretrained/model")
        shutil.copy(dense / "result.json", work / "pretrained")
    else:
        arguments = ["--text", "train", "--valid", "valid", "--data", "data", "--objective", "causal"]
        fastff("pretrain", "--out", "pretrained", *arguments, *shlex.split(pretrain), work=work)
    tokenizer = AutoTokenizer.from_pretrained(work / "data/tokenizer")
    (work / "pretraining").mkdir()
    for part, name in (("train", "text.txt"), ("valid", VALID)):
        ids = np.fromfile(work / "data" / part / "tokens.bin", dtype=np.uint16)[:tokens]
        ends = np.flatnonzero(ids == tokenizer.sep_token_id) + 1
        # The separator stays: it stands between documents in the windows of the pretraining, too.
        write_lines(work / name, decoded(tokenizer, np.split(ids, ends), special=True))
    return ["pretrained/model", "--text", "text.txt", "--table", VALID]


def made(work: Path) -> dict[str, Any] | None:
    """What is worth knowing of the pretraining, if there was one."""
    path = work / "pretrained/result.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    names = ("parameters", "text_tokens", "steps", "tokens", "seconds", "tokens_per_second", "valid_loss")
    return {name: record[name] for name in (*names, "peak_gpu_bytes", "cached_gpu_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("embedding", "causal"))
    for name in ("packed", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--options", default="", help="of fastff convert")
    parser.add_argument("--pretrain", default=PRETRAIN, help="options of fastff pretrain")
    parser.add_argument("--dense", type=Path, help="folder of a finished `fastff pretrain` on TOKENS.tar")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="read in converting the causal model, at most")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    if args.kind == "embedding":
        arguments = prepare_embedding(args.packed, args.work)
    else:
        arguments = prepare_causal(args.packed, args.work, args.pretrain, args.dense, args.tokens)
    options = shlex.split(args.options)
    fastff("convert", *arguments, "--out", "converted", *options, work=args.work)
    report = json.loads((args.work / "converted/report/report.json").read_text())
    record = {"options": options, "made": made(args.work), "report": report}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(command_table(record))


if __name__ == "__main__":
    main()
