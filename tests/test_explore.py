"""The routing explorer: its numbers against the layers themselves, and its page in a browser."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

import fastff.models as fastff_models
from encoder_cases import FLAT, TREES, bert, random_model, roberta
from fastff.cli import run
from fastff.errors import CheckpointError, FastffError
from fastff.explore import ExploreSettings, explorer_page
from fastff.explore.token_routes import Exploration, LayerRoutes, TextTokens, explored
from fastff.inspect import routed_layers
from serve_cases import tokenizer

TEXT = "w1 w2 w3\nw1 w4 </script> w1"


@pytest.fixture(scope="module")
def model():
    return random_model(lambda: fastff_models.make_converted(bert(), [TREES, FLAT]))


def test_routes_are_those_of_the_layers(model):
    words = tokenizer()
    found = explored(model, words, "small", [TEXT, "w9"], max_tokens=100)
    inputs = {}

    def note(name, given):
        inputs[name] = given[0][0]

    layers = routed_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda _, x, n=name: note(n, x)) for name, layer in layers.items()]
    with torch.no_grad():
        model(torch.tensor([words.encode(TEXT)]))
        for hook in hooks:
            hook.remove()
        trees, flat = (layers[layer.name] for layer in found.layers)
        rows = inputs[found.layers[0].name]
        assert torch.equal(found.layers[0].leaf[: len(rows)], trees.route(rows))
        assert torch.allclose(found.layers[0].sureness[: len(rows)], trees.routed(rows).margin)
        rows = inputs[found.layers[1].name]
        assert torch.equal(found.layers[1].leaf[: len(rows)], flat.route(rows))
    assert [(layer.trees, layer.depth, layer.leaves, layer.chosen) for layer in found.layers] == [
        (2, 3, 8, 1),
        (1, 0, 6, 2),
    ]
    assert found.texts[0].pieces == ["[CLS]", "w1", " w2", " w3", "\nw1", " w4", " </script>", " w1", "[SEP]"]
    assert [len(layer.leaf) for layer in found.layers] == [12, 12]
    assert found.left_out == 0


def test_long_texts_pass_in_windows_and_are_cut_where_the_limit_says(model):
    found = explored(model, tokenizer(), "small", ["w1 " * 250, "w2"], max_tokens=230)
    assert [len(text.pieces) for text in found.texts] == [230]  # in windows of the model's 100 positions
    assert found.left_out == 22 + 3


def test_windows_of_a_model_whose_positions_begin_after_the_padding():
    model = random_model(lambda: fastff_models.make_converted(roberta(), [TREES, FLAT]))
    found = explored(model, tokenizer(), "small", ["w1 " * 110], max_tokens=112)  # two beyond a window of 100
    assert [len(text.pieces) for text in found.texts] == [112]


def test_models_and_texts_with_nothing_to_show(model):
    with pytest.raises(CheckpointError, match="no conditional layer"):
        explored(random_model(bert), tokenizer(), "small", ["w1"], max_tokens=10)
    with pytest.raises(ValueError, match="--max-tokens 0"):
        ExploreSettings("model", text=("a",), max_tokens=0)
    words = tokenizer()
    words.backend_tokenizer.post_processor = None
    with pytest.raises(FastffError, match="no token"):
        explored(model, words, "small", [""], max_tokens=10)


def test_the_command_writes_one_file_that_loads_nothing(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "page.html"
    assert run(["explore", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--out", str(out)]) == 0
    page = out.read_text()
    assert "9 tokens, 2 layers" in " ".join(capsys.readouterr().out.split())  # lines break after the path
    assert page.count("</script>") == 2  # none of them from the text
    assert not re.search(r"(src|href)=|https?:|url\(", page)


def large(tokens=10_000, layers=12, trees=36, depth=5):
    """As many tokens as the page promises to be smooth with, of uneven leaves."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for number in range(layers):
        leaf = (torch.rand(tokens, trees, generator=draw) ** 2 * (2**depth - 1)).long()
        margin = torch.rand(tokens, generator=draw)
        made.append(LayerRoutes(f"encoder.{number}.ffn", trees, depth, 2**depth, 1, "margin", leaf, margin))
    router = torch.randint(7, (tokens, 2), generator=draw)
    made.append(LayerRoutes("encoder.12.ffn", 1, 0, 8, 2, "smallest gate", router, torch.rand(tokens, generator=draw)))
    pieces = [f" word{number % 97}" for number in range(tokens - 3)]
    return Exploration("large", [TextTokens("long", pieces), TextTokens("short", ["a", " b", "\nc"])], made, 5)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def shown(browser, tmp_path):
    """Opens the page of an exploration; any error or request of it fails the test."""
    wrong = []

    def show(found, **options):
        path = tmp_path / "page.html"
        path.write_text(explorer_page.page(found))
        page = browser.new_page(**options)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("request", lambda asked: asked.url.startswith("file:") or wrong.append(asked.url))
        page.set_default_timeout(180_000)  # a busy machine is slow to draw
        page.goto(f"file://{path}")
        return page

    yield show
    assert wrong == []


