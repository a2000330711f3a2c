"""Files of the native engine and GGUF files: what they hold is read back, and damage is told, never crashed on."""

from __future__ import annotations

import json
import locale
import os
import random
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch

from encoder_cases import exported as exported_encoder
from engine_cases import conditional_model, exported, held, random_model
from fastff.convert.dense_model import load_dense
from fastff.engine import decoders, native_export
from fastff.engine.decoders import BODY
from fastff.engine.encoder_heads import HEAD_FILE, read_head
from fastff.engine.facts import (
    FACTS_FILE,
    MODEL_FILE,
    DecoderFacts,
    EncoderFacts,
    HeadFacts,
    HeadLayer,
    read_facts,
    write_facts,
)
from fastff.engine.generate import Engine
from fastff.engine.gguf import TYPES, Gguf, GgufWeights, configuration
from fastff.engine.gguf_tokenizer import tokenizer_of
from fastff.engine.gguf_write import requantise, write_gguf
from fastff.engine.native_file import fnv1a
from fastff.errors import CheckpointError, FastffError
from fastff.io import write_tensors
from fastff.ops.native_encoder import NativeEncoder
from fastff.ops.native_model import NativeModel, NativeSession
from fuzzing import altered, damage, error_of, put

MUTATIONS = 2000
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


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q8_0", "int8"), ("Q8_0", "int4")])
def test_blocks_of_gguf_are_kept(kind, bits, tmp_path):
    """Against the model with the file's own numbers: nothing is rounded again, the prediction of words included."""
    model = llama_gguf(tmp_path / "llama.gguf", kind)
    gguf = Gguf(tmp_path / "llama.gguf")
    model.load_state_dict(dict(GgufWeights(gguf, configuration(gguf))), strict=False)
    native_export.export_gguf(tmp_path / "llama.gguf", tmp_path / "out", bits=bits)
    for block in model.model.layers:  # rows that are not whole blocks, which the file has in fp32
        block.mlp.down_proj.weight.data = held(block.mlp.down_proj.weight.data, BODY[bits]).float()
    ids = [5, 200, 31, 7, 99, 12]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    assert (Engine(tmp_path / "out").logits(ids) - want).std() < 1.2e-3 * want.std()  # x has 16 bits


def test_a_conversion_reads_gguf_files_too(tmp_path):
    model = llama_gguf(tmp_path / "llama.bin")
    dense, _, kind = load_dense(str(tmp_path / "llama.bin"), gguf=True)
    ids = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        assert (dense(ids).logits - model.eval()(ids).logits).abs().max() < 1e-4
    assert kind == "causal"
    llama_gguf(tmp_path / "other.gguf", **{"general.architecture": "rwkv"})
    with pytest.raises(CheckpointError, match="architecture 'rwkv', expected llama"):
        load_dense(str(tmp_path / "other.gguf"))


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


@pytest.fixture
def small_gguf(tmp_path):
    path = tmp_path / "llama.gguf"
    llama_gguf(path, "Q8_0")
    return path


def test_damaged_gguf_files_raise_nothing_but_our_errors(small_gguf):
    refused = 0
    for number in damage(small_gguf, MUTATIONS, seed=1):
        try:
            gguf = Gguf(small_gguf)
            config = configuration(gguf)
            if number % 20 == 0:
                tokenizer_of(gguf)
            decoders.describe(config, GgufWeights(gguf, config))
            for name in list(gguf)[:: 5 + number % 20]:
                assert gguf[name].dtype == torch.float32
        except CheckpointError:
            refused += 1
    assert refused > MUTATIONS // 4


ARCHITECTURE, OF_TOKENS = "general.architecture", "tokenizer.ggml."


