"""The tokenizer that a GGUF file carries, as Transformers' own: byte-level BPE from its tokens and merges."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastff.engine.gguf import Gguf
from fastff.errors import CheckpointError

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


def tokenizer_of(gguf: Gguf) -> Any:
    """Raises CheckpointError for a vocabulary of another kind, or one that does not fit the model."""
    data = {
        name.removeprefix("tokenizer."): value for name, value in gguf.metadata.items() if name.startswith("tokenizer.")
    }
    kind, cut = data.get("ggml.model"), data.get("ggml.pre", "default")
    if kind != "gpt2" or cut not in _CUTS:
        raise CheckpointError(
            f"{gguf.path} carries a tokenizer of kind {kind!r}, {cut!r}: expected 'gpt2' with one of {', '.join(_CUTS)}"
        )
    tokens, merges = data.get("ggml.tokens", []), data.get("ggml.merges", [])
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{gguf.path} carries merges that do not fit its vocabulary: {error}") from error
    tokenizer.pre_tokenizer = _CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = data.get("ggml.token_type", [])
    special = [token for token, of in zip(tokens, kinds, strict=False) if of == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = [token for token, of in zip(tokens, kinds, strict=False) if of == _OWN]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_token(tokens, data.get("ggml.bos_token_id")),
        eos_token=_token(tokens, data.get("ggml.eos_token_id")),
        chat_template=data.get("chat_template"),
    )


def _token(tokens: list[str], number: Any) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
