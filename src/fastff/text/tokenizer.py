"""Tokenizers: trained on a text, or read; and what packing and masking must know of one."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastff.errors import FileError, TrainingError
from fastff.io import read_json, replacing_folder, write_json
from fastff.text.reading import documents

SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MADE_WITH = "made_with.json"  # beside a tokenizer that was trained: of how many entries it was to be
Texts = Callable[[], Iterable[str]]  # read several times


def train_tokenizer(texts: Texts, vocab_size: int, *, alphabet: int | None = None) -> Tokenizer:
    """A lower-casing WordPiece tokenizer with the five special tokens of BERT at the ids 0 to 4: the same from the same
    text. alphabet: how many characters get an entry, most frequent first; None: all.

    The trainer numbers the characters that continue a word in the order of a hash table with a random seed, and breaks
    ties between pairs by those numbers; so a first pass finds these characters, and the second gets them in order.
    """
    options: dict[str, Any] = {} if alphabet is None else _frequent(texts, alphabet)
    found = _trained(texts, vocab_size=0, special_tokens=list(SPECIALS.values()), **options).get_vocab()
    continuing = sorted(entry for entry in found if len(entry) == 3 and entry.startswith("##"))
    seeded = [*SPECIALS.values(), *continuing]
    vocabulary = _trained(texts, vocab_size=vocab_size, special_tokens=seeded, **options).get_vocab()
    # A tokenizer of its own, in which the continuing characters are entries like all others.
    return _blank(models.WordPiece(vocabulary, unk_token=SPECIALS["unk_token"]))


def _trained(texts: Texts, **options: Any) -> Tokenizer:
    tokenizer = _blank(models.WordPiece(unk_token=SPECIALS["unk_token"]))
    tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(show_progress=False, **options))
    return tokenizer


def _blank(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if model.token_to_id(SPECIALS["pad_token"]) is not None:
        tokenizer.add_special_tokens(list(SPECIALS.values()))
    return tokenizer


def _frequent(texts: Texts, most: int) -> dict[str, Any]:
    """Options of a trainer that keep the most frequent characters; of equally frequent ones, the first."""
    normalizer, counts = normalizers.BertNormalizer(lowercase=True), Counter[str]()
    for text in texts():
        counts.update(normalizer.normalize_str(text))
    visible = [(character, count) for character, count in counts.items() if not character.isspace()]
    kept = sorted(visible, key=lambda item: (-item[1], item[0]))[:most]
    return {"initial_alphabet": [character for character, _ in kept], "limit_alphabet": len(kept)}


def wrap(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with BERT's special tokens as Transformers uses it, for sequences of `length`."""
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **SPECIALS)


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer from a directory, a `tokenizer.json` or the hub. Raises TrainingError if it cannot be read."""
    path = Path(source)
    try:
        if path.is_file():
            return wrap(Tokenizer.from_file(str(path)), 128)
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # the libraries raise many kinds, all of which mean the same here
        raise TrainingError(f"{source} holds no tokenizer that can be read: {error}") from error


@dataclass(frozen=True)
class Vocabulary:
    """What packing and masking must know of a tokenizer; ids below `special` are special or unused."""

    size: int
    pad: int
    first: int
    last: int
    mask: int
    special: int

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Raises TrainingError for a tokenizer without BERT's special tokens, or with special ids among the others."""
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise TrainingError(f"the tokenizer has no {', '.join(missing)} token")
        special = max(tokenizer.all_special_ids) + 1
        if special > len(tokenizer) // 4:
            raise TrainingError(
                f"the tokenizer's special ids reach {special - 1} of {len(tokenizer)}; they must come before all others"
            )
        return cls(len(tokenizer), ids["pad"], ids["cls"], ids["sep"], ids["mask"], special)


def fingerprint(tokenizer: Any) -> str:
    """A short hash of everything that decides how a tokenizer cuts text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def make_tokenizer(
    sources: Sequence[str], folder: Path, *, vocab_size: int, exact: bool, seq_len: int, column: str, most: int
) -> Any:
    """The tokenizer that an earlier call left in `folder`, or one trained on the first `most` characters.

    Raises TrainingError for text without a word and, with `exact`, for one in the folder made for another vocab_size.
    """
    if (folder / "tokenizer.json").is_file():
        if exact:
            _check_made_with(folder, vocab_size)
        return load_tokenizer(folder)

    def beginning() -> Iterator[str]:
        left = most
        for text in documents(sources, column=column):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return

    trained = wrap(train_tokenizer(beginning, vocab_size), seq_len)
    if len(trained) <= len(SPECIALS):
        raise TrainingError(f"the text is empty: {', '.join(sources)}")
    with replacing_folder(folder) as new:
        trained.save_pretrained(new)
        write_json(new / MADE_WITH, {"vocab_size": vocab_size})
    return load_tokenizer(folder)


def _check_made_with(folder: Path, vocab_size: int) -> None:
    record = folder / MADE_WITH
    if not record.is_file():  # of an earlier version, or a tokenizer that the user put there
        return
    made = read_json(record, needs={"vocab_size": int})["vocab_size"]
    if made != vocab_size:
        raise FileError(
            f"{folder} holds a tokenizer made for {made} entries, {vocab_size} asked for: choose another folder of data"
        )