def test_the_page_with_ten_thousand_tokens(shown):
    found = large()
    page = shown(found, viewport={"width": 1200, "height": 900})
    options = page.get_by_role("listbox").get_by_role("option")
    assert 50 < options.count() < 1000  # those in sight, of ten thousand
    page.get_by_role("listbox").focus()
    page.keyboard.press("End")
    layer = found.layers[0]
    last = len(found.texts[0].pieces) - 1
    leaf = int(layer.leaf[last, 0])
    sharing = int((layer.leaf[:, 0] == leaf).sum()) - 1
    said = page.locator("#said").inner_text()
    assert f"leaf {leaf} of layer 0, shared with {sharing:,} tokens" in said
    assert page.locator("[role=option][aria-selected=true]").get_attribute("aria-posinset") == str(last + 1)
    page.keyboard.press("p")
    before = int((layer.leaf[:last, 0] == leaf).nonzero()[-1])
    assert page.locator("[role=option][aria-selected=true]").get_attribute("aria-posinset") == str(before + 1)
    page.locator("#layer").select_option("3")
    page.locator("#slot").select_option("35")
    counts = torch.bincount(found.layers[3].leaf[:, 35], minlength=32)
    assert f"{int((counts == 0).sum())} dead" in page.locator("#load-status").inner_text()
    page.locator("#tree").focus()
    for key in ("+", "+", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert "node 0: 10,000 visits" in page.locator("#tree-status").inner_text()
    page.keyboard.press("ArrowDown")
    assert f"{int(counts[:16].sum()):,} visits" in page.locator("#tree-status").inner_text()
    page.get_by_label("Find a word").fill("word96")
    assert page.locator("#found").inner_text() == "103 tokens"


def test_every_control_has_a_name(shown):
    page = shown(large(tokens=60, layers=1, trees=2))
    for role, name in (("combobox", "Text"), ("combobox", "Layer"), ("combobox", "Tree"), ("searchbox", "Find a word")):
        assert page.get_by_role(role, name=name, exact=True).count() == 1
    assert page.get_by_role("img", name="Tree 1 of 2").count() == 1


def test_a_layer_behind_a_router_on_a_phone_in_the_dark(shown):
    found = large(tokens=60)
    page = shown(found, viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#layer").select_option("12")
    assert page.locator("#tree-title").inner_text() == "Leaves of layer 12"
    assert page.locator("#slot-label").is_hidden()
    page.locator("#text").select_option("1")
    assert page.get_by_role("option").filter(has_text="a").count() >= 1
    page.get_by_text("Every leaf in numbers").click()
    table = page.locator("#load-details tbody tr")
    counts = torch.bincount(found.layers[12].leaf.flatten(), minlength=8)
    assert [int(row.split("\t")[1]) for row in table.all_inner_texts()] == counts.tolist()
    assert "5 tokens were left out" in page.locator("body").inner_text()