@pytest.mark.parametrize("value", [None, -1, 0, 3, 2**31, 2.0, float("nan"), "x", True, [1, 2], ["a"] * 300, []])
@pytest.mark.parametrize(
    "name",
    [
        ARCHITECTURE,
        *("general.alignment", "tokenizer.chat_template"),
        *(f"llama.{name}" for name in ("block_count", "embedding_length", "attention.head_count", "context_length")),
        *(f"llama.rope.{name}" for name in ("freq_base", "scaling.type", "scaling.factor", "dimension_count")),
        *(f"llama.attention.{name}" for name in ("head_count_kv", "key_length", "layer_norm_rms_epsilon")),
        *(f"{OF_TOKENS}{name}" for name in ("model", "pre", "tokens", "token_type", "merges")),
        *(f"{OF_TOKENS}{name}" for name in ("eos_token_id", "bos_token_id", "add_bos_token")),
    ],
)
def test_gguf_metadata_of_any_value(name, value, gguf_with, tmp_path):
    """2**31 blocks, say, which would be looked for until memory ends; whatever passes is exported and runs."""
    path = gguf_with({name: value})
    error = error_of(lambda: native_export.export_gguf(path, tmp_path / "out"))
    if error is None:
        Engine(tmp_path / "out").logits([1, 2])
    else:
        assert isinstance(error, CheckpointError)
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def gguf_with(tmp_path_factory):
    """Makes the small Llama's file with some metadata replaced, without making the model again."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    llama_gguf(path)
    whole = Gguf(path)
    tensors = {name: (whole[name], "F32") for name in whole}

    def make(changes):
        metadata = {name: value for name, value in (whole.metadata | changes).items() if value is not None}
        write_gguf(path.with_name("changed.gguf"), metadata, tensors)
        return path.with_name("changed.gguf")

    return make


@pytest.mark.parametrize("shape", [(), (0,), (0, 32), (2**63, 0), (32, 2**62, 2**62), (2**64 - 1,)])
@pytest.mark.parametrize("kind", [0, 8])
def test_gguf_tensors_of_impossible_shapes_are_refused(kind, shape, tmp_path):
    path = tmp_path / "t.gguf"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"x" + struct.pack("<I", len(shape))
    path.write_bytes(head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, 0) + bytes(512))
    with pytest.raises(CheckpointError, match=r"not whole blocks|truncated"):
        Gguf(path)


def test_gguf_names_that_stand_twice_or_mean_nothing_are_refused(small_gguf, tmp_path):
    raw = small_gguf.read_bytes()
    assert raw.count(b"blk.1.ffn_up") == 1
    for old, new, message in (
        (b"blk.1.ffn_up", b"blk.0.ffn_up", "'blk.0.ffn_up.weight' twice"),
        (b"blk.1.ffn_up", b"blk.1.ffn_xx", "not among the engine's tensors"),
        (b"tokenizer.ggml.model", b"llama.context_length", "'llama.context_length' twice"),
    ):
        small_gguf.write_bytes(raw.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=message):
            native_export.export_gguf(small_gguf, tmp_path / "out")


def test_texts_begin_with_a_token_of_their_own_where_the_file_says_so(gguf_with, tmp_path):
    begin = {f"{OF_TOKENS}bos_token_id": 298}
    for changes, starts in (
        (begin, False),
        (begin | {f"{OF_TOKENS}add_bos_token": True}, True),
        (begin | {f"{OF_TOKENS}pre": "llama-bpe"}, True),
        (begin | {f"{OF_TOKENS}pre": "llama-bpe", f"{OF_TOKENS}add_bos_token": False}, False),
    ):
        native_export.export_gguf(gguf_with(changes), tmp_path / "out")
        ids = Engine(tmp_path / "out").tokenizer.encode("ab")
        assert ids == [298] * starts + [WORDS.index("a"), WORDS.index("b")]
    wrong = {f"{OF_TOKENS}bos_token_id": WORDS.index(":"), f"{OF_TOKENS}add_bos_token": True}
    with pytest.raises(CheckpointError, match="begins texts with ':'"):
        tokenizer_of(Gguf(gguf_with(wrong)))


def test_words_that_the_vocabulary_holds_whole_are_not_merged(gguf_with):
    """As Llama 3's tokenizer, whose merges do not lead to all of its words."""
    words = ["ab" if word == "w0" else word for word in WORDS]
    for cut, found in (("llama-bpe", ["ab"]), ("gpt-2", ["a", "b"])):
        made = tokenizer_of(Gguf(gguf_with({f"{OF_TOKENS}pre": cut, f"{OF_TOKENS}tokens": words})))
        assert made.encode("ab") == [words.index(word) for word in found]


