"""The documentation site: links of the repository become links of the site, and docstrings' columns lists."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", exc_type=ImportError)
pytest.importorskip("griffe", exc_type=ImportError)

ROOT = Path(__file__).parents[1]
CONFIG = {"repo_url": "https://example.org/repo"}


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("tools.site.pages")


@pytest.mark.parametrize(
    ("target", "home", "here", "wanted"),
    [
        ("quality.md", "docs/layer.md", "layer.md", "quality.md"),
        ("docs/quality.md#small-runs", "README.md", "index.md", "quality.md#small-runs"),
        ("../CONTRIBUTING.md", "docs/layer.md", "layer.md", "contributing.md"),
        ("../experiments/README.md", "docs/quality.md", "quality.md", "log/experiments/README.md"),
        ("small-300m/README.md", "experiments/README.md", "log/experiments/README.md", "small-300m/README.md"),
        ("../csrc/fastff.h", "docs/c-api.md", "c-api.md", "https://example.org/repo/blob/main/csrc/fastff.h"),
        ("https://arxiv.org", "docs/layer.md", "layer.md", "https://arxiv.org"),
        ("#limits", "docs/layer.md", "layer.md", "#limits"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(pages, target, home, here, wanted):
    assert pages.link(target, home, here, CONFIG) == wanted


def test_pictures_in_html_are_found_from_the_address_of_their_page(pages):
    from mkdocs.structure.files import File, Files

    explorer, picture = (File(n, "docs", "site", True) for n in ("explorer.md", "images/explorer-light.png"))
    html = '<img src="images/explorer-light.png"> <a href="https://arxiv.org">'
    made = pages.on_page_markdown(html, SimpleNamespace(file=explorer), CONFIG, Files([explorer, picture]))
    assert made == '<img src="../images/explorer-light.png"> <a href="https://arxiv.org">'


def test_a_link_to_nothing_is_a_warning(pages, caplog):
    with caplog.at_level(logging.WARNING):
        pages.link("nothing.md", "docs/layer.md", "layer.md", CONFIG)
    assert "docs/layer.md links to nothing.md, which is not there" in caplog.text


def test_code_is_left_as_it_is(pages):
    parts = list(pages._split_code("a\n```md\n[x](y.md)\n```\nb\n"))
    assert [text for code, text in parts if code] == ["```md\n[x](y.md)\n```"]


def test_every_command_is_in_the_reference():
    from fastff.cli.reference_page import command_reference

    text = command_reference()
    for name in ("bench", "convert", "demo", "explore", "export", "generate", "glue", "pretrain", "serve"):
        assert f"## fastff {name}" in text
    assert "`--active FLOAT`: Largest share" in text


def test_columns_of_docstrings_become_lists(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    as_list = importlib.import_module("tools.site.columns").as_list
    text = "A layer.\n\ndepth   decisions from root\n        to leaf\ntrees   how many\n\nRaises ShapeError."
    wanted = "A layer.\n\n- `depth`: decisions from root\n  to leaf\n- `trees`: how many\n\nRaises ShapeError."
    assert as_list(text) == wanted


def test_pages_say_the_version_that_they_describe(pages):
    import fastff

    config = pages.on_config(type("Config", (), {})())
    assert config.copyright == f"fastff {fastff.__version__}"
