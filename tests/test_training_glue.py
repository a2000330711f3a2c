"""GLUE from a directory: what is read and refused, how it is scored; and a small run from pretraining to a score."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoConfig, AutoModel

from cli_runner import invoke
from fastff.demo.data import labelled
from fastff.errors import CheckpointError, FileError, TrainingError
from fastff.models import make_converted
from fastff.text.tokenizer import load_tokenizer
from fastff.train import glue as module
from fastff.train import tasks
from fastff.train.glue import encode, glue
from fastff.train.glue_settings import GlueSettings
from fastff.train.pretrain import pretrain
from fastff.train.tasks import TASKS, Rows, load, scores
from training_cases import small, write_text


def write(folder, name, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")


def pairs(folder, name, rows, labels=(0, 1)):
    label = [labels[i % len(labels)] for i in range(rows)]
    texts = [f"text {i}" for i in range(rows)]
    write(folder, name, sentence1=texts, sentence2=texts[::-1], label=label)


def test_official_splits_carry_no_note_and_subsets_do(tmp_path):
    pairs(tmp_path / "RTE", "train", 2490)
    pairs(tmp_path / "RTE", "dev", 277)
    train, dev = load(TASKS["RTE"], tmp_path)
    assert (train.note, dev["dev"].note) == ("", "")
    assert train.texts[0] == ("text 0", "text 2489")
    pairs(tmp_path / "QQP", "train_subset", 30)
    pairs(tmp_path / "QQP", "dev_subset", 20)
    pairs(tmp_path / "QQP", "extra_unassigned", 20)
    pairs(tmp_path / "QQP", "test", 20, labels=(-1,))
    train, dev = load(TASKS["QQP"], tmp_path)
    assert train.note == "subset: 30 of 363846 rows"
    assert {name: rows.note for name, rows in dev.items()} == {"dev": "subset: 20 of 40430 rows"}
    train, _ = load(TASKS["RTE"], tmp_path, limit=9)
    assert train.note == "subset: 9 of 2490 rows"


def test_a_bound_on_train_rows_draws_the_same_rows_and_says_so():
    rows = Rows([(str(i),) for i in range(50)], [0.0] * 50, TASKS["SST-2"].train)
    kept = tasks.at_most(rows, 10, TASKS["SST-2"])
    assert (len(kept), kept.note) == (10, "subset: 10 of 67349 rows")
    assert kept.texts == tasks.at_most(rows, 10, TASKS["SST-2"]).texts != rows.texts[:10]
    assert tasks.at_most(rows, 50, TASKS["SST-2"]) is rows is tasks.at_most(rows, None, TASKS["SST-2"])


def test_without_dev_rows_a_part_of_train_is_taken_off(tmp_path):
    pairs(tmp_path / "QNLI", "train_subset", 200)
    train, dev = load(TASKS["QNLI"], tmp_path)
    assert (len(train), len(dev["dev"])) == (180, 20)
    assert not set(train.texts) & set(dev["dev"].texts)
    assert dev["dev"].note == "20 rows split from train"
    assert load(TASKS["QNLI"], tmp_path)[1]["dev"].texts == dev["dev"].texts
    assert load(TASKS["QNLI"], tmp_path, limit=5)[1]["dev"].note == "5 rows split from train"


def test_both_dev_splits_of_mnli(tmp_path):
    pairs(tmp_path / "MNLI", "train_subset", 9, labels=(0, 1, 2))
    for split in ("dev_matched", "dev_mismatched"):
        pairs(tmp_path / "MNLI", split, 6, labels=(0, 1, 2))
    assert sorted(load(TASKS["MNLI"], tmp_path)[1]) == ["dev_matched", "dev_mismatched"]


def test_the_hub_gives_the_same_rows(monkeypatch):
    table = {"question": ["a", "b"], "sentence": ["c", "d"], "label": [0, 1]}

    def load_dataset(path, name):
        assert (path, name) == ("nyu-mll/glue", "qnli")
        return {"train": table, "validation": table, "test": {**table, "label": [-1, -1]}}

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, dev = load(TASKS["QNLI"], None)
    assert train.texts == dev["dev"].texts == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence1": ["a"], "label": [0]}, "has no column sentence2, only sentence1, label"),
        ({"sentence1": ["a"], "sentence2": ["b"], "label": [2]}, "1 labels such as 2; RTE needs labels from 0 to 1"),
        ({"sentence1": ["a"], "sentence2": ["b"], "label": pyarrow.array([None], "int8")}, "1 labels such as None"),
        ({"sentence1": [], "sentence2": [], "label": []}, "has no rows"),
    ],
)
def test_tables_that_do_not_fit_are_named(columns, message, tmp_path):
    write(tmp_path / "RTE", "train", **columns)
    with pytest.raises(TrainingError, match=message):
        load(TASKS["RTE"], tmp_path)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(TrainingError, match="WNLI is not a directory"):
        load(TASKS["WNLI"], tmp_path)
    (tmp_path / "WNLI").mkdir()
    with pytest.raises(TrainingError, match=r"WNLI holds no train.parquet"):
        load(TASKS["WNLI"], tmp_path)
    pairs(tmp_path / "WNLI", "dev", 4)
    with pytest.raises(TrainingError, match="WNLI has no train rows"):
        load(TASKS["WNLI"], tmp_path)
    (tmp_path / "WNLI" / "train.parquet").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"train.parquet cannot be read"):
        load(TASKS["WNLI"], tmp_path)


def test_scores_by_hand():
    wanted, predicted = [1, 1, 1, 0, 0, 0], np.array([1, 1, 0, 0, 0, 1])
    assert scores(TASKS["MRPC"], predicted, wanted) == {
        "accuracy": pytest.approx(200 / 3),
        "f1": pytest.approx(200 / 3),
    }
    assert scores(TASKS["CoLA"], predicted, wanted) == {"matthews": pytest.approx(100 / 3)}
    found = scores(TASKS["STS-B"], np.array([1.0, 2.0, 4.0]), [1.0, 3.0, 3.5])
    pearson = (-4 / 3 * -1.5 + -1 / 3 * 0.5 + 5 / 3 * 1.0) / math.sqrt(42 / 9 * 3.5)
    assert found == {"pearson": pytest.approx(100 * pearson), "spearman": pytest.approx(100)}
    assert tasks.mean(found) == pytest.approx((found["pearson"] + 100) / 2)


def test_a_correlation_that_does_not_exist_is_no_number():
    found = scores(TASKS["STS-B"], np.zeros(3), [1.0, 2.0, 3.0])
    assert found == {"pearson": None, "spearman": None}
    assert tasks.mean(found) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("CoLA", "AX")}, "tasks AX: expected some of CoLA, SST-2"),
        ({"tasks": ()}, "tasks none"),
        ({"seeds": 0}, "seeds 0 is not above 0"),
        ({"layer_lr_scale": -0.5}, "layer_lr_scale -0.5 is below 0"),
    ],
)
def test_settings_out_of_range(changes, message, tmp_path):
    with pytest.raises(TrainingError, match=message):
        GlueSettings(model="m", out=tmp_path, **changes)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A tiny model pretrained on bundled text, fine-tuned to tell two authors apart in the form of SST-2."""
    folder = tmp_path_factory.mktemp("glue")
    text = write_text(folder)
    pretrain(small(folder / "run", text, steps=30, batch=16, micro_batch=16, seq_len=32, vocab_size=1000, lr=3e-3))
    for split, source in (("train", "authors-learn.tsv.xz"), ("dev", "authors-unseen.tsv.xz")):
        rows = [(a, s) for a, s in labelled(source) if a in ("Cbronte", "Doyle")][: 240 if split == "train" else 60]
        authors, sentences = zip(*rows, strict=True)
        write(folder / "data" / "SST-2", split, sentence=sentences, label=[int(a == "Doyle") for a in authors])
    model = str(folder / "run" / "model")
    settings = GlueSettings(
        model=model,
        out=folder / "scores",
        data=folder / "data",
        tasks=("SST-2",),
        seeds=2,
        epochs=2,
        lr=1e-3,
        cpu=True,
    )
    return settings, glue(settings)


