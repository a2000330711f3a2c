"""The harness: wrong outputs stop it, every provider is compared with float64, results are saved whole."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import fastff
from fastff.bench import CASES, Case, run_cases
from fastff.bench import providers as bench_providers
from fastff.bench.run import fastest_dense, ratios, save

TINY = fastff.TreeConfig(in_features=32, out_features=32, depth=4)
SLOW = ("torch.compile", "openvino", "onnxruntime")


def run_tiny(**options):
    case = Case(config=TINY, dense_neurons=64, **{"rows": 3, **options})
    timings, left_out = run_cases([case], seconds=0.05, skip=SLOW)
    return case, timings, left_out


@pytest.mark.parametrize("options", [{}, {"rows": 1}, {"layers": 3}, {"training": True}], ids=str)
def test_a_case_times_dense_and_conditional(options):
    case, timings, left_out = run_tiny(**options)
    by_name = {t.provider: t for t in timings}
    assert by_name["torch eager"].kind == "dense"
    assert by_name["fastff"].kind == "conditional"
    for t in timings:
        assert 0 < t.latency_us_p20 <= t.latency_us_p50 <= t.latency_us_p80
        assert t.max_abs_error < 1e-4
        assert t.samples >= 3
    assert ratios(timings)[case.name] == pytest.approx(
        fastest_dense(timings, case.name).latency_us_p50 / by_name["fastff"].latency_us_p50
    )
    assert set(SLOW) <= set(left_out)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_dense_providers_compute_the_dense_layer(name):
    if bench_providers.missing(name):
        pytest.skip(bench_providers.missing(name))
    torch.manual_seed(0)
    w_in, w_out = torch.randn(64, 32) / 6, torch.randn(32, 64) / 8
    x = torch.randn(5, 32)
    got = bench_providers.DENSE[name]([(w_in, w_out)])(0, x)
    torch.testing.assert_close(got, bench_providers.dense(x, w_in, w_out), rtol=1e-5, atol=1e-5)


def test_a_wrong_provider_stops_the_run(monkeypatch):
    monkeypatch.setitem(bench_providers.DENSE, "torch eager", lambda weights: lambda layer, x: x * 0)
    with pytest.raises(RuntimeError, match="torch eager is wrong on 1x4-hot-3-rows"):
        run_tiny()


def test_results_are_saved_with_their_machine(tmp_path):
    _, timings, left_out = run_tiny()
    table, record = save(tmp_path / "new", timings, left_out)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["provider"] for r in rows] == [t.provider for t in timings]
    document = json.loads(record.read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["ratio_to_fastest_dense"] == ratios(timings)


def test_threads_are_restored():
    before = torch.get_num_threads()
    run_tiny(threads=1)
    assert torch.get_num_threads() == before


def test_the_published_cases_have_distinct_names():
    assert len({case.name for case in CASES}) == len(CASES)