class TestModelFile:
    def raw(self):
        return (exported("llama")[2] / MODEL_FILE).read_bytes()

    def opened(self, path, raw):
        put(path, raw)
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
            (b'"layers":2', b'"layers":3', "2 feedforwards, expected one for each of 3 layers"),
            (b'"layers":2', b'"layers":0', "layers 0 is not 1 to 4096"),
            (b'"hidden":64', b'"hidden":65', r"is \[64\], expected \[65\]"),
            (b'"vocab_size":300', b'"vocab_size":1e9', "vocab_size 1000000000"),
            (b'"key_heads":2', b'"key_heads":3', "no multiple"),
            (b'"rotated":16', b'"rotated":15', "odd"),
            (b'"head_dim":16', b'"head_dim":1.5', "not a whole number"),
            (b'"activation":5', b'"activation":9', "activation 9 is not 0 to 6"),
            (b'"feedforwards"', b'"feedforward_"', "lacks 'feedforwards'"),
            (b'"layers.1.attention_norm.weight"', b'"layers.9.attention_norm.weight"', "layers.1.att.* is missing"),
            (b'"gated":true', b'"gated":null', "not true or false"),
            (b'"type":"int8"', b'"type":"int2"', "int2, expected int8, int8-groups, int8-groups64, int4"),
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
        with pytest.raises(FastffError, match="cannot be read"):
            NativeModel(tmp_path / os.fsdecode(b"missing\xff"))  # a name that is not UTF-8

    def test_a_host_that_writes_numbers_with_commas(self, tmp_path, monkeypatch):
        source, made = tmp_path / "commas", tmp_path / "xx_XX"
        numeric = 'LC_NUMERIC\ndecimal_point ","\nthousands_sep ""\ngrouping -1\nEND LC_NUMERIC\n'
        others = ("CTYPE", "COLLATE", "MONETARY", "MESSAGES", "TIME", "NAME", "ADDRESS", "TELEPHONE", "PAPER")
        others = (*others, "MEASUREMENT", "IDENTIFICATION")
        source.write_text(numeric + "".join(f'LC_{name}\ncopy "POSIX"\nEND LC_{name}\n' for name in others))
        command = ["localedef", "-c", "-i", source, "-f", "ANSI_X3.4-1968", made]
        if shutil.which("localedef") is not None:
            subprocess.run(command, capture_output=True, check=False)
        if not made.is_dir():  # this form of localedef is glibc's: not on Alpine or macOS
            pytest.skip("no locale can be made here")
        monkeypatch.setenv("LOCPATH", str(tmp_path))
        locale.setlocale(locale.LC_NUMERIC, "xx_XX")
        try:
            assert locale.localeconv()["decimal_point"] == ","
            run_decoder(exported("llama")[2] / MODEL_FILE)
        finally:
            locale.setlocale(locale.LC_NUMERIC, "C")


def rewritten(path, whole, header):
    """The file with another header and the checksum made right for it."""
    size = int.from_bytes(whole[8:16], "little")
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(size)
    body = whole[24 + size :] if len(text) == size else bytes(-(24 + len(text)) % 64) + whole[24 + size :]
    path.write_bytes(whole[:8] + len(text).to_bytes(8, "little") + fnv1a(text).to_bytes(8, "little") + text + body)


def run_decoder(path):
    NativeSession(NativeModel(path), 4, threads=1).feed([1, 2, 3], want_logits=True)


def run_encoder(path):
    NativeEncoder(path).run([1, 2, 3], [2, 1], threads=1)


