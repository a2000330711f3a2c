"""The native decoder against Transformers: values, order of reading, sessions, limits, and sampling."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastff
from engine_cases import CONFIGS, FEEDFORWARDS, OURS, VOCABULARY, conditional_model, exported, random_model
from fastff.engine import native_export
from fastff.engine.causal_model import CausalModel
from fastff.engine.decoders import describe
from fastff.engine.facts import MODEL_FILE
from fastff.engine.generate import Engine, Sampling, load, pieces
from fastff.errors import CheckpointError, FastffError, FileError
from fastff.ops.native_model import NativeModel, NativeSession
from fastff.text.tokenizer import train_tokenizer, wrap


def tokens(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("name", "bits"), [*((name, "int8") for name in CONFIGS), ("llama", "int4"), ("gpt2", "int4")])
def test_logits_are_those_of_the_model_with_rounded_weights(name, bits):
    engine, model, _ = exported(name, bits)
    ids = tokens(37)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    got = engine.logits(ids)
    error = (got - want).abs().amax() / want.std()
    assert error < 0.02, f"{error:.4f} of a standard deviation"
    assert (got.argmax(1) == want.argmax(1)).all()


def test_every_instruction_set_computes_the_same_model(tile_isa):
    engine, model, _ = exported("llama")
    ids = tokens(21, seed=5)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    assert (engine.logits(ids) - want).abs().amax() / want.std() < 0.02


def test_a_prompt_read_at_once_leaves_the_bits_of_one_read_in_pieces(tile_isa):
    engine, _, _ = exported("qwen3")
    ids = tokens(50)
    whole = engine.logits(ids, threads=2)
    for cuts in ([1] * 50, [7, 1, 30, 12]):
        session, rows, at = engine.session(threads=1), [], 0
        for count in cuts:
            rows.append(session.feed(ids[at : at + count], want_logits=True))
            at += count
        assert torch.equal(torch.cat(rows), whole)


def test_a_prompt_longer_than_one_pass_through_the_layers():
    """More rows than pass together: what a later part sees of an earlier one is in the cache alone."""
    engine, _, _ = exported("llama")
    ids = tokens(96)
    first = engine.logits(ids)
    session = engine.session()
    for token in ids[:95]:
        session.feed([token])
    assert torch.equal(session.feed(ids[95:], want_logits=True)[0], first[95])


def test_attention_over_more_positions_than_are_arranged_at_once(tile_isa):
    engine, model, _ = exported("llama-long")
    ids = tokens(290, seed=2)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    whole, session, at = engine.logits(ids, threads=1), engine.session(), 0
    assert (whole - want).abs().amax() / want.std() < 0.02
    for count in (130, 1, 1, 100, 58):
        assert torch.equal(session.feed(ids[at : at + count], want_logits=True), whole[at : at + count])
        at += count


def test_greedy_tokens_are_those_of_transformers():
    engine, model, _ = exported("llama")
    prompt = tokens(8, seed=3)
    got = list(engine.generate_ids(prompt, max_new_tokens=24))
    with torch.no_grad():
        predicted = model(torch.tensor([prompt + got])).logits[0].argmax(1)
    assert got == predicted[7:-1].tolist()
    assert len(got) == 24


def test_sessions_of_many_threads_have_the_bits_of_one():
    engine, _, _ = exported("llama")
    prompts = [tokens(5 + 3 * i, seed=i) for i in range(8)]
    alone = [list(engine.generate_ids(prompt, max_new_tokens=20)) for prompt in prompts]
    logits = [engine.logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: list(engine.generate_ids(prompt, max_new_tokens=20)), prompts))
        assert together == alone
        for one, other in zip(logits, pool.map(engine.logits, prompts), strict=True):
            assert torch.equal(one, other)


def test_rewound_sessions_go_on_as_new_ones():
    engine, _, _ = exported("llama")
    ids = tokens(40)
    session = engine.session()
    session.feed(ids)
    session.rewind(11)
    assert len(session) == 11
    with pytest.raises(FastffError, match="no token was read"):
        session.sample(Sampling())
    again = session.feed(ids[11:20], want_logits=True)
    assert torch.equal(again, engine.logits(ids[:20])[11:])


def test_tokens_outside_the_vocabulary_and_prompts_too_long_are_refused_unread():
    engine, _, _ = exported("llama")
    session = engine.session(10)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(FastffError, match=f"token {wrong} is outside the vocabulary of 300"):
            session.feed([1, wrong])
    with pytest.raises(FastffError, match="11 tokens after 0 do not fit the session's 10 positions"):
        session.feed([1] * 11)
    assert len(session) == 0
    with pytest.raises(FastffError, match="capacity 97"):
        engine.session(97)
    with pytest.raises(FastffError, match="do not fit"):
        list(engine.generate_ids([1] * 97))
    with pytest.raises(FastffError, match="empty"):
        engine.encode_prompt([])
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        engine.encode_prompt("text")


@pytest.mark.parametrize("wrong", [[2**32 + 5], [-(2**32) + 5], [2**70], [1.5], [[1]], ["a"]])
def test_what_32_bits_would_make_another_token_of_is_refused(wrong):
    session = exported("llama")[0].session()
    for ids in (wrong, [5, *wrong]):
        with pytest.raises(FastffError, match="token"):
            session.feed(ids)
    with pytest.raises(FastffError, match="outside the vocabulary"):
        session.feed_one(2**32 + 5)
    assert len(session) == 0
    with pytest.raises(FastffError, match="token"):
        list(exported("llama")[0].generate_ids(exported("llama")[0].encode_prompt(wrong)))


def test_an_engine_goes_to_another_process_and_is_copied():
    engine = exported("llama")[0]
    for again in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert torch.equal(again.logits([1, 2, 3]), engine.logits([1, 2, 3]))
    with pytest.raises(TypeError, match="NativeSession cannot be copied"):
        copy.copy(engine.session())  # both would free it


def test_a_cache_that_does_not_fit_memory_is_refused(tmp_path):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=32, head_dim=256, max_position_embeddings=1 << 24, **sizes)
    if memory > 16 * 32 * 256 * 4 << 24:
        pytest.skip(f"a memory of {memory} bytes holds the largest cache")
    native_export.export_model(AutoModelForCausalLM.from_config(config), None, tmp_path / "out")
    engine = Engine(tmp_path / "out")
    assert len(list(engine.generate_ids([1, 2], max_new_tokens=3))) == 3
    with pytest.raises(FastffError, match=r"16777216 positions takes \d+ MB, more than the memory of \d+ MB"):
        engine.session()


class TestCallsOfTransformers:
    """Tensors that `generate` of Transformers gives, with the same arguments."""

    def models(self):
        _, model, folder = exported("llama")
        model.generation_config.pad_token_id = 0
        return CausalModel(folder), model

    @pytest.mark.parametrize("options", [{"max_new_tokens": 9}, {"max_length": 17}, {"max_new_tokens": 4, "top_k": 3}])
    def test_greedy_tokens(self, options):
        ours, theirs = self.models()
        ids = torch.tensor([tokens(8, seed=3), tokens(8, seed=4)])
        want = theirs.generate(ids, do_sample=False, **options)
        assert torch.equal(ours.generate(ids, **options), want)
        assert torch.equal(ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options), want)

    def test_padded_prompts_and_stop_tokens(self):
        ours, theirs = self.models()
        ids = torch.tensor([tokens(8, seed=3), [0] * 3 + tokens(5, seed=4)])
        mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
        free = ours.generate(ids, attention_mask=mask, max_new_tokens=9)
        stop = int(free[0, 11])
        ours.engine.stop = frozenset([stop])
        want = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=stop)
        assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=0), want)
        assert int(want[0, 12]) == 0

    def test_drawn_tokens_follow_the_seed_and_are_streamed(self):
        ours, _ = self.models()
        ids, made = torch.tensor([tokens(8, seed=3)]), []

        class Streamer:
            def put(self, value):
                made.extend(value.flatten().tolist())

            def end(self):
                made.append("end")

        torch.manual_seed(5)
        drawn = ours.generate(ids, do_sample=True, temperature=9.0, top_k=0, max_new_tokens=20, streamer=Streamer())
        assert made == [*drawn[0].tolist(), "end"]
        torch.manual_seed(5)
        again = ours.generate(ids, do_sample=True, temperature=9.0, top_k=0, max_new_tokens=20)
        assert torch.equal(again, drawn)
        assert not torch.equal(ours.generate(ids, do_sample=True, temperature=9.0, top_k=0, max_new_tokens=20), drawn)

    def test_what_cannot_be_is_refused(self):
        ours, _ = self.models()
        ids = torch.tensor([[1, 2], [3, 4]])
        for wrong, message in (
            ({"inputs": None}, "input_ids None"),
            ({"inputs": ids.float()}, "float32 are not whole numbers"),
            ({"inputs": ids, "attention_mask": torch.tensor([[1, 0], [1, 1]])}, "pad before the prompts"),
            ({"inputs": ids, "attention_mask": torch.ones(1, 2)}, r"attention_mask \(1, 2\) is not \(2, 2\)"),
            ({"inputs": ids, "max_length": 2}, "leaves no room"),
            ({"inputs": ids, "streamer": object()}, "takes one prompt, not 2"),
        ):
            with pytest.raises(FastffError, match=message):
                ours.generate(**wrong)
        with pytest.raises(TypeError, match="num_beams"):
            ours.generate(ids, num_beams=2)


def test_no_capacity_is_refused():
    with pytest.raises(FastffError, match="capacity 0"):
        exported("llama")[0].session(0)


def test_a_directory_that_no_export_wrote_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("a")
    with pytest.raises(FileError, match="holds files that no export wrote"):
        fastff.export(tmp_path, tmp_path, to="native")
    assert (tmp_path / "mine").read_text() == "a"


def test_generation_ends_where_positions_end():
    engine, _, _ = exported("mistral")
    assert engine.positions == 40  # of the sliding window
    assert len(list(engine.generate_ids(tokens(30), max_new_tokens=100))) == 11


@pytest.mark.parametrize(
    ("kind", "family", "bits"),
    [
        *((kind, "llama", "int8") for kind in [*FEEDFORWARDS, *OURS]),
        *(("mixed", family, "int8") for family in ("qwen2", "gpt2")),
        *((kind, "llama", "int4") for kind in ("wide", "wide-gelu", "mixed", "other", "ours-swiglu")),
    ],
)
def test_feedforwards_of_fastff_are_those_of_the_model(kind, family, bits):
    """Whatever the converter writes, and our own causal family."""
    model, folder = conditional_model(kind, family, bits)
    ids = tokens(30)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    engine = Engine(folder)
    got = engine.logits(ids)
    # Leaves are rounded to 8 bits, and a row of x within them too, after which the next layer may choose another leaf.
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert error.median() < 0.025
    session = engine.session()
    one_by_one = torch.cat([session.feed([token], want_logits=True) for token in ids])
    assert torch.equal(one_by_one, got)


class TestSampling:
    def draws(self, count, **options):
        engine, _, _ = exported("llama")
        session = engine.session()
        session.feed(tokens(6))
        session.seed(options.pop("seed", 0))
        logits = engine.logits(tokens(6))[-1].double()
        return [session.sample(Sampling(**options)) for _ in range(count)], logits

    def test_frequencies_are_the_probabilities(self):
        drawn, logits = self.draws(4000, temperature=3.0)
        want = torch.softmax(logits / 3, 0)
        got = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / 4000
        likely = want > 0.01
        assert likely.sum() >= 5
        assert ((got - want)[likely].abs() < 5 * (want[likely] / 4000).sqrt()).all()

    def test_a_seed_gives_the_same_tokens(self):
        assert self.draws(50, temperature=5.0, seed=7)[0] == self.draws(50, temperature=5.0, seed=7)[0]
        assert self.draws(50, temperature=5.0, seed=7)[0] != self.draws(50, temperature=5.0, seed=8)[0]

    def test_top_k_and_top_p_keep_the_likeliest(self):
        drawn, logits = self.draws(500, temperature=20.0, top_k=3)
        assert set(drawn) == set(logits.topk(3).indices.tolist())
        drawn, logits = self.draws(2000, temperature=5.0, top_p=0.3)
        order = logits.argsort(descending=True)
        sums = torch.softmax(logits / 5, 0)[order].cumsum(0)
        kept = order[: int((sums < 0.3).sum()) + 1].tolist()
        assert set(drawn) == set(kept)
        assert self.draws(3, temperature=1.0, top_k=1)[0] == [int(logits.argmax())] * 3

    def test_nothing_is_drawn_by_an_infinite_logit(self, tmp_path):
        raw = bytearray((exported("llama")[2] / MODEL_FILE).read_bytes())
        header = json.loads(raw[24 : 24 + int.from_bytes(raw[8:16], "little")])
        scales = header["tensors"]["head"]["offset"] + 64 * 64  # of the first panel, behind its numbers
        raw[scales : scales + 4 * 64] = struct.pack("<64f", *[float("inf")] * 64)
        path = tmp_path / "model"
        path.write_bytes(raw)
        session = NativeSession(NativeModel(path), 4)
        session.feed([100, 200])  # whose embeddings are of other panels
        assert session.sample(Sampling()) < 64
        with pytest.raises(FastffError, match="largest logit is infinite"):
            session.sample(Sampling(temperature=1.0))

    def test_a_top_p_below_the_range_of_float_keeps_the_likeliest(self):
        drawn, logits = self.draws(5, temperature=5.0, top_p=1e-60)
        assert drawn == [int(logits.argmax())] * 5

    @pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
    def test_settings_out_of_range_are_refused(self, wrong):
        with pytest.raises(FastffError, match=next(iter(wrong))):
            self.draws(1, **wrong)


def test_a_value_beyond_half_precision_leaves_earlier_tokens_alone(tmp_path):
    model = random_model("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        values = layer.self_attn.v_proj(layer.input_layernorm(model.model.embed_tokens.weight)).abs().amax(1)
        layer.self_attn.v_proj.weight *= 1.15 * 65504 / values.max()
    *others, largest = values.argsort()[[*range(11), -1]].tolist()
    ids = [*others[:7], largest, *others[7:]]
    native_export.export_model(model, None, tmp_path / "out")
    engine = load(tmp_path / "out")
    together = engine.logits(ids)
    assert torch.equal(together[:7], engine.logits(ids[:7]))
    assert together[:7].isfinite().all()
    assert not together[7:].isfinite().any()


class TestExport:
    def test_a_mapped_file_gives_the_same_bits(self):
        engine, _, folder = exported("llama")
        assert torch.equal(load(folder, map=True).logits(tokens(9)), engine.logits(tokens(9)))

    def test_weights_that_are_not_finite_are_refused(self, tmp_path):
        model = random_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        with pytest.raises(CheckpointError, match=r"layers\.1\.up holds NaN"):
            native_export.export_model(model, None, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_models_and_weights_of_another_kind_are_refused(self):
        model = random_model("llama")
        weights = model.state_dict()
        del weights["model.layers.0.self_attn.v_proj.weight"]
        tensors = describe(model.config, weights).tensors
        with pytest.raises(CheckpointError, match=r"v_proj\.weight is missing"):
            tensors["layers.0.qkv"].make()
        model.config.model_type = "bloom"
        with pytest.raises(CheckpointError, match="'bloom' is not one of llama"):
            describe(model.config, weights)

    def test_another_directory_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="fastff export"):
            Engine(tmp_path)


def test_word_pieces_stream_as_the_text_that_they_are_together():
    """Spaces between words and none within them; a prompt of a tokenizer that closes sentences stays open."""
    tokenizer = wrap(train_tokenizer(lambda: ["the sailors sailed, the sails sail"] * 9, 60), 64)
    engine = copy.copy(exported("llama")[0])
    engine.tokenizer = tokenizer
    ids = engine.encode_prompt("The sailor")
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["[CLS]", "the"]
    assert ids == tokenizer.encode("The sailor")[:-1]
    more = tokenizer.encode("sailored the sails, sail", add_special_tokens=False)
    words = tokenizer.convert_ids_to_tokens(more)
    assert any(word.startswith("##") for word in words)
    streamed = "".join(pieces(tokenizer, iter(more), ids))
    assert streamed == " sailored the sails, sail"


@pytest.mark.parametrize("name", ["mini-experts", "mini-dense"])
def test_the_models_that_ship_know_english(name):
    folder = Path(__file__).parents[1] / "models" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    engine = load(folder)
    text = "The morning was cold, and he did not wish to go out of the house. She looked at him and laughed."
    ids = torch.tensor(engine.encode_prompt(text))
    loss = torch.nn.functional.cross_entropy(engine.logits(ids[:-1].tolist()), ids[1:])
    assert loss < 4, "guessing among 4096 word pieces loses 8.3"
    said = "".join(engine.generate("The old man", max_new_tokens=24, threads=1)).split()
    assert len(said) > 12
    assert "##" not in "".join(said)
