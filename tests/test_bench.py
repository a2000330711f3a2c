"""The CPU benchmark: wrong outputs are refused, interrupted runs go on, what is missing is told, results are whole."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastff
from fastff.bench import Grid, Only, Settings, run_grid, workers, workloads
from fastff.bench import cpu_run as bench_run
from fastff.bench.cpu_command import bench_cpu, conclude, saved, settings_of
from fastff.bench.cpu_providers import PROVIDERS, Provider
from fastff.bench.cpu_report import best_of, document, is_whole, notes, save, update
from fastff.bench.cpu_run import LEAST_SLOW_SAMPLES, PARTIAL, Record, Timing, resident_bytes, seatings
from fastff.bench.limits import Limits, least_us, measure
from fastff.bench.timed_layers import expected, make_layer
from fastff.bench.workers import LocalWorker, Refused, RemoteWorker
from fastff.bench.workloads import Cell, DenseConfig, Workload, label, weights_of
from fastff.ops import reference
from fastff.ops.cost import visited_weights
from fastff.ops.weights import Weights

DENSE = DenseConfig(features=32, neurons=64)
GATED = DenseConfig(features=32, neurons=48, activation="swiglu")
TREE = workloads.tree(4, 32)
FOREST = workloads.tree(2, 32, trees=3, leaf_width=2, node_output=False, activation="swiglu")
FAST = ("torch eager", "torch packed", "fastff", "fastff C", "torch gather+bmm", "torch masked")
LIMITS = Limits(1, 10e9, 20e9, 101 * 10**6, 1e11)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two small trees in place of the table's, and no measuring of the machine."""
    trees = {TREE: (DENSE,), FOREST: (GATED, DENSE)}
    monkeypatch.setattr(workloads, "TREES", trees)
    monkeypatch.setattr(workloads, "BERT_BASE", TREE)
    for config, twins in trees.items():
        monkeypatch.setitem(workloads.TWINS, label(config), tuple(map(label, twins)))
    monkeypatch.setattr(bench_run, "TURN_SECONDS", 0.002)
    monkeypatch.setattr(workers, "INPUT_BYTES", 2**16)
    monkeypatch.setattr(LocalWorker, "limits", lambda self: LIMITS)


TIMING = {
    **dict.fromkeys(("latency_us_p25", "latency_us_p50", "latency_us_p75", "max_abs_error", "relative_error"), 1.0),
    "precision": "fp32",
    "layers": 1,
    "threads": 1,
    "training": False,
    "samples": 5,
}
NAMES = (("dense-3072", "torch eager", "dense"), ("1x11", "fastff", "conditional"))


def small_settings(**options):
    only = Only(provider=options.pop("providers", FAST), layer=options.pop("layer", ()))
    grid = Grid(
        **{"threads": (1,), "rows": (3,), "layers": (2,), "gpt3_rows": (), "train_rows": (), **options}, only=only
    )
    return Settings(grid, seconds=0.01, separate=False)


def cell(provider, subject=TREE, **options):
    return Cell(subject, provider, **{"rows": 3, "layers": 1, "threads": 1, "training": False, **options})


def test_every_provider_of_a_workload_is_timed_and_compared():
    record = run_grid(small_settings(train_rows=(5,)))
    assert record.left_out == {}
    for t in record.timings:
        assert 0 < t.latency_us_p25 <= t.latency_us_p50 <= t.latency_us_p75
        assert t.relative_error < 1e-5
        assert t.samples >= LEAST_SLOW_SAMPLES  # more of calls that are not slowed by other work
        assert (t.limit_fraction is not None) == (t.provider.startswith("fastff") and not t.training)
    found = {(best.layer, best.training): best for best in best_of(record.timings)}
    assert set(found) == {(label(TREE), False), (label(FOREST), False), (label(TREE), True)}
    of_forest = found[label(FOREST), False]
    dense = [t for t in record.timings if t.kind == "dense" and not t.training]
    assert {t.layer for t in dense} == {label(DENSE), label(GATED)}
    least = min(t.latency_us_p50 for t in dense)
    assert of_forest.ratio("fp32") == pytest.approx(least / of_forest.ours["fp32"].latency_us_p50)
    assert of_forest.ratio("int8") is None
    assert {t.provider for t in record.timings if t.training} == {"torch eager", "fastff"}


