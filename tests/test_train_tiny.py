"""The demo from end to end in its quick form: results, report, interruption, resumption, unwritable folders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from fastff.demo.data import Corpus
from fastff.train.interrupt import Stop
from fastff.train.schedule import triangle
from train_tiny import settings as sizes
from train_tiny.report_page import render
from train_tiny.run import run_stages
from train_tiny.settings import DENSE, VARIANTS, Settings, equal_work
from train_tiny.store import RunError, Store, write_atomic
from train_tiny.summary import missing_parts, paired, recovered_gap, summarise
from train_tiny.terminal import print_summary
from train_tiny.training import WARMUP, Job, masked_word_model, start_batches, train

SOURCE = Path(__file__).parents[1] / "src"
EXAMPLES = SOURCE.parent / "examples"
QUICK = {"seconds": 270.0, "seed": 0, "quick": True}


def start_demo(out, *options):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, str(EXAMPLES / "train_tiny"), "--quick", "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A quick run stopped while it pretrains: its folder, exit code and output."""
    out = tmp_path_factory.mktemp("demo") / "report"
    process = start_demo(out)
    with process:
        try:
            end = time.monotonic() + 600
            while not (out / "state" / "start.pt").is_file():
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end, "the shared start was not trained within ten minutes"
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            text, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    results = json.loads((out / "results.json").read_text())
    return out, process.returncode, text, results, (out / "index.html").read_text()


@pytest.fixture(scope="module")
def finished(interrupted):
    """The same folder after a second run: exit code, output, results, page."""
    out = interrupted[0]
    process = start_demo(out)
    text, _ = process.communicate(timeout=180)
    return process.returncode, text, json.loads((out / "results.json").read_text()), (out / "index.html").read_text()


class Loads(HTMLParser):
    """Collects whatever a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.found.append(value)
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(f"<{tag}>")


@pytest.mark.slow
def test_an_interrupted_run_leaves_a_partial_report(interrupted):
    _, code, text, results, page = interrupted
    assert code == 130, text
    assert "interrupted" in text
    assert "run the same command again to resume" in " ".join(text.split())
    assert results["speed"]["timings"]
    assert results["summary"]["missing"]
    assert "fine-tuning of FFF 1x9" in results["summary"]["missing"]
    assert "This run was stopped early" in page
    assert "fine-tuning of FFF 1x9" in page
    assert "Speed of one layer" in page


@pytest.mark.slow
def test_a_second_run_goes_on(interrupted, finished):
    code, text, results, page = finished
    assert code == 0, text
    assert "layer speed" not in text, "a finished stage must not run again"
    assert results["speed"] == interrupted[3]["speed"]
    assert results["summary"]["missing"] == []
    assert "stopped early" not in page


@pytest.mark.slow
def test_results_hold_every_number(finished):
    _, _, results, _ = finished
    assert results["settings"] == QUICK
    assert {"cpu", "isa", "torch", "threads", "backends", "commit", "started"} <= set(results["machine"])
    assert set(results["speed"]["times_faster"]) == {f"1x11-hot-{n}-rows-1-threads" for n in (1, 128, 1024)}
    names = {DENSE, "tree", "tree-narrow"}
    assert set(results["pretrain"]) == set(results["finetune"]) == names
    tokens = {(variant["tokens"], variant["steps"]) for variant in results["pretrain"].values()}
    assert len(tokens) == 1, "every variant must see the same tokens"
    for variant in results["pretrain"].values():
        assert 0 < variant["valid_loss"] < 7
        assert len(variant["valid_losses"]) == 48
        assert variant["curve"][-1][0] == variant["steps"]
    tree = results["pretrain"]["tree"]
    assert (tree["active_neurons"], tree["neurons"]) == (10, 1023)
    assert tree["flops_per_token"] == results["pretrain"]["tree-narrow"]["flops_per_token"]
    assert len(tree["routing"]) == sizes.LAYERS
    assert len(tree["fill"]["masks"]) == 2
    for author in (*results["finetune"].values(), *results["baselines"].values()):
        assert sum(map(sum, author["confusion"])) == author["sentences"] == 160
        right = sum(author["confusion"][i][i] for i in range(8))
        assert author["accuracy"] == pytest.approx(right / 160)


@pytest.mark.slow
def test_the_page_loads_nothing(finished):
    page = finished[3]
    loads = Loads()
    loads.feed(page)
    assert page.count("<svg") == page.count("</svg>") >= 6, "its pictures are in the page"
    assert loads.found == []
    assert not re.search(r"@import|url\(", page)
    assert re.findall(r'\bid="([^"]+)"', page) == [], "several drawings in one page share no names"


@pytest.mark.slow
def test_the_page_comes_from_the_results_alone(finished):
    assert render(finished[2]) == finished[3]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [4, 5, 7, 8, 10])
@pytest.mark.parametrize("variants", [1, 3])
def test_a_run_stopped_after_any_part_can_be_reported(finished, parts, variants):
    order = ["schema", "settings", "machine", "data", "speed", "plan", "start", "pretrain", "plan_finetune", "finetune"]
    cut = {part: finished[2][part] for part in order[:parts]}
    last = order[parts - 1]
    if last in ("pretrain", "finetune"):
        cut[last] = dict(list(cut[last].items())[:variants])
    cut["summary"] = summarise(cut)
    assert cut["summary"]["missing"]
    assert "Missing: " in render(cut)
    print_summary(cut, Console(quiet=True))


@pytest.mark.slow
def test_another_seed_needs_restart_or_another_folder(interrupted, finished):
    console = Console(record=True, width=200)
    assert run_stages(Settings(seed=1, quick=True, out=interrupted[0]), console) == 1
    words = console.export_text()
    assert "holds a run with seconds 270.0, seed 0" in words
    assert "--restart" in words
    assert json.loads((interrupted[0] / "results.json").read_text()) == finished[2]


class Toy(nn.Module):
    """Something that trains in microseconds and has dropout, so that a break would show."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 1))

    def forward(self, input_ids):
        return type("Output", (), {"loss": self.layer(input_ids).square().mean()})


