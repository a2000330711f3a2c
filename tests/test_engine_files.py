"""Files of the native engine and GGUF files: what they hold is read back, and damage is told, never crashed on."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch

from engine_cases import exported, random_model
from fastff.engine import native_export
from fastff.engine.generate import Engine
from fastff.engine.gguf import TYPES, Gguf
from fastff.engine.gguf_write import requantise, write_gguf
from fastff.engine.native_file import fnv1a
from fastff.errors import CheckpointError, FastffError
from fastff.ops.native_model import NativeModel

HALF = 2**-11  # relative error of a number in half precision
WORDS = [chr(33 + i) for i in range(94)] + [f"w{i}" for i in range(204)] + ["<s>", "</s>"]


def llama_gguf(path, kind="F32", **metadata):
    """The small Llama as GGUF: its names, and queries and keys with the numbers of a rotated pair side by side."""
    model, names = random_model("llama"), {}
    config = model.config
    for name, tensor in model.model.state_dict().items():
        own = name.replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        own = {"norm.weight": "output_norm.weight"}.get(own, own)
        own = own.replace("self_attn.o_proj", "attn_output").replace("mlp.", "ffn_").replace("_proj.", ".")
        own = own.replace("self_attn.", "attn_").replace("input_layernorm", "attn_norm")
        own = own.replace("post_attention_layernorm", "ffn_norm")
        if "attn_q" in own or "attn_k" in own:
            heads = config.num_attention_heads if "attn_q" in own else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, 64).transpose(1, 2).reshape(tensor.shape)
        names[own] = tensor
    facts = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 112,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.context_length": 96,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.token_type": [1] * 298 + [3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 299,
    }
    kinds = {name: "F32" if tensor.dim() == 1 or tensor.shape[1] % 32 else kind for name, tensor in names.items()}
    write_gguf(path, facts | metadata, {name: (tensor, kinds[name]) for name, tensor in names.items()})
    return model


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F32", 0), ("F16", HALF), ("Q8_0", 1 / 254 + HALF), ("Q4_1", 1 / 15 + 3 * HALF), ("Q4_0", 1 / 8 + HALF)],
)
def test_gguf_tensors_read_back_as_they_were_rounded(kind, error, tmp_path):
    """Relative to a block's largest number: half a step, which Q4_1 has of the whole range, and the scale's rounding.
    Q4_0 has only 7 steps on the side that does not hold the largest."""
    tensor = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    write_gguf(tmp_path / "t.gguf", {"a": [1, 2], "b": "text", "c": True, "d": 0.5}, {"x": (tensor, kind)})
    gguf = Gguf(tmp_path / "t.gguf")
    assert gguf.metadata == {"a": [1, 2], "b": "text", "c": True, "d": 0.5}
    blocks = (gguf["x"] - tensor).reshape(-1, 32).abs().amax(1) / tensor.reshape(-1, 32).abs().amax(1)
    assert error / 8 <= blocks.max() <= error
    write_gguf(tmp_path / "again.gguf", {}, {"x": (gguf["x"], kind)})
    again = Gguf(tmp_path / "again.gguf")["x"]
    assert (again - gguf["x"]).abs().max() <= 1e-3 * tensor.abs().max()


def test_blocks_are_laid_out_as_others_write_them():
    """By hand, from the format's description: scale, then numbers; 4 bits have the lower halves first."""
    half = np.float16(0.5).tobytes()
    q8 = np.frombuffer(half + bytes([1, 255] + [0] * 30), np.uint8)[None]
    assert TYPES[8].values(q8)[0, :3].tolist() == [0.5, -0.5, 0.0]
    q4 = np.frombuffer(half + bytes([0x9A] + [0x88] * 15), np.uint8)[None]
    assert TYPES[2].values(q4)[0, [0, 1, 16]].tolist() == [1.0, 0.0, 0.5]
    q41 = np.frombuffer(half + np.float16(-1).tobytes() + bytes([0x21] + [0] * 15), np.uint8)[None]
    assert TYPES[3].values(q41)[0, [0, 1, 16]].tolist() == [-0.5, -1.0, 0.0]


def test_a_gguf_model_is_the_model_it_was_made_from(tmp_path):
    llama_gguf(tmp_path / "llama.gguf")
    native_export.export_gguf(tmp_path / "llama.gguf", tmp_path / "out")
    engine, ids = Engine(tmp_path / "out"), list(range(20))
    assert torch.equal(engine.logits(ids), exported("llama")[0].logits(ids))
    assert engine.stop == {299}
    assert engine.tokenizer.encode("a!</s>") == [WORDS.index("a"), WORDS.index("!"), 299]
    assert "".join(engine.generate("ab", max_new_tokens=5))


