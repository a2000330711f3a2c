"""Comparing runs: the recovered gap by hand, what does not compare, and the script of the experiments at toy size."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, replace

import pytest

from fastff.errors import FileError
from fastff.experiment import frontier
from fastff.experiment.study_settings import FrontierSettings
from fastff.io import read_json, write_json
from fastff.train.compare import (
    at_step,
    chart,
    compare,
    gap_of,
    left_out,
    loss_at,
    recovered_gap,
    routing_table,
    table,
)
from fastff.train.presets import PRESETS, cost_of


def record(name, loss, seed=0, preset="small", **settings):
    return {
        "settings": {"feedforward": name, "seed": seed, "steps": 9, **settings},
        "cost": asdict(cost_of(name, PRESETS[preset])),
        "parameters": 7,
        "tokens": 100,
        "tokens_per_second": 50 + 2 * seed,
        "valid_loss": loss,
        "routing": {},
    }


def test_unfinished_runs_compare_where_all_of_them_were():
    runs = [{**record("none", 5.0), "curve": [[10, 9.0], [20, 7.0]]}, {**record("1x11", 4.0), "curve": [[10, 8.0]]}]
    assert [run["valid_loss"] for run in at_step(runs, 10)] == [9.0, 8.0]
    assert [run["valid_loss"] for run in at_step(runs, 20)] == [7.0]
    assert runs[0]["valid_loss"] == 5.0


def test_recovered_gap():
    assert recovered_gap(4.0, 4.0, 3.0) == 0.0
    assert recovered_gap(4.0, 3.0, 3.0) == 1.0
    assert recovered_gap(4.0, 4.1, 3.0) == pytest.approx(-0.1)
    assert recovered_gap(3.0, 3.0, 3.0) is None


def test_arms_are_compared_over_seeds():
    records = [
        {**record(feedforward, loss, seed), "arm": feedforward, "group": "a"}
        for feedforward, seed, loss in (
            ("dense-swiglu", 0, 2.9),
            ("dense-swiglu", 1, 3.1),
            ("16x7-gate", 0, 3.7),
            ("16x7-gate", 1, 3.9),
            ("16x7-gate", 2, 3.8),
            ("narrow:16x7-gate", 0, 4.0),
            ("narrow:16x7-gate", 1, 4.0),
            ("1x11", 0, 4.2),
            ("none", 0, 5.0),
        )
    ]
    entries = {entry["name"]: entry for entry in compare(records)}
    assert list(entries) == ["dense-swiglu", "narrow:16x7-gate", "16x7-gate", "1x11", "none"]
    tree = entries["16x7-gate"]
    assert (tree["loss"], tree["recovered_gap"]) == (pytest.approx(3.8), pytest.approx(0.2, abs=0.01))
    assert tree["losses"] == {"0": 3.7, "1": 3.9, "2": 3.8}
    gaps = {"0": pytest.approx(0.3 / 1.1, abs=0.01), "1": pytest.approx(0.1 / 0.9, abs=0.01)}
    assert tree["gaps"] == gaps, "the third seed has no dense layers"
    assert entries["1x11"]["recovered_gap"] is None, "no narrow layer has as little arithmetic"
    lines = table(list(entries.values())).splitlines()
    assert "| 3.800 (3.700 to 3.900) | 0.20 (0.11 to 0.27) |" in lines[4]
    drawing = chart(list(entries.values()))
    assert drawing == chart(list(entries.values()))
    assert "16x7-gate" in drawing
    assert "no feedforward" in drawing
    routed = [{**tree, "layer": layer} for layer in ("16x7-gate", "flat-80x36-top3", "pk-784x4-top24")]
    legend = re.findall(r">(trees|experts|product keys)<", chart([*entries.values(), *routed]))
    assert legend == ["trees", "experts", "product keys"]


def test_the_gap_counts_the_seeds_that_the_tree_has():
    wide = {"group": "a", "layer": "dense-swiglu 1600", "flops": 1600, "losses": {"0": 3.0, "1": 2.0}}
    narrow = {"group": "a", "layer": "dense-swiglu 100", "flops": 100, "losses": {"0": 4.0, "1": 9.0}}
    tree = {"group": "a", "layer": "16x7-gate", "flops": 100, "losses": {"0": 3.4}}
    assert gap_of(tree, [wide, narrow, tree]) == pytest.approx(0.6)
    assert gap_of({**tree, "losses": {"0": 3.4, "2": 3.6}}, [wide, narrow]) == pytest.approx(0.5)
    assert gap_of({**tree, "losses": {"2": 3.4}}, [wide, narrow]) is None


def test_a_plan_is_compared_with_the_narrow_layer_read_off_its_dense_ones():
    narrow, wide = ({"kind": "dense", "intermediate_size": n, "activation": "swiglu"} for n in (100, 1600))
    tree = {"kind": "fff", "depth": 3, "leaf_width": 44, "trees": 4, "activation": "silu", "node_output": False}
    records = [
        {**record(json.dumps(feedforward), loss), "arm": arm, "group": group}
        for arm, group, feedforward, loss in (
            ("narrow", "a", narrow, 4.0),
            ("wide", "a", wide, 3.0),
            ("tree", "a", tree, 3.6),
            ("tree", "b", tree, 3.6),
            ("none", "a", {"kind": "none"}, 5.0),
        )
    ]
    entries = {(entry["group"], entry["name"]): entry for entry in compare(records)}
    flops = {name: entries["a", name]["flops"] for name in ("narrow", "tree", "wide")}
    between = 4.0 - math.log(flops["tree"] / flops["narrow"]) / math.log(16)
    assert flops["narrow"] < flops["tree"] < flops["wide"]
    assert entries["a", "tree"]["recovered_gap"] == pytest.approx((between - 3.6) / (between - 3.0))
    assert [entries[key]["recovered_gap"] for key in (("b", "tree"), ("a", "none"), ("a", "narrow"))] == [None] * 3
    dense = {10: 4.0, 1000: 3.0}
    assert [loss_at(f, dense) for f in (9, 10, 100, 1000, 1001)] == [None, 4.0, pytest.approx(3.5), 3.0, None]
    assert loss_at(960, {1000: 3.0, 4000: 2.0}) == 3.0, "one with 4 % more arithmetic stands in"


def test_what_a_plan_has_not_finished_is_listed_and_stats_is_a_mean():
    layers = [
        {"leaf_entropy_bits": 1.0, "most_bits": 4, "dead_leaves": 0.5, "one_sided_nodes": None},
        {"leaf_entropy_bits": 3.0, "most_bits": 4, "dead_leaves": 0.0, "one_sided_nodes": 0.25},
    ]
    done = {**record("1x11", 3.0), "arm": "a", "finished": True, "routing": dict(enumerate(layers))}
    half = {**record("none", 3.5), "arm": "b", "finished": False, "steps": 4}
    assert left_out(["c", "b", "a"], [done, half]) == [
        "not run: c",
        "unfinished: b, step 4 of 9, held-out loss 3.5000",
    ]
    assert left_out(["a"], [done], seeds=(0, 1)) == ["not run: a, seed 1"]
    later = {**done, "settings": {**done["settings"], "seed": 3}}
    assert left_out(["a"], [later]) == left_out(["b"], [half, {**later, "arm": "b"}]) == []
    assert left_out(["a"], [later], seeds=(0,)) == ["not run: a"]
    assert routing_table([done, half]).splitlines()[2:] == ["| a | 2.00 (4) | 25 % | 25 % |"]
    calm = {**later, "routing": {"one": {**layers[1], "one_sided_nodes": 0.55}}}
    assert routing_table([done, calm]).splitlines()[2:] == ["| a | 2.33 (4) | 17 % | 40 % |"], "over seeds, too"


def test_labels_of_points_that_are_close_do_not_cover_each_other():
    close = [{"layer": "1x1", "flops": 100, "loss": 3.0 + 1e-4 * n, "name": f"variant-{n}"} for n in range(4)]
    far = {"layer": "1x1", "flops": 100_000, "loss": 4.0, "name": "far"}
    places = re.findall(r' y="([\d.]+)"[^>]*>(variant-\d)<', chart([*close, far]))
    heights = [float(y) for y, _ in sorted(places, key=lambda place: place[1])]
    assert [a - b for a, b in itertools.pairwise(heights)] == pytest.approx([13.0] * 3, abs=0.1)


def test_losses_stand_beside_the_speed_of_decoding(tmp_path):
    """Timed once; what a dense layer of equal speed would lose is read off the dense ones by hand."""
    study, out = tmp_path / "study", tmp_path / "out"
    runs = [("dense-swiglu", 3.0, 0), ("flat-8x4-top2", 3.2, 0), ("flat-8x4-top2", 3.4, 1), ("none", 4.0, 0)]
    records = [{**record(*run, preset="tiny"), "variant": run[0], "group": "causal", "finished": True} for run in runs]
    study.mkdir()
    write_json(study / "records.json", records)
    gpus = tmp_path / "gpus"
    gpus.mkdir()
    write_json(gpus / "flat-1-compiled-graph.json", records[1])
    sizes = {"preset": "tiny", "seconds": 0.01, "context": 4, "tokens": 2, "prompt": 8}
    asked = FrontierSettings((study,), out=out, layer=("narrow:1x11",), gpu_speed=gpus, **sizes)
    said = []
    frontier.run(asked, said.append)
    timed = read_json(out / "speeds.json")
    assert [cell["layer"] for cell in timed["cells"]] == ["dense-swiglu 341", "flat-8x4-top2", "none", "dense-swiglu 6"]
    assert [cell["stored"] for cell in timed["cells"][1:3]] == [2 * 8 * (1 + 3 * 4) * 128, 0]
    assert all(0 < cell[kind][0] <= cell[kind][2] for cell in timed["cells"] for kind in ("decode_us", "prefill_us"))
    for cell, us in zip(timed["cells"], (100.0, 50.0, 25.0, 20.0), strict=True):
        cell["decode_us"][1] = us
    write_json(out / "speeds.json", timed)
    points = {point["layer"]: point for point in frontier.run(asked, said.append)}
    assert read_json(out / "speeds.json") == timed, "nothing is timed again"
    flat = points["flat-8x4-top2"]
    assert (flat["decode"], flat["training"], flat["loss"]) == (20_000.0, 50, pytest.approx(3.3))
    assert flat["equal_dense"] == pytest.approx(3.5), "half-way between the two, in the logarithm"
    assert "| 3.300 (3.200 to 3.400) | 3.500 | +0.200 |" in said[-1]
    assert "loss" not in points["dense-swiglu 6"]
    drawn = (out / "frontier.svg").read_text()
    assert all(words in drawn for words in ("held-out loss", "int8, one thread", ">experts<"))
    assert ">trees<" not in drawn
    assert "| 8-token prompt, tokens/s |" in said[-1]
    frontier.run(replace(asked, context=5, threads=2), said.append)
    assert "int8, 2 threads" in (out / "frontier.svg").read_text()
    assert read_json(out / "speeds.json")["context"] == 5, "what was timed otherwise is timed again"
    write_json(study / "records.json", [])
    with pytest.raises(FileError, match="no finished record of the group 'causal'"):
        frontier.run(asked)


def test_a_layer_that_was_trained_and_not_timed_is_left_out_of_the_frontier():
    timed = {"layer": "none", "kind": "none", "decode_us": [1, 2, 3], "prefill_us": [1, 2, 3], "flops": 0}
    entries = [{"layer": layer, "kind": "none", "loss": 3.9, "flops": 0} for layer in ("pk-784x4-top31", "none")]
    assert [point["layer"] for point in frontier.joined("study", entries, {"none": timed})] == ["none"]
