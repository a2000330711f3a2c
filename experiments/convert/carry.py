"""Everything that the comparisons of conversions read, packed into one small folder that can be carried elsewhere.

python experiments/convert/carry.py MODEL DATA DIR [--tokens 5500000]

MODEL  directory of all-MiniLM-L6-v2; kept in half precision
DATA   folder with glue/, extra/ (parquet tables) and text/ (documents, packed with xz)
DIR    is written: model/ and weights.xz, tokens.xz and lengths.xz (sentences to learn from), text/ (for a causal
       model) and the tables that are evaluated

The sentences are those of the training parts of TRAINED and of Wikipedia. None of them is, but for case, spaces and
punctuation, a sentence of a table that is evaluated, the rows of RETRIEVAL among them (retrieval.parquet in DIR).
"""

from __future__ import annotations

import argparse
import lzma
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from fastff.convert.quality import read_table
from fastff.text.examples import tokenise

# Sentences to learn from, all under terms by which a model made with them may be given away: MNLI (OANC and others,
# free use), SNLI and QNLI (CC BY-SA 4.0), Wikipedia (CC BY-SA 3.0).
TRAINED = ("glue/MNLI/train_subset", "extra/SNLI/train_subset", "glue/QNLI/train_subset")
RETRIEVAL = ("glue/QNLI/train_subset", 3000)  # its last rows are kept aside: questions and the sentences that answer
EVALUATED = ("glue/STS-B/dev", "glue/STS-B/test", "extra/SICK/test", "glue/SST-2/dev")
CARRIED = (*EVALUATED, "glue/SST-2/train")
WIKIPEDIA = ("wiki-train-00", "wiki-train-01", "wiki-train-02")  # sentences for embeddings
WIKIPEDIA_TIMES = 3  # as many sentences of it as of the tables
CAUSAL = ("wiki-train-02",)  # documents for a causal model
MAX_LENGTH = 64
COLUMNS = ("sentence", "sentence1", "sentence2")
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 2, "lc": 0, "lp": 0, "pb": 0}]


def key(sentence: str) -> str:
    """A sentence without case, spaces and punctuation."""
    return re.sub(r"\W+", "", sentence.lower())


def rows_of(data: Path, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        table = read_table(data / f"{name}.parquet")
        for column in (column for column in COLUMNS if column in table):
            yield from (" ".join(sentence.split()) for sentence in table[column])


def retrieval(data: Path) -> dict[str, list[Any]]:
    """The rows kept aside: sentence1 a question, sentence2 a sentence, label 0 where it answers the question."""
    name, count = RETRIEVAL
    return {column: values[-count:] for column, values in read_table(data / f"{name}.parquet").items()}


def wikipedia(data: Path) -> Iterator[str]:
    for name in WIKIPEDIA:
        with lzma.open(data / f"text/{name}.txt.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("="):
                    found = re.split(r"(?<=[.!?]) (?=[A-Z])", line.strip())
                    yield from (sentence for sentence in found if 40 <= len(sentence) <= 300)


def sentences(data: Path, seed: int = 0) -> list[str]:
    """Distinct sentences in random order: all of the tables, and WIKIPEDIA_TIMES as many from Wikipedia."""
    aside = retrieval(data)
    seen = {key(sentence) for sentence in (*rows_of(data, EVALUATED), *aside["sentence1"], *aside["sentence2"])}
    kept: list[list[str]] = []
    for source in (rows_of(data, TRAINED), wikipedia(data)):
        new: list[str] = []
        for sentence in source:
            found = key(sentence)
            if len(found) >= 8 and found not in seen:
                seen.add(found)
                new.append(sentence)
        kept.append(new)
    draw = random.Random(seed)
    tables, others = kept
    both = tables + draw.sample(others, min(len(others), WIKIPEDIA_TIMES * len(tables)))
    draw.shuffle(both)
    return both


def pack(values: np.ndarray[Any, Any], path: Path) -> None:
    """16-bit values: all low bytes, then all high ones, which are the ones that repeat."""
    plain = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2)
    path.write_bytes(lzma.compress(np.ascontiguousarray(plain.T).tobytes(), lzma.FORMAT_XZ, filters=FILTERS))


def unpack(path: Path) -> np.ndarray[Any, Any]:
    """What `pack` wrote, as uint16."""
    planes = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view(np.uint16).reshape(-1)


def prepare(model: Path, data: Path, out: Path, tokens: int) -> None:
    dense = AutoModel.from_pretrained(model, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense.config.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    flat = torch.cat([value.flatten() for _, value in weights_of(dense)])
    pack(flat.view(torch.int16).numpy(), out / "weights.xz")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "sentences.txt"
        text.write_text("\n".join(sentences(data)), encoding="utf-8")
        examples = tokenise(tokenizer, text, Path(folder), max_length=MAX_LENGTH, max_tokens=tokens, whole_blocks=False)
        pack(np.asarray(examples.ids).astype(np.uint16), out / "tokens.xz")
        pack(np.diff(examples.offsets).astype(np.uint16), out / "lengths.xz")
        print(f"{len(examples)} sentences, {examples.tokens} tokens")
        del examples  # its file is mapped
    for name in [f"{table}.parquet" for table in CARRIED] + [f"text/{shard}.txt.xz" for shard in CAUSAL]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / name, out / name)
    pq.write_table(pa.table(retrieval(data)), out / "retrieval.parquet")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {out}")


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Floating-point tensors by name, in the order in which they are packed."""
    return sorted((name, value) for name, value in model.state_dict().items() if value.is_floating_point())


def restore(folder: Path, work: Path) -> Path:
    """Write WORK/model, a directory for from_pretrained, and the tokens as `tokenise` does; returns the former."""
    shutil.copytree(folder / "model", work / "model")
    dense = AutoModel.from_config(AutoConfig.from_pretrained(folder / "model"))
    flat = torch.from_numpy(unpack(folder / "weights.xz").view(np.float16)).float()
    place = 0
    for _, value in weights_of(dense):
        value.copy_(flat[place : place + value.numel()].view_as(value))
        place += value.numel()
    dense.save_pretrained(work / "model")
    unpack(folder / "tokens.xz").astype(np.uint32).tofile(work / "tokens.bin")
    lengths = unpack(folder / "lengths.xz").astype(np.int64)
    np.save(work / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))))
    return work / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, default=5_500_000)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    prepare(args.model, args.data, args.dir, args.tokens)


if __name__ == "__main__":
    main()