def test_from_bundled_text_to_a_score(scored):
    settings, summary = scored
    found = summary["tasks"]["SST-2"]
    assert len(found["scores"]) == 2
    assert found["least"] <= found["median"] <= found["greatest"]
    assert found["median"] == summary["mean"] > 50
    assert "train subset: 240 of 67349 rows" in found["note"]
    assert not summary["comparable_with_published"]
    record = json.loads((settings.out / "SST-2" / "seed-1.json").read_text())
    wanted = load(TASKS["SST-2"], settings.data)[1]["dev"].labels
    assert record["dev"]["dev"]["accuracy"] == pytest.approx(
        100 * sum(p == w for p, w in zip(record["dev"]["dev"]["predictions"], wanted, strict=True)) / len(wanted)
    )


def test_a_second_run_makes_only_what_is_missing_and_the_same(scored, monkeypatch):
    settings, summary = scored
    (settings.out / "SST-2" / "seed-1.json").unlink()
    made = []
    fine_tune = module.fine_tune

    def counted(*arguments):
        made.append(arguments[4])
        return fine_tune(*arguments)

    monkeypatch.setattr(module, "fine_tune", counted)
    assert glue(settings) == summary
    assert made == [1]


def test_another_model_under_the_same_name_is_another_scoring(scored, tmp_path):
    """Its scores would stand beside those of the first; a folder of an earlier version says nothing of the content."""
    model, out = tmp_path / "model", tmp_path / "scores"
    shutil.copytree(scored[0].model, model)
    settings = replace(scored[0], model=str(model), out=out)
    module.claim(settings)
    module.claim(settings)
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    with pytest.raises(FileError, match="model_sha256"):
        module.claim(settings)
    kept = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({k: v for k, v in kept.items() if k != "model_sha256"}))
    module.claim(settings)