def test_a_wrong_provider_is_refused(monkeypatch):
    wrong = dataclasses.replace(PROVIDERS["torch eager"], make=lambda layers, rows: [lambda x: x * 0 for _ in layers])
    monkeypatch.setitem(PROVIDERS, "torch eager", wrong)
    record = run_grid(small_settings())
    assert "torch eager" not in {t.provider for t in record.timings}
    assert len(record.wrong) == 2
    assert "wrong output: relative error 1.0e+00" in record.left_out[record.wrong[0]]
    console = Console(record=True, width=200)
    assert conclude(record, None, console) == 1
    assert "wrong output" in console.export_text()


def test_a_conditional_provider_that_takes_other_leaves_is_refused(monkeypatch):
    def mirrored(layers, rows):
        return [lambda x, layer=layer: layer(-x) for layer in layers]

    monkeypatch.setitem(PROVIDERS, "fastff", dataclasses.replace(PROVIDERS["fastff"], make=mirrored))
    with pytest.raises(Refused, match="wrong output"):
        LocalWorker(1, 0).prepare(cell("fastff"), 1.0)


def test_a_provider_that_raises_is_told_and_the_others_go_on(monkeypatch):
    def fails(layers, rows):
        raise ValueError("no such layout")

    monkeypatch.setitem(PROVIDERS, "torch packed", dataclasses.replace(PROVIDERS["torch packed"], make=fails))
    record = run_grid(small_settings(layer=(label(TREE),)))
    assert list(record.left_out.values()) == ["failed: ValueError: no such layout"]
    assert {"torch eager", "fastff"} <= {t.provider for t in record.timings}


def test_a_slow_provider_is_left_out():
    with pytest.raises(Refused, match=r"takes 0\.0 s, more than the 0\.0 s"):
        LocalWorker(1, 0).prepare(cell("fastff"), 0.0)


@pytest.mark.parametrize("slow_calls", [1, 2])
def test_a_provider_that_is_slow_at_first_stays(monkeypatch, slow_calls):
    def slow_at_first(layers, rows):
        calls = []

        def call(layer, x):
            calls.append(x)
            if len(calls) <= slow_calls:
                time.sleep(0.3)
            return layer(x)

        return [functools.partial(call, layer) for layer in layers]

    monkeypatch.setitem(PROVIDERS, "fastff", dataclasses.replace(PROVIDERS["fastff"], make=slow_at_first))
    assert LocalWorker(1, 0).prepare(cell("fastff"), 0.25).seconds < 0.25


def test_workloads_measured_anew_replace_their_own_and_keep_the_others(tmp_path):
    console = Console(record=True, width=150)
    only = Only(provider=())
    grid = Grid(threads=(1,), rows=(2, 3), layers=(1,), gpt3_rows=(), train_rows=(), only=only)
    chosen = [Timing(**TIMING, layer=layer, provider=p, kind=k, rows=rows) for rows in (2, 3) for layer, p, k in NAMES]
    before = Record(
        {"cpu": "x"}, asdict(Settings(grid)), timings=chosen, left_out={"1x11-hot-2-rows-1-threads p": "why"}
    )
    save(before, tmp_path, whole=False)
    again = [dataclasses.replace(t, latency_us_p50=7.0) for t in chosen if t.rows == 3]
    record = Record({"cpu": "x", "commit": "later"}, asdict(Settings(grid)), timings=again)
    merged = update(saved(tmp_path), record)
    assert [(t.rows, t.latency_us_p50) for t in merged.timings] == [(2, 1.0)] * 2 + [(3, 7.0)] * 2
    assert merged.left_out == before.left_out
    assert merged.updates[0]["workloads"] == ["hot-3-rows-1-threads"]
    assert merged.updates[0]["machine"]["commit"] == "later"
    assert not is_whole(merged), "the grid has more layers than these"
    with pytest.raises(ValueError, match="the results are of x"):
        update(saved(tmp_path), dataclasses.replace(record, machine={"cpu": "y"}))
    partly = dataclasses.replace(grid, only=Only(layer=("1x11",)))
    with pytest.raises(ValueError, match="measures whole workloads"):
        bench_cpu(Settings(partly), tmp_path, console, replace=True)


