"""The GPU benchmark's paths, run on a CPU: what is measured, kept, refused, and in which order."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from rich.console import Console

from fastff.bench import gpu_cases as cases
from fastff.bench import gpu_check as check
from fastff.bench import gpu_command as command
from fastff.bench import gpu_providers as providers
from fastff.bench import gpu_run as run
from fastff.bench import workloads
from fastff.bench.gpu_cases import CORE, EXTRA, Case, Cell, Pair, StepCell
from fastff.bench.gpu_device import Cuda, DryRun
from fastff.bench.gpu_model import Sizes
from fastff.bench.gpu_report import best_of, notes, save, tables
from fastff.bench.gpu_run import LINES, Settings, run_gpu
from fastff.bench.workers import Refused
from fastff.bench.workloads import DenseConfig, label, weights_of

PLAIN = Pair(workloads.tree(3, 16), DenseConfig(16, 24))
LEAVES = Pair(
    workloads.tree(2, 16, trees=2, leaf_width=2, node_output=False, activation="swiglu"),
    DenseConfig(16, 8, "swiglu"),
)
FAST = [name for name in (*CORE, *EXTRA) if "compiled" not in name]
SMALL = Settings(cell_seconds=0.001, sizes=Sizes(layers=2, heads=2, sequence=4, batch=2))


def cells_of(case, names=FAST, cold=True):
    return [Cell(case, name, cold) for name in names]


@pytest.mark.parametrize(
    "case",
    [
        Case(PLAIN, 5, dtype="fp32"),
        Case(PLAIN, 5, layers=3, dtype="fp32"),
        Case(PLAIN, 64, dtype="bf16"),
        Case(PLAIN, 40, dtype="fp32", training=True),
        Case(LEAVES, 40, dtype="fp32", training=True),
    ],
    ids=lambda case: f"{label(case.pair.tree)}-{case.rows}-{case.dtype}-{case.training}-{case.layers}",
)
def test_every_provider_of_a_case_is_checked_and_timed(case, tmp_path):
    record = run_gpu(cells_of(case), SMALL, DryRun(), tmp_path)
    assert record.left_out == {}
    assert [t.provider for t in record.timings] == FAST
    for t in record.timings:
        assert 0 < t.latency_us_p25 <= t.latency_us_p50 <= t.latency_us_p75
        assert t.relative_error < (1e-2 if case.dtype == "bf16" else 1e-5)
        assert (t.gradient_error is not None) == case.training
        assert (t.held_bytes is not None) == case.training
        assert (t.gb_per_s is None) == case.training
    dense = next(t for t in record.timings if t.kind == "dense")
    factor = 3 if case.training else 1
    flops = factor * case.rows * case.pair.dense.flops_per_row
    assert dense.tflops == pytest.approx(flops / dense.latency_us_p50 / 1e6)
    if not case.training:
        moved = (weights_of(case.pair.dense) + 2 * 16 * case.rows) * (2 if case.dtype == "bf16" else 4)
        assert dense.gb_per_s == pytest.approx(moved / dense.latency_us_p50 / 1e3)
        assert dense.copy_fraction == pytest.approx(dense.gb_per_s * 1e9 / DryRun().copy_bytes_per_s())


def test_compiled_providers_compile_each_layer(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled.append(layer) or layer)
    record = run_gpu(cells_of(Case(PLAIN, 5, layers=2, dtype="fp32"), CORE), SMALL, DryRun(), tmp_path)
    assert [t.provider for t in record.timings] == list(CORE)
    assert len(compiled) == 1 + 2  # for the check, then the chain


def test_training_steps_of_whole_models(tmp_path):
    tree = workloads.tree(2, 16, gate="boundary")
    steps = [StepCell("tree", tree), StepCell("tree", tree, graph=True), StepCell("dense", DenseConfig(16, 8))]
    record = run_gpu(steps, SMALL, DryRun(), tmp_path)
    assert [step.name for step in record.steps] == ["tree", "tree, graph", "dense"]
    assert all(0 < s.step_ms_p25 <= s.step_ms_p50 <= s.step_ms_p75 for s in record.steps)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cells = [*cells_of(Case(PLAIN, 5, dtype="fp32")), StepCell("dense", DenseConfig(16, 8))]
    seen = []
    measure = run._measure

    def interrupting(cell, *rest):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(cell)
        return measure(cell, *rest)

    monkeypatch.setattr(run, "_measure", interrupting)
    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_gpu(cells, SMALL, DryRun(), tmp_path)
    assert len((tmp_path / LINES).read_text().splitlines()) == 1 + 2
    seen.clear()
    stop_after = None
    record = run_gpu(cells, SMALL, DryRun(), tmp_path)
    assert seen == cells[2:]
    assert [t.key for t in record.timings] == [cell.key for cell in cells[:-1]]
    seen.clear()
    again = run_gpu(cells, SMALL, DryRun(), tmp_path)
    assert seen == []
    assert dataclasses.asdict(again) == dataclasses.asdict(record)
    run_gpu(cells, dataclasses.replace(SMALL, seed=1), DryRun(), tmp_path)
    assert seen == cells, "other settings begin again"


def test_a_run_ends_when_its_seconds_are_over(tmp_path):
    cells = cells_of(Case(PLAIN, 5, dtype="fp32"))
    record = run_gpu(cells, dataclasses.replace(SMALL, seconds=-1.0), DryRun(), tmp_path)
    assert record.timings == []
    assert record.not_reached == [cell.key for cell in cells]
    assert "no time for 6 cells" in notes(record)[-1]


def test_wrong_and_failing_providers_are_told_and_the_others_go_on(tmp_path, monkeypatch):
    def routed(cell, layer, device):
        if cell.provider == "torch masked":
            raise ValueError("no such mask")
        found = right(cell, layer, device)
        if cell.provider != "torch gather+bmm":
            return found
        return lambda x: found(x)._replace(y=found(x).y * 1.1)

    right = providers.routed
    for module in (providers, check):
        monkeypatch.setattr(module, "routed", routed)
    record = run_gpu(cells_of(Case(PLAIN, 5, dtype="fp32")), SMALL, DryRun(), tmp_path)
    reasons = {key.partition(": ")[2]: why for key, why in record.left_out.items()}
    assert reasons["torch gather+bmm"].startswith("wrong output: Errors(relative_error=0.1")
    assert reasons["torch masked"] == "failed: ValueError: no such mask"
    assert {"dense graph", "fastff graph"} <= {t.provider for t in record.timings}


def test_wrong_gradients_are_refused(monkeypatch):
    right = providers.routed

    def scaled(cell, layer, device):
        call = right(cell, layer, device)

        def scale(x):
            found = call(x)
            return found._replace(y=found.y.detach() + 1.1 * (found.y - found.y.detach()))

        return scale

    monkeypatch.setattr(check, "routed", scaled)
    with pytest.raises(Refused, match=r"gradient_error=0\.1"):
        check.check(Cell(Case(PLAIN, 40, dtype="fp32", training=True), "fastff eager", True), DryRun(), 0)


def test_tables_and_files(tmp_path):
    steps = [StepCell("dense", DenseConfig(16, 8))]
    training = cells_of(Case(PLAIN, 40, dtype="fp32", training=True))
    warm = cells_of(Case(PLAIN, 5, dtype="fp32"), cold=False)
    record = run_gpu([*warm, *training, *steps], SMALL, DryRun(), tmp_path)
    best = best_of(record.timings)
    assert [(b.ours.training, b.ours.cold) for b in best] == [(False, False), (True, True)]
    assert best[0].ratio == best[0].dense.latency_us_p50 / best[0].ours.latency_us_p50
    console = Console(record=True, width=160)
    for table in tables(record):
        console.print(table)
    text = console.export_text()
    assert "warm" in text
    assert "fwd+bwd" in text
    assert "a training step of a whole model" in text
    table, document = save(record, tmp_path)
    with table.open() as file:
        assert [line["key"] for line in csv.DictReader(file)] == [t.key for t in record.timings]
    found = json.loads(document.read_text())
    assert found["best"][0]["ours"] == best[0].ours.key
    assert torch.__version__.startswith(found["about"]["torch"])  # its metadata may leave out the local part


def test_tuning_is_asked_for_once_a_case(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need the package triton")
    from fastff.ops.triton_kernels import tuning

    asked = []

    def tune(x, weights, *, config, time_us, training):
        assert time_us(lambda: None) >= 0
        asked.append((tuple(x.shape), config, training))

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(run, "_tuned", set())
    case = Case(PLAIN, 5, dtype="fp32", training=True)
    run_gpu(cells_of(case), dataclasses.replace(SMALL, tune=True), DryRun(), tmp_path)
    assert asked == [((5, 16), PLAIN.tree, True)]


def test_compiling_ahead_survives_what_fails(monkeypatch):
    monkeypatch.setattr(run, "Cuda", DryRun)
    checked = []
    monkeypatch.setattr(run, "check", lambda cell, device, seed: checked.append(cell.provider) or 1 / 0)
    run._compile_share(cells_of(Case(PLAIN, 5), CORE), 0, None)
    assert checked == ["dense", "dense compiled", "fastff"]
    run._compile_share(cells_of(Case(PLAIN, 5), CORE), 0, -1.0)
    assert len(checked) == 3, "no time is left"


def test_the_goals_come_first_and_every_cell_once():
    every = list(cases.cells())
    assert len({cell.key for cell in every}) == len(every)
    assert [cell.provider for cell in every[:3]] == list(CORE)
    assert every[0].case == Case(cases.BERT, 65536)
    goals = [cell for cell in every if isinstance(cell, Cell)][: len(cases.FIRST) * len(CORE)]
    assert {cell.case for cell in goals} == set(cases.FIRST)
    assert {cell.case.pair.tree.in_features for cell in every if isinstance(cell, Cell)} == {768, 1024, 4096, 12288}
    rows = {cell.case.rows for cell in every if isinstance(cell, Cell)}
    assert (min(rows), max(rows)) == (1, 262144)
    for cell in every:  # the dense layer stores as many weights as its tree
        if isinstance(cell, Cell):
            assert weights_of(cell.case.pair.tree) == pytest.approx(weights_of(cell.case.pair.dense), rel=0.35)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_command_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"device|triton"):
        Cuda()
    console = Console(record=True)
    assert command.bench_gpu(SMALL, tmp_path, console) == 1
    assert "error: " in console.export_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_on_a_device(tmp_path):
    cells = [*cells_of(Case(PLAIN, 64), CORE), *cells_of(Case(PLAIN, 64, training=True), CORE)]
    record = run_gpu(cells, SMALL, Cuda(), tmp_path)
    assert record.left_out == {}
    assert record.timings[-1].held_bytes > 0
