"""The programs of examples/, each run once on small models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastff.models as fastff_models
from encoder_cases import FLAT, TREES, bert, random_model
from engine_cases import CONFIGS
from serve_cases import serving, tokenizer, write_export

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that the examples use


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a program of examples/ and returns what it prints."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    random_model(lambda: fastff_models.make_converted(bert(), [TREES, FLAT])).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("w1 w2 w3\nw40 w41\nw3 w2 w1\nw60 w61 w62\n")
    return path


def test_search(example, converted, lines):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    best, *others = example("search", converted, lines, "w40 w41").splitlines()
    assert best == "1.000  w40 w41"
    assert len(others) == 3


def test_finetune(example, converted, tmp_path):
    rows = [f"{'low' if n < 35 else 'high'}\tw{n} w{(n * 7) % 70 // 2 + 35 * (n >= 35)}" for n in range(70)]
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    said = example("finetune", converted, tmp_path / "train.tsv", "--out", tmp_path / "out", "--steps", 4, "--batch", 4)
    assert "over 4 steps" in said
    tuned = fastff_models.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert tuned.config.id2label == {0: "high", 1: "low"}


def test_lora(example, lines, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    fastff_models.make_converted(model, [FLAT, None]).save_pretrained(tmp_path / "model")
    tokenizer("").save_pretrained(tmp_path / "model")
    said = example("lora", tmp_path / "model", lines, "--out", tmp_path / "adapter", "--steps", 24, "--lr", "0.02")
    losses = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith("step")]
    assert min(losses[1:]) < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_client(example, tmp_path_factory):
    for kind, words in (("embedding", "96 numbers of length 1.000"), ("causal", "w")):
        with serving(write_export(kind, tmp_path_factory.mktemp(kind))) as (base, _):
            assert words in example("client", "w1 w2", "--url", base)


def test_own_router(example):
    said = example("own_router", "--steps", 60)
    losses = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.7 * losses[0]
