"""The tokenizer that a GGUF file carries, as Transformers' own: byte-level BPE from its tokens and merges."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastff.engine.gguf import Gguf
from fastff.errors import CheckpointError

_AT = "tokenizer.ggml."
_CONTROL, _OWN = 3, 4  # types of tokens that are never parts of words
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


# How text is cut before merging, by the name in the metadata.
_CUTS: dict[str, Callable[[], Any]] = {
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(_LETTERS + r"|\p{N}{1,3}" + _REST),
    "qwen2": lambda: _split(_LETTERS + r"|\p{N}" + _REST),
}
# Whose texts begin with a token of their own, and whose words are not merged where the vocabulary holds them whole.
_WHOLE_WORDS = ("llama-bpe",)


def tokenizer_of(gguf: Gguf) -> Any:
    """Raises CheckpointError for a vocabulary of another kind, or one that does not fit the model."""
    kind, cut = gguf.fact(f"{_AT}model", str, "none"), gguf.fact(f"{_AT}pre", str, "default")
    if kind != "gpt2" or cut not in _CUTS:
        raise CheckpointError(
            f"{gguf.path} carries a tokenizer of kind {kind!r}, {cut!r}: expected 'gpt2' with one of {', '.join(_CUTS)}"
        )
    tokens, merges = gguf.texts(f"{_AT}tokens"), gguf.texts(f"{_AT}merges")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    known = gguf.shape_of("token_embd.weight")[0]
    if len(vocabulary) < len(tokens) or not 0 < len(tokens) <= known:
        raise CheckpointError(
            f"{gguf.path} carries {len(tokens)} tokens, {len(vocabulary)} of them different, for a model of {known}"
        )
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut in _WHOLE_WORDS))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{gguf.path} carries merges that do not fit its vocabulary: {error}") from error
    tokenizer.pre_tokenizer = _CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = gguf.fact(f"{_AT}token_type", list, [])
    special = [token for token, of in zip(tokens, kinds, strict=False) if of == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = [token for token, of in zip(tokens, kinds, strict=False) if of == _OWN]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    first, last = (_token(gguf, tokens, f"{_AT}{name}_token_id") for name in ("bos", "eos"))
    if gguf.fact(f"{_AT}add_bos_token", bool, cut in _WHOLE_WORDS) and first is not None:
        try:
            tokenizer.post_processor = _begun_by(first, vocabulary[first])
        except Exception as error:
            raise CheckpointError(f"{gguf.path} begins texts with {first!r:.80}, which cannot be: {error}") from error
    template = gguf.fact("tokenizer.chat_template", str, "")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=last, chat_template=template or None
    )


def _begun_by(token: str, number: int) -> Any:
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def _token(gguf: Gguf, tokens: list[str], name: str) -> str | None:
    number = gguf.fact(name, int, -1)
    if number >= len(tokens):
        raise CheckpointError(f"{gguf.path} says that {name} is {number}, of {len(tokens)} tokens")
    return tokens[number] if number >= 0 else None
