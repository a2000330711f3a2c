"""Texts into token ids, with the tokenizer's own special tokens: cut to the model's length, or an error."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer

from fastff.serve.batcher import Tokens
from fastff.serve.refusals import Refused, invalid

Text = str | tuple[str, str]  # a pair for cross-encoders


class Texts:
    """Any number of threads may use it. max_length: tokens of an input."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, vocab_size: int) -> None:
        self.max_length, self.vocab_size = max_length, vocab_size
        self._whole, self._cut = _copy(tokenizer), _copy(tokenizer)
        self._cut.enable_truncation(max_length)

    def tokens(self, texts: Sequence[Text], *, truncate: bool) -> list[Tokens]:
        """Raises Refused for a text that is too long, unless it may be cut, or has no tokens."""
        found = self._whole.encode_batch(texts)
        empty = next((number for number, one in enumerate(found) if not len(one)), None)
        if empty is not None:
            raise _no_tokens(empty)
        too_long = [number for number, one in enumerate(found) if len(one) > self.max_length]
        if too_long and not truncate:
            raise self._too_long(too_long[0], len(found[too_long[0]]))
        for number in too_long:
            found[number] = self._cut.encode_batch([texts[number]])[0]
        return [_tokens(one) for one in found]

    def given(self, ids: Sequence[Sequence[int]], *, truncate: bool) -> list[Tokens]:
        """Token ids as they are. Raises Refused for those that are too many, none, or outside the vocabulary."""
        for number, sequence in enumerate(ids):
            if not sequence:
                raise _no_tokens(number)
            least, largest = min(sequence), max(sequence)
            if least < 0 or largest >= self.vocab_size:
                wrong = least if least < 0 else largest
                raise invalid(f"input {number} has token {wrong}, expected 0 to {self.vocab_size - 1}", param="input")
            if len(sequence) > self.max_length and not truncate:
                raise self._too_long(number, len(sequence))
        return [Tokens(sequence[: self.max_length]) for sequence in ids]

    def _too_long(self, number: int, length: int) -> Refused:
        return Refused(
            400,
            f"input {number} has {length} tokens, at most {self.max_length} are read: set truncate to cut it",
            code="context_length_exceeded",
            param="input",
        )


def _no_tokens(number: int) -> Refused:
    return invalid(f"input {number} has no tokens", param="input")


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    copied = Tokenizer.from_str(tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    return copied


def _tokens(one: Encoding) -> Tokens:
    return Tokens(one.ids, one.type_ids if any(one.type_ids) else None)
