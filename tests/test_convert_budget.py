"""Budgets of a conversion: how they are written, what is chosen under them, and what an impossible one says."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from convert_cases import WORDS, few_shapes, random_dense, saved, settings_for, text, tiny, tokenizer
from fastff.convert import candidates, choose_layers, convert, distill_context, resources
from fastff.convert.candidates import survey
from fastff.convert.choose_layers import LatencyProfile, Option, Shape, choose, largest, shapes_of, shares_of, shortlist
from fastff.convert.conversion_settings import ConversionSettings, percent, shape, times
from fastff.convert.distil import Recipe
from fastff.convert.distill_context import DistillContext, converted_blocks
from fastff.convert.student import dense_layers, fit_tree, flops, stored_neurons
from fastff.errors import CheckpointError
from fastff.models import make_converted
from fastff.models.families import family_of

PROFILE = LatencyProfile(model_us=(100.0, 1000.0), dense_us=((30.0, 300.0), (30.0, 300.0)))


def settings(**changes):
    return ConversionSettings(model="m", text="t", out="o", **changes)


def options(*loss_increases):
    """Per block: the dense layer, then candidates of 20, 10 and 5 % at times in proportion."""
    shares = (0.2, 0.1, 0.05)
    return [
        [Option(None, 1.0, (30.0, 300.0))]
        + [Option({"kind": "fff"}, s, (30 * s, 300 * s), loss_increase=h) for s, h in zip(shares, block, strict=True)]
        for block in loss_increases
    ]


def pairs_table(path, count=20):
    rows = [f"{WORDS[k]} {WORDS[k + 1]}\t{WORDS[k % 7]} {WORDS[3]}\t{k % 5}" for k in range(count)]
    path.write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (percent, "10%", 0.1),
        (percent, "2.5 %", 0.025),
        (percent, "0.1", 0.1),
        (times, "2x", 2.0),
        (times, "1.5", 1.5),
        (shape, "32x128", (32, 128)),
    ],
)
def test_budgets_are_read_as_people_write_them(read, text, value):
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text"), [(percent, "ten"), (percent, "-3%"), (times, "2%"), (shape, "32"), (shape, "x")]
)
def test_what_is_no_budget_is_refused_with_an_example(read, text):
    with pytest.raises(ValueError, match=r"is not a \w+ like"):
        read(text)


@pytest.mark.parametrize(
    "change",
    [
        {"active": 0.0},
        {"active": 1.5},
        {"curve": (0.1, 2.0)},
        {"speedup": 1.0},
        {"speedup": 2.0, "active": 0.1},
        {"max_loss": 0.0},
        {"dense_fade": 1.0},
        {"average": -0.1},
        {"shared": -1},
        {"baselines": ("wide",)},
        {"shapes": ()},
        {"shapes": ((0, 4),)},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="active" if "curve" in change else next(iter(change)).rstrip("s")):
        settings(**change)


def test_decoders_have_rates_of_their_own():
    causal, embedding = (settings().of_kind(kind).recipe for kind in ("causal", "embedding"))
    assert (causal.lr, causal.lr_others, causal.lr_routers, causal.beta2) == (1.2e-3, 4e-4, 1e-4, 0.999)
    assert embedding == replace(Recipe(settings().steps, 256), seed=settings().seed)
    assert settings(lr=0.5).of_kind("causal").recipe.lr == 0.5


def test_the_work_is_spent_where_it_matters():
    assert choose(settings(active=0.1), options((1, 2, 9), (1, 2, 3)), PROFILE) == [2, 2]
    assert choose(settings(active=0.15), options((0, 5, 90), (0, 2, 3)), PROFILE) == [1, 2]
    assert choose(settings(active=0.2), options((1, 2, 9), (1, 2, 3)), PROFILE) == [1, 1]


def test_a_layer_that_matters_most_stays_dense_and_others_do_with_less():
    tried = options((50, 60, 70), *[(0.1, 0.2, 0.3)] * 7)
    picked = choose(settings(active=0.2), tried, PROFILE)
    assert picked[0] == 0
    spent = [block[k].share for block, k in zip(tried, picked, strict=True)]
    assert sum(spent) <= 0.2 * 8
    assert choose(settings(active=0.1), tried, PROFILE)[0] != 0  # for which the others cannot pay


def test_a_layer_whose_trees_are_slower_stays_dense():
    tried = options((1, 2, 3), (1, 2, 3))
    tried[0][1:] = [replace(o, times_us=(5.0, 301.0)) for o in tried[0][1:]]
    assert choose(settings(active=0.1), tried, PROFILE) == [0, 2]
    assert choose(settings(active=0.1, keep_slow=True), tried, PROFILE) == [2, 2]


@pytest.mark.parametrize("speedup", [1.05, 1.5, 1.8, 2.2, 2.3])
def test_the_choice_for_a_speedup_is_the_best_of_all_choices(speedup):
    loss_increases = np.random.default_rng(0).random((2, 3))
    tried = options(*np.sort(loss_increases, axis=1))
    picked = choose(settings(speedup=speedup), tried, PROFILE)
    fits = {}
    for ks in itertools.product(range(4), repeat=2):
        chosen = [block[k] for block, k in zip(tried, ks, strict=True)]
        if PROFILE.reach([o.times_us for o in chosen]) >= speedup:
            fits[ks] = sum(o.loss_increase for o in chosen)
    assert fits[tuple(picked)] == min(fits.values())


def test_an_impossible_speedup_names_the_best_and_the_ceiling():
    with pytest.raises(ValueError, match=r"speedup 3.00x cannot be reached here: .* give 2.33x, .* 2.50x faster"):
        choose(settings(speedup=3.0), options((1, 2, 3), (1, 2, 3)), PROFILE)


def test_the_shortlist_prefers_many_neurons_among_the_fast():
    assert shortlist([Shape(1, 3)] * 4, [1.0, 1.2, 1.25, 2.0], [100, 300, 200, 900]) == [1, 2, 0]


@pytest.mark.parametrize(("active", "leaf_width", "shared"), [(0.1, 15, 112), (0.03, 6, 24)])
def test_the_shapes_that_did_best_are_tried(active, leaf_width, shared, monkeypatch):
    """On all-MiniLM-L6-v2, whose layers have this size; every part of the work has its decision on the short list."""
    monkeypatch.undo()  # the two shapes that whole conversions try in tests
    dense = random_dense(neurons=1536, width=384)
    asked = settings(active=active)
    shapes = shapes_of(asked, dense)
    fitted = [s.fit(dense, asked.share) for s in shapes]
    tried = [fitted[k] for k in shortlist(shapes, [1.0] * len(shapes), [stored_neurons(d) for d in fitted])]
    best = {"trees": 2, "depth": 5, "leaf_width": leaf_width, "shared": shared}
    assert any(best.items() <= d.items() for d in tried)
    assert {"shared" in d for d in tried} == {True, False}


def test_shapes_have_the_shared_part_that_was_asked_for():
    dense = random_dense(neurons=1536, width=384)
    assert {s.fit(dense, 0.1).get("shared", 0) for s in shapes_of(settings(shared=40), dense)} == {40}
    assert {s.fit(dense, 0.1).get("shared", 0) for s in shapes_of(settings(), dense)} == {0, 80, 112}
    for s in shapes_of(settings(), dense):
        assert flops(dense, s.fit(dense, 0.1)) <= 0.1 * dense.flops_per_row
    assert shares_of(settings(active=0.6)) == [0.6, 0.3]


def test_an_impossible_share_names_the_least(tmp_path):
    with pytest.raises(ValueError, match=r"active 0.10% is below \d+\.\d+%, the least"):
        survey(tiny(), settings(active=0.001, shapes=((1, 8),)))


def test_a_survey_refuses_what_amdahl_forbids_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"speedup 50.00x cannot be reached here: .* faster"):
        survey(tiny(), settings(speedup=50.0, shapes=((1, 8),), timing_s=0.002))


def test_a_model_with_a_layer_replaced_is_itself_again_afterwards():
    for model_type in ("bert", "gpt2"):
        model = tiny(model_type)
        family = family_of(model_type)
        ids = torch.arange(6).unsqueeze(0)
        with torch.no_grad():
            before = model(ids)[0]
            with family.replaced(family.blocks_of(model)[1], torch.nn.Identity()):
                assert not torch.equal(model(ids)[0], before)
            assert torch.equal(model(ids)[0], before)


def test_a_speedup_budget_leaves_the_harmful_layer_dense(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        candidates, "latency_profile", lambda *_: LatencyProfile(model_us=(100.0,), dense_us=((30.0,), (30.0,)))
    )
    monkeypatch.setattr(candidates.Timer, "__call__", lambda *_: (10.0,))
    monkeypatch.setattr(candidates.Trials, "try_out", lambda _, block, __, **___: (0.5, 1.0 + block))
    model = saved(tmp_path / "model", tokenizer)
    changes = {"active": None, "speedup": 1.25, "baselines": (), "keep_slow": False}
    record = convert(settings_for(tmp_path, model, text, **changes))
    assert [layer["description"] is None for layer in record["layers"]] == [False, True]
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "the speedup is reached without it" in page


def test_trees_slower_than_the_layer_are_refused_before_any_work(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        candidates, "latency_profile", lambda *_: LatencyProfile(model_us=(100.0,), dense_us=((30.0,), (30.0,)))
    )
    monkeypatch.setattr(candidates.Timer, "__call__", lambda *_: (40.0,))
    model = saved(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match=r"no candidate is faster than the dense layer at active 30.0%"):
        convert(settings_for(tmp_path, model, text, keep_slow=False))


def test_layers_go_back_until_the_loss_is_kept(tokenizer, text, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", tokenizer)
    table = pairs_table(tmp_path / "pairs.tsv")
    monkeypatch.setattr(
        DistillContext, "held_out_loss", lambda _, student: sum(map(id_of_converted, converted_blocks(student)))
    )
    scores = iter([80.0, 80.0, 50.0, 79.5])  # dense, before distillation, after it, one layer back
    monkeypatch.setattr("fastff.convert.quality.similarity", lambda *_, **__: next(scores))
    record = convert(settings_for(tmp_path, model, text, baselines=(), tables=(table,), max_loss=0.01))
    assert [layer["description"] is None for layer in record["layers"]] == [False, True]
    assert "more than the allowed loss" in record["layers"][1]["reason"]
    assert record["variants"]["chosen"]["after"] == 79.5
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    blocks, dense = (family_of("bert").blocks_of(one) for one in (loaded, tiny()))
    assert all(torch.equal(tensor, dense[1].state_dict()[name]) for name, tensor in blocks[1].state_dict().items())
    assert not torch.equal(blocks[0].attention.self.query.weight, dense[0].attention.self.query.weight)


@pytest.mark.parametrize("active", [0.1, 0.5, 0.9])
def test_no_candidate_stores_more_than_a_few_times_the_layers_neurons(active):
    dense = random_dense(neurons=256, width=32)
    settings = ConversionSettings(model="m", text="t", out="o", active=active)
    shapes = shapes_of(settings, dense)
    for share in (*shares_of(settings), 1.0):
        made = [shape.fit(dense, share) for shape in shapes]
        assert all(stored_neurons(d) <= choose_layers.MOST_STORED * 256 for d in made if d is not None)
        assert share < active or None not in made, "a shape has a layer at every greater share, too"
    at_once = [str(shape.fit(dense, active)) for shape in shapes]
    assert len(set(at_once)) == len(at_once), "none is timed twice"
    widest = max(stored_neurons(d) for share in shares_of(settings) for s in shapes if (d := s.fit(dense, share)))
    assert stored_neurons(largest(settings, [dense])[0]) == widest


def test_how_many_layers_go_back_is_found_by_halving(monkeypatch):
    """Of eight, the last are the most damaging and five must go back; a student is here the blocks that it got back."""
    monkeypatch.setattr(distill_context, "restore", lambda _, __, blocks: tuple(blocks))
    monkeypatch.setattr(distill_context, "converted_blocks", lambda _: list(range(8)))
    monkeypatch.setattr(DistillContext, "held_out_loss", lambda _, student: -student[0])
    measured = []

    def quality(student):
        measured.append(len(student))
        return 80.0 if len(student) >= 5 else 40.0 + len(student)

    asked = SimpleNamespace(max_loss=0.01)
    context = DistillContext(asked, "embedding", None, (), (), (), quality, {"other": len}, lambda *_: None)
    student, facts, restored = context.keep_loss((), {"after": 40.0}, before=80.0)
    assert restored == [7, 6, 5, 4, 3]
    assert student == tuple(restored)
    assert facts == {"after": 80.0, "held_out_loss": -7, "further": {"other": 5}}
    assert measured == [7, 3, 5, 4]
    assert context.keep_loss((), {"after": 79.5}, before=80.0)[2] == []
    scores = {7: 78.9, 1: 79.5}  # a student may be better than the dense model, and than what stands between
    odd = replace(context, quality=lambda student: scores.get(len(student), 0.0))
    assert odd.keep_loss((), {"after": 79.0}, before=80.0)[2] == [7]


def id_of_converted(block):
    """Without block 1 the loss is least."""
    return 1 + block


def test_a_loss_that_cannot_be_kept_names_the_least(tokenizer, text, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", tokenizer)
    table = pairs_table(tmp_path / "pairs.tsv")
    scores = iter([80.0, 80.0, 50.0, 60.0])
    monkeypatch.setattr("fastff.convert.quality.similarity", lambda *_, **__: next(scores))
    with pytest.raises(ValueError, match=r"max_loss 1.00% cannot be kept: the least loss of those measured is 25.00%"):
        convert(settings_for(tmp_path, model, text, baselines=(), tables=(table,), max_loss=0.01))
    with pytest.raises(ValueError, match="needs an evaluation table"):
        convert(settings_for(tmp_path, model, text, max_loss=0.01, out=tmp_path / "out2"))


def test_a_curve_has_every_share_with_its_baselines(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer, "gpt2")
    record = convert(settings_for(tmp_path, model, text, curve=(0.5,), steps=2, layer_steps=1))
    (point,) = record["curve"]
    assert set(point["variants"]) == {"chosen", "narrow", "pruned"}
    assert point["asked"] == 0.5
    assert 0 < point["variants"]["chosen"]["active"] <= 0.5
    for variant in (*record["variants"].values(), *point["variants"].values()):
        assert len(variant["latency_ms"]) == len(variant["feedforward_ms"]) == 1
        assert variant["after"] > 1
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text())["curve"] == record["curve"]


def test_too_little_disk_or_memory_is_said_before_the_work(tokenizer, text, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match=r"needs about \d.\d\d GB of disk, .* has 0.00 GB free"):
            convert(settings_for(tmp_path, model, text))
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(CheckpointError, match=r"needs about \d.\d\d GB of memory .* this machine has 0.00 GB"):
            convert(settings_for(tmp_path, model, text))
    assert not list((tmp_path / "out" / "work").glob("*.f16"))


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_the_bytes_of_a_student_are_those_of_its_parameters(model_type):
    model = tiny(model_type)
    description = fit_tree(dense_layers(model)[0], 0.4, trees=2, depth=2, shared=4)
    student = make_converted(model, [description] * 2)
    real = 4 * sum(p.numel() for p in student.parameters())
    assert resources.student_bytes(model, [description] * 2) == pytest.approx(real, rel=0.1)  # but nodes and biases
