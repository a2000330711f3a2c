"""GGUF files: their header, their tensors as fp32, and the Transformers configuration of the model that they hold.

Every count and offset is checked against the file before it is used: a damaged file raises CheckpointError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fastff.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST = 1 << 24  # entries of a list, tensors, metadata

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Fact = TypeVar("Fact")


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """32 numbers a block of 16 bytes: the lower halves first."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _halves(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


@dataclass(frozen=True)
class BlockType:
    """A tensor type: `numbers` values stored in `bytes` bytes, and how blocks (n, bytes) become values (n, numbers)."""

    name: str
    numbers: int
    bytes: int
    values: Callable[[Bytes], Floats]


TYPES = {
    0: BlockType("F32", 1, 4, lambda blocks: np.ascontiguousarray(blocks).view(np.float32)),
    1: BlockType("F16", 1, 2, _halves),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: shape as Transformers writes it, type, first byte."""

    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.type.numbers * self.type.bytes


class _Cursor:
    """Reads a header; every step is checked against the end of the file."""

    def __init__(self, data: Bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: {size} bytes wanted at byte {self.at} of {len(self.data)}"
            )
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, what: str) -> int:
        number = int(self.scalar("Q"))
        if number > _MOST:
            raise CheckpointError(f"{self.path} claims {number} {what}, at most {_MOST} can be")
        return number

    def text(self) -> str:
        raw = self.take(int(self.scalar("Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} holds text that is not UTF-8 before byte {self.at}") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST and depth < 4:
            element, length = self.scalar("I"), self.count("entries of a list")
            if element in _SCALARS:
                size = struct.calcsize("<" + _SCALARS[element])
                return list(struct.unpack(f"<{length}{_SCALARS[element]}", self.take(length * size)))
            return [self.value(element, depth + 1) for _ in range(length)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} holds metadata of the unknown type {kind}")
        return self.scalar(_SCALARS[kind])


class Gguf(Mapping[str, Tensor]):
    """A GGUF file: `metadata`, and its tensors as fp32 by its own names.

    Raises CheckpointError for a file that is not GGUF, is damaged, or holds a tensor type that is not in `TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        cursor = _Cursor(self._data, path)
        if cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {bytes(self._data[:4])!r}")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}, expected 2 or 3")
        tensors, entries = cursor.count("tensors"), cursor.count("metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = cursor.text()
            self._check_new(name, self.metadata)
            self.metadata[name] = cursor.value(cursor.scalar("I"))
        self._places = self._read_places(cursor, tensors)

    def fact(self, name: str, kind: type[Fact], default: Fact) -> Fact:
        """An entry of the metadata, `default` where there is none. Raises CheckpointError for one of another type, and
        for a number that is not finite."""
        value = self.metadata.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(f"{self.path} says that {name} is {value!r:.80}, expected {kind.__name__}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty where there is none. Raises CheckpointError for another list."""
        found = self.fact(name, list, [])
        if not all(isinstance(text, str) for text in found):
            raise CheckpointError(f"{self.path} says that {name} is a list of more than texts")
        return found

    def _check_new(self, name: str, known: Mapping[str, Any]) -> None:
        if name in known:
            raise CheckpointError(f"{self.path} holds {name!r:.80} twice")

    def _read_places(self, cursor: _Cursor, count: int) -> dict[str, TensorPlace]:
        found = [(cursor.text(), *self._read_place(cursor)) for _ in range(count)]
        alignment = self.fact("general.alignment", int, 32)
        if alignment < 1:
            raise CheckpointError(f"{self.path} has the alignment {alignment!r}")
        data_start = -(-cursor.at // alignment) * alignment
        places: dict[str, TensorPlace] = {}
        for name, shape, kind, offset in found:
            self._check_new(name, places)
            place = TensorPlace(shape, kind, data_start + offset)
            if place.start + place.bytes > len(self._data):
                raise CheckpointError(f"{self.path} is truncated: {name} ends beyond its {len(self._data)} bytes")
            places[name] = place
        return places

    def _read_place(self, cursor: _Cursor) -> tuple[tuple[int, ...], BlockType, int]:
        dimensions = cursor.scalar("I")
        if dimensions > 4:
            raise CheckpointError(f"{self.path} holds a tensor of {dimensions} dimensions, expected at most 4")
        shape = tuple(int(cursor.scalar("Q")) for _ in range(dimensions))[::-1]
        kind, offset = int(cursor.scalar("I")), int(cursor.scalar("Q"))
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise CheckpointError(f"{self.path} holds a tensor of type {kind}, which is none of {known}")
        if not shape or 0 in shape or shape[-1] % TYPES[kind].numbers:
            raise CheckpointError(f"{self.path} holds {TYPES[kind].name} rows of {shape}, not whole blocks")
        return shape, TYPES[kind], offset

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        raw = self._data[place.start : place.start + place.bytes].reshape(-1, place.type.bytes)
        with np.errstate(all="ignore"):  # of damaged scales
            values = np.array(place.type.values(raw), dtype=np.float32).reshape(place.shape)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path} holds NaN or infinite values in {name}")
        return torch.from_numpy(values)

    def type_of(self, name: str) -> str:
        """Of a tensor, without reading it: a name of `TYPES`."""
        return self._places[name].type.name

    def blocks(self, name: str) -> Tensor:
        """A matrix as it is stored: (rows, blocks of a row, bytes of a block) uint8."""
        place = self._places[name]
        rows, inputs = place.shape
        raw = self._data[place.start : place.start + place.bytes]
        return torch.from_numpy(np.array(raw).reshape(rows, inputs // place.type.numbers, place.type.bytes))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._places[name].shape

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# ---- models ----

_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
_FIELDS = {  # of a configuration, by the name in the metadata behind the architecture's
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_TENSORS = {  # Transformers' names by GGUF's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PAIRED = ("llama", "mistral")  # whose queries and keys GGUF stores with the two numbers of a rotated pair side by side


def configuration(gguf: Gguf) -> Any:
    """The Transformers configuration of the model. Raises CheckpointError for an unknown or incomplete one."""
    architecture = gguf.fact("general.architecture", str, "")
    if architecture not in _CONFIGS:
        raise CheckpointError(
            f"{gguf.path} holds a model of architecture {architecture!r}, expected {', '.join(_CONFIGS)}"
        )
    given = {
        field: _positive(gguf, f"{architecture}.{name}")
        for name, field in _FIELDS.items()
        if f"{architecture}.{name}" in gguf.metadata
    }
    missing = [name for name in _REQUIRED if name not in given]
    if missing or "token_embd.weight" not in gguf:
        raise CheckpointError(f"{gguf.path} lacks {', '.join(missing) or 'token_embd.weight'}")
    if given["num_hidden_layers"] > len(gguf):
        raise CheckpointError(f"{gguf.path} claims {given['num_hidden_layers']} blocks and holds {len(gguf)} tensors")
    theta = _theta(gguf, architecture)
    try:
        config = _CONFIGS[architecture](
            **given,
            vocab_size=gguf.shape_of("token_embd.weight")[0],
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings="output.weight" not in gguf,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{gguf.path} describes no model: {error}") from error
    _check_rotation(gguf, architecture, config)
    return config


def _positive(gguf: Gguf, name: str) -> float:
    kind: type = float if name.endswith("_epsilon") else int
    number: float = gguf.fact(name, kind, 0)
    if not 0 < number < 1 << 31:
        raise CheckpointError(f"{gguf.path} says that {name} is {number}, expected above 0 and below 2**31")
    return number


def _theta(gguf: Gguf, architecture: str) -> float:
    theta = gguf.fact(f"{architecture}.rope.freq_base", float, 10000.0)
    if theta <= 0:
        raise CheckpointError(f"{gguf.path} rotates by the base {theta}, expected above 0")
    return theta


def _check_rotation(gguf: Gguf, architecture: str, config: Any) -> None:
    """Raises CheckpointError for a rotation that is scaled, or of a part of a head only."""
    scaling = gguf.fact(f"{architecture}.rope.scaling.type", str, "none")
    factors = [gguf.fact(f"{architecture}.rope.{name}", float, 1.0) for name in ("scaling.factor", "scale_linear")]
    if scaling != "none" or not {*factors} <= {0.0, 1.0} or "rope_freqs.weight" in gguf:
        raise CheckpointError(
            f"{gguf.path} scales its rotation ({scaling}, {max(factors)}), which is read from Transformers' files only"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = gguf.fact(f"{architecture}.rope.dimension_count", int, head)
    if rotated != head:
        raise CheckpointError(f"{gguf.path} rotates {rotated} of the {head} numbers of a head, expected all")


class GgufWeights(Mapping[str, Tensor]):
    """A GGUF model's tensors by Transformers' names, each read when it is asked for."""

    def __init__(self, gguf: Gguf, config: Any) -> None:
        self._gguf, self._config = gguf, config
        self._names: dict[str, str] = {}
        for own in gguf:
            name = _transformers_name(own)
            if name is None:
                raise CheckpointError(f"{gguf.path} holds {own!r:.80}, which is not among the engine's tensors")
            self._names[name] = own

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        return self._arranged(name, self._gguf[self._names[name]])

    def type_of(self, name: str) -> str:
        """A name of `TYPES`."""
        return self._gguf.type_of(self._names[name])

    def blocks(self, name: str) -> Tensor:
        """`Gguf.blocks` with the rows in Transformers' order."""
        return self._arranged(name, self._gguf.blocks(self._names[name]))

    def _arranged(self, name: str, tensor: Tensor) -> Tensor:
        if self._config.model_type in _PAIRED and any(part in name for part in ("q_proj", "k_proj")):
            heads = self._config.num_attention_heads if "q_proj" in name else self._config.num_key_value_heads
            return _halves_apart(tensor, heads)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _transformers_name(own: str) -> str | None:
    stem, _, kind = own.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _TENSORS:
        return f"model.layers.{parts[1]}.{_TENSORS[parts[2]]}.{kind}"
    return None


def _halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs side by side to all first numbers, then all second ones."""
    if tensor.shape[0] % (2 * heads):
        raise CheckpointError(f"{tensor.shape[0]} rows are not {heads} heads of pairs")
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