def test_a_record_is_whole_when_all_of_its_grid_was_measured():
    grid = Grid(threads=(1,), rows=(2,), layers=(1,), gpt3_rows=(), train_rows=(), only=Only(layer=(label(TREE),)))
    subjects = grid.workloads()[0].subjects
    both = [Timing(**TIMING, layer=label(subject), provider="p", kind="k", rows=2) for subject in subjects]
    assert len(both) == 2, "a tree and its dense layer"
    assert is_whole(Record({}, asdict(Settings(grid)), timings=both))
    assert not is_whole(Record({}, asdict(Settings(grid)), timings=both[:1]))


def test_missing_packages_are_told(monkeypatch):
    needs = dataclasses.replace(PROVIDERS["openvino"], needs=("a_package_that_is_not_there",))
    monkeypatch.setitem(PROVIDERS, "openvino", needs)
    record = run_grid(small_settings(providers=("openvino", "fastff"), layer=(label(TREE),)))
    assert set(record.left_out.values()) == {"a_package_that_is_not_there is not installed"}
    assert record.wrong == []
    assert any("left out: openvino: a_package" in line for line in notes(record))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = small_settings(rows=(2, 3), layer=(label(TREE),))
    prepared, stop_after = [], 7
    prepare = LocalWorker.prepare

    def interrupting(self, cell, longest_call):
        if stop_after is not None and len(prepared) >= stop_after:
            raise KeyboardInterrupt
        prepared.append(cell)
        return prepare(self, cell, longest_call)

    monkeypatch.setattr(LocalWorker, "prepare", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run_grid(settings, tmp_path)
    first = json.loads((tmp_path / PARTIAL).read_text())
    assert {t["rows"] for t in first["timings"]} == {2}

    console = Console(record=True, width=250)
    assert bench_cpu(settings, tmp_path, console) == 130
    saved = json.loads((tmp_path / "layer-cpu.json").read_text())
    assert (saved["whole"], {t["rows"] for t in saved["timings"]}) == (False, {2})
    assert "again to resume" in console.export_text()
    assert (tmp_path / PARTIAL).is_file()

    prepared.clear()
    stop_after = None
    record = run_grid(settings, tmp_path)
    assert {c.rows for c in prepared} == {3}
    assert [t.rows for t in record.timings] == [2] * 6 + [3] * 6
    assert dataclasses.asdict(record.timings[0]) == first["timings"][0]

    prepared.clear()
    run_grid(dataclasses.replace(settings, seed=1), tmp_path)
    assert {c.rows for c in prepared} == {2, 3}, "other settings begin again"


def test_results_are_saved_whole(tmp_path):
    record = run_grid(small_settings(), tmp_path)
    console = Console(record=True, width=250)
    assert conclude(record, tmp_path, console) == 0
    assert "reads 10.0 GB/s of memory" in console.export_text()
    with (tmp_path / "layer-cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [t.provider for t in record.timings]
    found = json.loads((tmp_path / "layer-cpu.json").read_text())
    assert found == json.loads(json.dumps(document(record)))
    assert found["machine"]["torch"] == torch.__version__
    assert {best["layer"] for best in found["best"]} == {label(TREE), label(FOREST)}
    drawn = (tmp_path / "layer-cpu.svg").read_text()
    assert drawn.count("rows a call") == 2, "a panel for each tree"
    assert "fp32, 1 thread" in drawn
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("subject", [DENSE, GATED], ids=label)
@pytest.mark.parametrize("name", [name for name, p in PROVIDERS.items() if p.dense and name != "torch.compile"])
def test_dense_providers_compute_the_dense_layer(name, subject):
    why = PROVIDERS[name].why_not(subject)
    if why is not None:
        pytest.skip(why)
    checked = LocalWorker(1, 0).prepare(cell(name, subject, rows=5), 10.0)  # raises Refused if it is wrong
    assert checked.relative_error > 0


@pytest.mark.parametrize("subject", [TREE, FOREST], ids=label)
@pytest.mark.parametrize("name", [name for name, p in PROVIDERS.items() if p.family == "fastff"])
def test_fastff_computes_its_tree_in_every_precision(name, subject):
    checked = LocalWorker(1, 0).prepare(cell(name, subject, rows=40), 10.0)
    assert checked.relative_error < {"fp32": 1e-6, "bf16": 5e-3, "int8": 5e-2}[PROVIDERS[name].precision]


def test_a_worker_in_another_process_answers_and_its_end_is_noticed():
    remote = RemoteWorker(threads=1, seed=0)
    try:
        checked = remote.prepare(cell("fastff", rows=2), 10.0)
        assert 0 < checked.relative_error < 1e-6
        assert len(remote.sample(cell("fastff", rows=2), 0.001)) >= 1
        with pytest.raises(Refused, match=r"more than the 0\.0 s"):
            remote.prepare(cell("fastff", rows=2), 0.0)
        before = _cpu_seconds(remote._process.pid)
        remote._process.join(0.3)
        assert _cpu_seconds(remote._process.pid) - before < 0.1, "it spins between its turns"
        os.kill(remote._process.pid, signal.SIGKILL)
        with pytest.raises(Refused, match="ended with exit code -9"):
            remote.sample(cell("fastff", rows=2), 0.001)
    finally:
        remote.close()


def _cpu_seconds(process):
    if not os.path.exists("/proc"):
        pytest.skip("needs /proc")
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_layers_that_do_not_fit_memory_are_seated_apart_or_left_out():
    wide = DenseConfig(features=1024, neurons=2**15)
    cells = [cell("torch eager", wide), cell("torch packed", wide), cell("fastff")]
    one, two = resident_bytes(cells[:1]), resident_bytes(cells[:2])
    assert one > 4 * weights_of(wide)
    assert two == one + 4 * weights_of(wide) + 4 * 3 * 1024  # the fp32 weights of a process are there once
    left_out = {}
    assert seatings(cells, 10**12, left_out) == [cells]
    assert seatings(cells, int(two * 1.2), left_out) == [cells[:2], cells[2:]]
    assert left_out == {}
    assert seatings(cells, int(one * 0.9), left_out) == [cells[2:]]
    assert all("needs 0." in why for why in left_out.values())


def test_limits_of_a_conditional_layer():
    plain = fastff.TreeConfig(in_features=768, out_features=768, depth=11)
    assert visited_weights(plain, 1) == pytest.approx(12 * 2 * 768)
    assert visited_weights(plain, 10**7) == pytest.approx(weights_of(plain))
    forest = workloads.tree(4, trees=8, leaf_width=16, node_output=False, activation="swiglu")
    assert visited_weights(forest, 1) == pytest.approx(8 * 768 * (4 + 32 + 16))
    one = least_us(plain, LIMITS, rows=1, layers=1, precision="fp32")
    assert one == pytest.approx(1e6 * (12 * 2 * 768 * 4 + 2 * 768 * 4) / 20e9)
    cold = least_us(plain, LIMITS, rows=1, layers=16, precision="fp32")  # 10 of 12 levels fit the cache
    assert cold == pytest.approx(1e6 * ((10 + 2 * 2) * 2 * 768 * 4 + 2 * 768 * 4) / 20e9)
    many = least_us(plain, LIMITS, rows=10**6, layers=1, precision="fp32")
    assert many == pytest.approx(1e6 * plain.flops_per_row / LIMITS.flops_per_s, rel=0.7)


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr("fastff.bench.limits.PEAK_SIZE", 64)
    monkeypatch.setattr("fastff.bench.limits.MEMORY_BYTES", 2**20)
    found = measure()
    assert found.threads == torch.get_num_threads()
    assert min(found.memory_bytes_per_s, found.cache_bytes_per_s, found.flops_per_s) > 1e6


@pytest.mark.parametrize("config", [TREE, FOREST], ids=label)
def test_expected_outputs_are_those_of_the_float64_reference(config):
    layer = make_layer(config, 0, seed=3)
    x = torch.randn(20, 32)
    got = expected(layer, x)
    want = reference.forward(x.double(), Weights(layer.w_in.double(), None, layer.w_out.double(), None), config=config)
    torch.testing.assert_close(got.y, want.y, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.leaf, want.leaf)


def test_layers_are_the_same_in_every_process_and_differ_from_each_other():
    first, again, other = (make_layer(DENSE, index, seed=0).up.weight for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_choices_are_parsed_and_refused():
    settings = settings_of(quick=True, only=["rows=1,8", "visits=16-layers", f"layer={label(TREE)}"], seconds=None)
    planned = settings.grid.workloads()
    assert [workload.rows for workload in planned] == [1]
    assert planned[0].subjects == (DENSE, TREE)
    for bad, message in (
        ("rows", "KIND=VALUE"),
        ("colour=red", "kind of"),
        ("rows=many", "whole"),
        ("layer=9x9", "9x9"),
    ):
        with pytest.raises(ValueError, match=message):
            Only.parse([bad])
    with pytest.raises(ValueError, match="'numpy' is not one of torch eager"):
        settings_of(quick=True, only=["provider=numpy"], seconds=None)


def test_the_whole_table_has_the_workloads_it_promises():
    planned = Grid(threads=(1, 2)).workloads()
    assert len(planned) == len({(s.name, s.subjects) for s in planned})
    plain = [s for s in planned if not s.training and TREE in s.subjects]
    assert len(plain) == 5 * 2 * 2
    assert isinstance(planned[0], Workload)
    assert isinstance(next(iter(PROVIDERS.values())), Provider)


def test_threads_are_restored():
    before = torch.get_num_threads()
    run_grid(small_settings(layer=(label(TREE),), providers=("fastff",)))
    assert torch.get_num_threads() == before


def test_a_call_that_outlasts_a_sample_is_timed_no_longer_than_asked():
    """Two threads and 1,024 rows: 45 contestants with passes of a third of a second never came to an end."""
    script = Path(__file__).parents[1] / "benchmarks" / "conditional_cpu.py"
    spec = importlib.util.spec_from_file_location("conditional_cpu", script)
    conditional_cpu = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = conditional_cpu  # its dataclasses look there
    spec.loader.exec_module(conditional_cpu)
    calls = []
    slow = [lambda _: (calls.append("slow"), time.sleep(0.025))] * 2
    fast = [lambda _: (calls.append("fast"), time.sleep(0.001))] * 2
    contestants = [conditional_cpu.Contestant(name, "int8", made, 0.0) for name, made in (("s", slow), ("f", fast))]
    cells = conditional_cpu.measure(contestants, rows=2048, threads=1, seconds=0.1)
    assert all(cell.us >= us / 2048 for cell, us in zip(cells, (25_000, 1_000), strict=True))
    assert calls.count("slow") == (1 + 2) * (1 + 5)  # untimed for a sample's length, then one pass; five samples
    assert calls.count("fast") > calls.count("slow")
