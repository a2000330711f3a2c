"""The demo on small models: what it shows of those that ship, and what it says of those that do not."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

import fastff.models as fastff_models
from encoder_cases import FLAT, TREES, bert, random_model
from fastff.demo import DemoSettings, demo_page, showcase
from fastff.demo.search import HITS, Searched, agreement
from fastff.demo.shipped_models import Shipped, shipped
from serve_cases import tokenizer, write_export

QUICK = {"sentences": 30, "tokens": 5, "seconds": 0.01}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory as `models/`: a converted encoder, a decoder and its twin, and something else."""
    folder = tmp_path_factory.mktemp("models")
    random_model(lambda: fastff_models.make_converted(bert(), [TREES, FLAT])).save_pretrained(folder / "minilm")
    tokenizer().save_pretrained(folder / "minilm")
    made = write_export("causal", tmp_path_factory.mktemp("causal"))
    made.rename(folder / "novel-experts")
    write_export("causal", tmp_path_factory.mktemp("twin")).rename(folder / "novel-dense")
    (folder / "README.md").write_text("What ships.")
    return folder


def test_what_a_directory_of_models_holds(models, tmp_path):
    assert shipped(models) == Shipped(models / "minilm", models / "novel-experts", models / "novel-dense")
    assert shipped(tmp_path) == shipped(tmp_path / "nothing") == Shipped(None, None, None)


def test_the_whole_demo(models, tmp_path, monkeypatch):
    monkeypatch.setattr(showcase, "dense_embedding", lambda work: models / "minilm")
    monkeypatch.setattr(showcase, "EXPLORED_TOKENS", 200)
    console = Console(record=True, width=120)
    assert demo_page.run_demo(DemoSettings(out=tmp_path, models=models, **QUICK), console) == 0
    said, page = console.export_text(), (tmp_path / "index.html").read_text()
    assert "left out" not in said
    assert "200 tokens, 2 layers" in said
    assert "shares 100 % with the dense one" in page  # it is its own twin here
    assert page.count("tokens a second</h3>") == 2
    assert 'href="explorer.html"' in page
    assert (tmp_path / "explorer.html").is_file()
    assert not re.search(r"https?:|src=", page)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(showcase, "dense_embedding", lambda work: None)
    console = Console(record=True, width=160)
    assert demo_page.run_demo(DemoSettings(out=tmp_path, models=tmp_path / "none", **QUICK), console) == 0
    said = console.export_text()
    assert said.count("left out: ") == 4
    assert "one layer, 128 rows" in said


def test_agreement_counts_shared_hits():
    one, other = (Searched(1.0, [list(range(first, first + HITS))]) for first in (0, 4))
    assert agreement(one, other) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="--tokens 0"):
        DemoSettings(tokens=0)