def test_so_many_updates_whatever_the_epochs(scored, tmp_path):
    settings, _ = scored
    of = replace(settings, out=tmp_path, epochs=None, steps=3, seeds=1)
    glue(of)
    record = json.loads((tmp_path / "SST-2" / "seed-0.json").read_text())
    assert (record["steps"], record["epochs"]) == (3, None)
    before = json.loads((settings.out / "SST-2" / "seed-0.json").read_text())
    assert (before["steps"], before["epochs"]) == (2 * 240 / settings.batch, 2)
    assert [step for step, _ in record["curve"]] == [1, 2, 3]
    assert len(before["curve"]) == 10, "ten parts of a longer one"
    assert before["curve"][0][1] > before["curve"][-1][1] > 0, "it learns"
    with pytest.raises(TrainingError, match="epochs 2 and steps 3: only one"):
        replace(settings, steps=3)


@pytest.mark.parametrize("layer_lr_scale", [0.0, 1e-6, 1.0])
def test_conditional_layers_learn_at_a_rate_of_their_own(scored, tmp_path, monkeypatch, layer_lr_scale):
    settings, _ = scored
    load_model, models = module.load_model, []

    def kept(*arguments):
        model, tokenizer = load_model(*arguments)
        models.append((model, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", kept)
    glue(replace(settings, out=tmp_path, epochs=None, steps=2, seeds=1, layer_lr_scale=layer_lr_scale))
    (model, before) = models[0]
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in model.state_dict().items()}
    assert moved["encoder.layers.0.attention.qkv.weight"] > 1e-4
    for name in ("w_in", "w_out"):
        at_least, at_most = {0.0: (0.0, 0.0), 1e-6: (1e-12, 1e-8), 1.0: (1e-4, 1e-2)}[layer_lr_scale]
        assert at_least <= moved[f"encoder.layers.0.feedforward.{name}"] <= at_most


@pytest.mark.parametrize("model_type", ["bert", "ultrafastbert"])
def test_a_converted_model_is_fine_tuned(scored, tmp_path, model_type):
    settings, _ = scored
    tokenizer = load_tokenizer(settings.model)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "ultrafastbert":
        sizes["feedforward"] = {"kind": "dense", "intermediate_size": 8}
    dense = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, max_position_embeddings=32))
    tree = {"kind": "fff", "depth": 3, "bias": True}
    make_converted(dense, (tree, tree)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    of = replace(settings, model=str(tmp_path / "model"), out=tmp_path, epochs=None, steps=2, seeds=1, dropout=0.25)
    assert glue(of)["mean"] is not None
    model, _ = module.load_model(of, TASKS["MNLI"])
    assert model.config.num_labels == 3
    dropout = model.config.hidden_dropout_prob
    assert dropout == (0.25 if model_type == "ultrafastbert" else 0.1)


def test_the_command_prints_notes_and_refuses_another_recipe(scored):
    settings, _ = scored
    words = ["glue", settings.model, "--out", settings.out, "--data", settings.data, "--task", "SST-2", "--cpu"]
    words += ["--seeds", 2, "--epochs", 2]

    def run(*more):
        return invoke((*words, *more))

    done = run("--lr", "1e-3")
    assert done.exit_code == 0, done.output
    assert "subset: 240 of 67349 rows" in done.output
    assert "not comparable with published GLUE scores" in done.output
    assert "lr 0.001 there, 0.002 asked for" in run("--lr", "2e-3").output


def test_a_model_and_a_tokenizer_that_do_not_fit(scored, tmp_path):
    settings, _ = scored
    folder = tmp_path / "model"
    shutil.copytree(settings.model, folder)
    changed = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"vocab_size": 999}, "has 1000 entries, its model 999"),
        ({"pad_token_id": 3}, "pads with 0, its model with 3"),
    ):
        (folder / "config.json").write_text(json.dumps({**changed, **changes}))
        with pytest.raises(TrainingError, match=message):
            module.load_model(GlueSettings(model=str(folder), out=tmp_path), TASKS["SST-2"])
    (folder / "config.json").write_text(json.dumps({**changed, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="expected"):
        module.load_model(GlueSettings(model=str(folder), out=tmp_path), TASKS["SST-2"])


def test_a_model_that_is_not_there_is_named(tmp_path):
    for model in (str(tmp_path / "runs" / "model"), "/model-of-nobody", "some/runs/model"):
        with pytest.raises(TrainingError, match=rf"model {model} is neither a directory nor a name of the hub"):
            module.load_model(GlueSettings(model=model, out=tmp_path), TASKS["SST-2"])


def test_sentences_longer_than_the_positions_are_cut_and_counted(scored):
    settings, _ = scored
    rows = Rows([("word " * 50,), ("a word",)], [0, 1], None)
    found, cut = encode(load_tokenizer(settings.model), rows, 32, {"input_ids"})
    assert (len(found["input_ids"][0]), cut) == (32, 1)


def test_models_with_segments_are_told_which_sentence_is_which():
    def tokenizer(first, second, **_):
        rows = [(a.split(), b.split()) for a, b in zip(first, second, strict=True)]
        kinds = [[0] * len(a) + [1] * len(b) for a, b in rows]
        return {"input_ids": [[7] * len(kind) for kind in kinds], "token_type_ids": kinds}

    pairs = Rows([("a word", "two more words")], [1], None)
    assert encode(tokenizer, pairs, 32, {"input_ids"}) == ({"input_ids": [[7] * 5]}, 0)
    found, _ = encode(tokenizer, pairs, 32, {"input_ids", "token_type_ids"})
    assert module._items(found, pairs, TASKS["MRPC"]) == [
        {"input_ids": [7] * 5, "token_type_ids": [0, 0, 1, 1, 1], "label": 1}
    ]