def toy_batch(step):
    return {"input_ids": torch.randn(4, 6, generator=torch.Generator().manual_seed(step))}


def test_training_goes_on_exactly_where_it_stopped(tmp_path):
    job = Job("toy", steps=30, lr=1e-2, batch=toy_batch, seed=3)
    whole = Toy()
    straight = train(job, whole, Store(tmp_path / "a", QUICK), Stop(), lambda step, loss: None)

    store, stop = Store(tmp_path / "b", QUICK), Stop()

    def break_at_eleven(step, loss):
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)

    with stop.watching(), pytest.raises(KeyboardInterrupt):
        train(job, Toy(), store, stop, break_at_eleven)
    assert store.load_state("toy")["at"]["step"] == 11
    rest = Toy()
    resumed = train(job, rest, store, Stop(), lambda step, loss: None)
    assert resumed["curve"] == straight["curve"]
    assert resumed["tokens"] == straight["tokens"]
    for one, other in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_a_number_is_a_failure(tmp_path):
    job = Job("toy", 3, 1e-2, lambda step: {"input_ids": torch.full((1, 6), float("nan"))}, 0)
    with pytest.raises(RuntimeError, match="toy: the loss is nan at step 0"):
        train(job, Toy(), Store(tmp_path, QUICK), Stop(), lambda step, loss: None)


def test_the_rate_rises_and_falls():
    shape = [triangle((step + 1) / 101, WARMUP) for step in range(100)]
    peak = shape.index(max(shape))
    assert 10 < peak < 20
    assert all(0 < value <= 1 for value in shape)
    assert shape[:peak] == sorted(shape[:peak])
    assert shape[peak:] == sorted(shape[peak:], reverse=True)