NATIVE = {
    "llama": (lambda: exported("llama")[2], run_decoder),
    "conditional": (lambda: conditional_model("both", bits="int4")[1], run_decoder),
    "bert": (lambda: exported_encoder("bert")[1]._folder, run_encoder),
    "trees": (lambda: exported_encoder("ours-trees")[1]._folder, run_encoder),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_damaged_model_files_are_refused_or_run(kind, tmp_path):
    """Half of the damage is within a header whose checksum fits, which damage alone would not leave."""
    folder, run = NATIVE[kind]
    path = tmp_path / "model"
    whole = (folder() / MODEL_FILE).read_bytes()
    header = json.loads(whole[24 : 24 + int.from_bytes(whole[8:16], "little")])
    path.write_bytes(whole)
    run(path)
    errors = [error_of(lambda: run(path)) for _ in damage(path, MUTATIONS // 4, seed=2)]
    for content in altered(header, MUTATIONS // 4, seed=3):
        rewritten(path, whole, content)
        errors.append(error_of(lambda: run(path)))
    assert {type(error) for error in errors} == {FastffError, type(None)}
    assert sum(error is not None for error in errors) > MUTATIONS // 4


def test_a_small_file_does_not_ask_for_large_tables_of_angles(tmp_path):
    whole = (exported_encoder("modernbert")[1]._folder / MODEL_FILE).read_bytes()
    header = json.loads(whole[24 : 24 + int.from_bytes(whole[8:16], "little")])
    header["model"] |= {"hidden": 131072, "heads": 1, "positions": 1 << 17}
    rewritten(tmp_path / "model", whole, header)
    with pytest.raises(FastffError, match="8589934592 angles, expected at most 67108864"):
        NativeEncoder(tmp_path / "model")


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_scores_are_scaled_by_more_than_nothing(scale, tmp_path):
    whole = (exported("llama")[2] / MODEL_FILE).read_bytes()
    header = json.loads(whole[24 : 24 + int.from_bytes(whole[8:16], "little")])
    header["model"]["score_scale"] = scale
    rewritten(tmp_path / "model", whole, header)
    with pytest.raises(FastffError, match=f"score_scale {scale:f} is not above 0"):
        NativeModel(tmp_path / "model")


FACTS = {
    "decoder": DecoderFacts([1, 2]),
    "encoder": EncoderFacts("mean", True, HeadFacts("first", [HeadLayer("tanh", None)], ["a"]), 7),
}


@pytest.mark.parametrize("kind", FACTS)
def test_damaged_facts(kind, tmp_path):
    facts, path = FACTS[kind], tmp_path / FACTS_FILE
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path, type(facts)) == facts
    whole = json.loads(path.read_text())

    def load():
        read_facts(tmp_path, type(facts))

    errors = [error_of(load) for _ in damage(path, MUTATIONS // 2, seed=4)]
    for content in altered(whole, MUTATIONS // 2, seed=5):
        path.write_text(json.dumps(content))
        errors.append(error_of(load))
    found = [error for error in errors if error is not None]
    assert all(isinstance(error, CheckpointError) and str(tmp_path) in str(error) for error in found)
    assert len(found) > MUTATIONS // 2


def test_a_classifier_has_a_logit_for_every_label(tmp_path):
    write_tensors(tmp_path / HEAD_FILE, {"0.weight": torch.ones(2, 4)})
    layers = [HeadLayer("identity", None)]
    assert read_head(HeadFacts("first", layers, ["no", "yes"]), tmp_path, 4)(torch.ones(1, 4)).shape == (1, 2)
    with pytest.raises(CheckpointError, match="2 logits, for 3 labels"):
        read_head(HeadFacts("first", layers, ["no", "yes", "maybe"]), tmp_path, 4)


def test_damaged_heads(tmp_path):
    layers = [HeadLayer("gelu", None), HeadLayer("identity", 1e-5), HeadLayer("tanh", None)]
    tensors = {
        "0.weight": torch.ones(3, 4),
        "0.bias": torch.ones(3),
        "1.weight": torch.ones(3),
        "1.bias": torch.ones(3),
    }
    write_tensors(tmp_path / HEAD_FILE, tensors | {"2.weight": torch.ones(2, 3)})

    def load():
        read_head(HeadFacts("first", layers, []), tmp_path, 4)(torch.ones(1, 4))

    load()
    errors = [error_of(load) for _ in damage(tmp_path / HEAD_FILE, MUTATIONS, seed=6)]
    found = [error for error in errors if error is not None]
    assert all(isinstance(error, CheckpointError) and str(tmp_path) in str(error) for error in found)
    assert len(found) > MUTATIONS // 4