def test_requantised_models_stay_near(tmp_path):
    llama_gguf(tmp_path / "llama.gguf")
    exact = Gguf(tmp_path / "llama.gguf")
    requantise(tmp_path / "llama.gguf", tmp_path / "q8.gguf", "Q8_0")
    again = Gguf(tmp_path / "q8.gguf")
    assert again.metadata == exact.metadata
    for name, tensor in exact.items():
        assert (again[name] - tensor).abs().max() <= 0.004 * tensor.abs().max() * (tensor.dim() > 1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        ({"tokenizer.ggml.pre": "new"}, "'new'"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.block_count": 3}, "missing"),
        ({"tokenizer.ggml.merges": ["x y z"]}, "merges"),
    ],
)
def test_gguf_models_that_are_not_ours_are_refused(metadata, message, tmp_path):
    llama_gguf(tmp_path / "llama.gguf", **metadata)
    with pytest.raises(CheckpointError, match=message):
        native_export.export_gguf(tmp_path / "llama.gguf", tmp_path / "out")


def test_gguf_of_another_type_or_version_is_refused(tmp_path):
    path = tmp_path / "t.gguf"
    write_gguf(path, {}, {"x": (torch.zeros(32), "Q8_0")})
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:4] + struct.pack("<I", 9) + raw[8:])
    with pytest.raises(CheckpointError, match="version 9"):
        Gguf(path)
    at = raw.index(struct.pack("<QI", 32, 8)) + 8
    path.write_bytes(raw[:at] + struct.pack("<I", 14) + raw[at + 4 :])
    with pytest.raises(CheckpointError, match="type 14"):
        Gguf(path)


def test_damaged_gguf_files_raise_nothing_but_our_errors(tmp_path):
    llama_gguf(tmp_path / "llama.gguf", "Q8_0")
    raw, path, chance = (tmp_path / "llama.gguf").read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    header = raw.index(b"blk.1.ffn")  # the interesting bytes come before the tensors
    refused = 0
    for trial in range(150):
        damaged = bytearray(raw)
        if trial % 3 == 0:
            damaged = damaged[: chance.randrange(len(raw))]
        else:
            for _ in range(chance.randrange(1, 5)):
                damaged[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            gguf = Gguf(path)
            for name in gguf:
                assert gguf[name].dtype == torch.float32
        except CheckpointError:
            refused += 1
    assert refused > 75


class TestModelFile:
    def raw(self):
        return (exported("llama")[2] / native_export.MODEL_FILE).read_bytes()

    def opened(self, path, raw):
        path.write_bytes(raw)
        return NativeModel(path, map=False)

    def with_header(self, old, new):
        """The file with its header changed and the checksum made right again."""
        raw = self.raw()
        size = int.from_bytes(raw[8:16], "little")
        header = raw[24 : 24 + size]
        assert old in header
        header = header.replace(old, new, 1)
        header = header.rstrip() + b" " * (size - len(header.rstrip()))
        return raw[:16] + fnv1a(header).to_bytes(8, "little") + header + raw[24 + size :]

    def test_truncated_anywhere(self, tmp_path):
        raw, chance = self.raw(), random.Random(0)
        for length in [0, 7, 23, 24, 100, len(raw) - 4096, *(chance.randrange(len(raw)) for _ in range(20))]:
            with pytest.raises(FastffError):
                self.opened(tmp_path / "m", raw[:length])

    def test_any_damaged_byte_of_the_header_is_found(self, tmp_path):
        raw, chance = self.raw(), random.Random(1)
        size = int.from_bytes(raw[8:16], "little")
        for _ in range(40):
            damaged, at = bytearray(raw), chance.randrange(24 + size)
            damaged[at] ^= 1 << chance.randrange(8)
            with pytest.raises(FastffError, match=r"checksum|fastffM1|does not fit"):
                self.opened(tmp_path / "m", damaged)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (b'"layers":2', b'"layers":3', "layers.2.attention_norm.weight is missing"),
            (b'"layers":2', b'"layers":0', "layers 0 is not 1 to 4096"),
            (b'"hidden":64', b'"hidden":65', r"is \[64\], expected \[65\]"),
            (b'"vocab_size":300', b'"vocab_size":1e9', "vocab_size 1000000000"),
            (b'"key_heads":2', b'"key_heads":3', "no multiple"),
            (b'"rotated":16', b'"rotated":15', "odd"),
            (b'"head_dim":16', b'"head_dim":1.5', "not a whole number"),
            (b'"activation":"swiglu"', b'"activation":"other"', "'other' is not known"),
            (b'"gated":true', b'"gated":null', "not true or false"),
            (b'"type":"int8"', b'"type":"int2"', "int2, expected int8"),
            (b'{"model"', b'{{"model', "not JSON"),
            (b'"tensors"', b'"tensor_"', "lacks 'tensors'"),
        ],
    )
    def test_a_header_that_does_not_fit(self, old, new, message, tmp_path):
        with pytest.raises(FastffError, match=message):
            self.opened(tmp_path / "m", self.with_header(old, new))

    @pytest.mark.parametrize("offset", [b"64000000000", b"-64", b"70"])
    def test_offsets_beyond_the_file(self, offset, tmp_path):
        raw = self.raw()
        old = raw[raw.index(b'"offset":') + 9 :].split(b",", 1)[0]
        with pytest.raises(FastffError, match=r"beyond the file|offset -64|not aligned"):
            self.opened(tmp_path / "m", self.with_header(b'"offset":' + old, b'"offset":' + offset))

    def test_files_that_are_none(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(FastffError, match=str(path)):
                NativeModel(path)