def test_every_variant_begins_as_the_same_function():
    start = masked_word_model(sizes.START, 128, 0, None)
    tokens = torch.randint(5, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = start.eval()(input_ids=tokens).logits
        for variant in VARIANTS:
            got = masked_word_model(variant, 128, 7, start.state_dict()).eval()(input_ids=tokens).logits
            assert torch.equal(got, want), variant.name


def test_narrow_baselines_do_the_same_arithmetic():
    for variant in VARIANTS:
        if variant.narrow_of:
            tree = next(a for a in VARIANTS if a.name == variant.narrow_of).feedforward
            options = {name: value for name, value in tree.items() if name != "kind"}
            assert variant.feedforward["intermediate_size"] == equal_work(**options)
    assert equal_work(depth=9) == 10
    assert equal_work(depth=5, trees=16) == 96


def test_start_windows_grow_and_batches_repeat():
    corpus = Corpus(characters=3000)
    batch = start_batches(corpus, 50, seed=0)
    lengths = [batch(step)["input_ids"].shape[1] for step in range(50)]
    assert lengths == sorted(lengths)
    assert set(lengths) == {8, 16, 32}
    assert torch.equal(batch(30)["input_ids"], start_batches(corpus, 50, seed=0)(30)["input_ids"])


def variant_with(losses):
    return {"valid_losses": losses, "narrow_of": None, "tokens": 10, "seconds": 2.0}


def test_recovered_gap():
    variants = {
        DENSE: variant_with([1.0, 1.1, 0.9]),
        "narrow": variant_with([2.0, 2.1, 1.9]),
        "tree": variant_with([1.7, 1.8, 1.6]),
    }
    found = recovered_gap(variants, "tree", "narrow")
    assert found["value"] == pytest.approx(0.3)
    assert found["gap"] == pytest.approx(1.0)


def test_recovered_gap_of_noise_has_no_value():
    variants = {DENSE: variant_with([1.0, 2.1]), "narrow": variant_with([1.2, 2.0]), "tree": variant_with([1.0, 2.0])}
    found = recovered_gap(variants, "tree", "narrow")
    assert found["value"] is None
    assert "not clearly better" in found["reason"]


def test_paired_error():
    difference, error = paired(variant_with([2.0, 4.0, 6.0]), variant_with([1.0, 2.0, 3.0]))
    assert (difference, error) == (pytest.approx(2.0), pytest.approx(1 / 3**0.5))


def test_an_empty_run_can_be_reported():
    results = {"schema": 1, "settings": QUICK}
    results["summary"] = summarise(results)
    results["machine"] = {"cpu": "<b>fast & wide</b>"}
    page = render(results)
    assert "&lt;b&gt;fast &amp; wide&lt;/b&gt;" in page
    assert "layer speed" in page
    assert len(missing_parts(results)) == 9


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomic(path, b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*results\.json: No space left on device"):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"], "no temporary file may stay"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    console = Console(record=True, width=200)
    code = run_stages(Settings(quick=True, out=tmp_path / "file" / "report"), console)
    assert code == 1
    assert "cannot write" in console.export_text()


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{half")
    with pytest.raises(RunError, match="--restart"):
        Store(tmp_path, QUICK)
    (tmp_path / "results.json").write_text('{"schema": 0}')
    with pytest.raises(RunError, match="not of this version"):
        Store(tmp_path, QUICK)


def test_restart_forgets_the_run_and_nothing_else(tmp_path):
    store = Store(tmp_path, QUICK)
    store.finish("speed", {"x": 1})
    store.save_state("start", {"model": {}})
    (tmp_path / "mine.txt").write_text("keep")
    fresh = Store(tmp_path, QUICK, restart=True)
    assert "speed" not in fresh.results
    assert fresh.load_state("start") is None
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_damaged_state_is_named(tmp_path):
    store = Store(tmp_path, QUICK)
    store.state.mkdir()
    (store.state / "start.pt").write_bytes(b"not a state")
    with pytest.raises(RunError, match=r"start\.pt is damaged .*--restart"):
        store.load_state("start")


def test_seconds_add_up_over_runs_even_when_one_is_killed(tmp_path):
    first = Store(tmp_path, QUICK)
    time.sleep(0.05)
    first.finish("machine", {})
    again = Store(tmp_path, QUICK)
    assert 0.05 <= again.results["seconds_used"] <= again.seconds_used()
    time.sleep(0.05)
    again.finish("data", {})
    assert Store(tmp_path, QUICK).results["seconds_used"] >= 0.1
