"""How long a conversion takes: the estimate, a budget of seconds, pieces of a step, and where it is timed."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convert_cases import WORDS, few_shapes, random_dense, saved, settings_for, text, tiny, tokenizer
from fastff import timing
from fastff.convert import candidates, conversion, convert, distil, engine_latency, latency, time_budget
from fastff.convert.beside import Beside
from fastff.convert.choose_layers import LatencyProfile, Option, Shape
from fastff.convert.conversion_record import Point, runner_up, standing
from fastff.convert.conversion_report import layer_rows
from fastff.convert.conversion_settings import BATCH, ConversionSettings
from fastff.convert.engine_latency import EngineTimes
from fastff.convert.latency import place_name, place_of
from fastff.convert.quality import measures_of
from fastff.convert.time_budget import TimeLeft, TimeLimit, Timetable, duration, timetable, typical_batches
from fastff.errors import CheckpointError, FileError
from fastff.io import alone_in
from fastff.text.examples import TextExamples

PROFILE = LatencyProfile(model_us=(50_000.0,), dense_us=((30_000.0,),))


def examples_of(lengths):
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return TextExamples(np.zeros(offsets[-1], dtype=np.uint32), offsets, 0)


def context_of(**changes):
    settings = ConversionSettings(
        model="m", text="t", out="o", **{"steps": 1000, "batch": 10, "timing_s": 0.0, **changes}
    )
    return SimpleNamespace(
        settings=settings, examples=examples_of([20] * 100), held_out=examples_of([20] * 5), captured=[]
    )


def count(monkeypatch, **changes):
    """Two students, steps of 2 s, 30 s for the other's layers, 5 s for the scores of one."""
    monkeypatch.setattr(time_budget, "step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: 100.0)
    options = {"build_s": 30.0, "scores_s": 5.0, "profile": PROFILE}
    limit = TimeLimit(changes.get("seconds"), 40.0)
    return timetable(context_of(**changes), [["a"], ["b"]], limit=limit, **options)


def test_without_a_budget_all_steps_are_taken_and_the_rest_is_estimated(monkeypatch):
    table = count(monkeypatch)
    # Half a step of both students on half as many tokens: 1 s. Six calls of three models and their layers: 1.8 s.
    assert table == Timetable(2, 1000, 4.0, pytest.approx(30 + 20 + 1 + 1.8), 60.0)
    assert table.left_s == pytest.approx(4052.8)
    assert str(table) == "about 68 min left: 2 models, 1000 steps of 2 s each, and 53 s for the rest"


def test_a_budget_of_seconds_leaves_as_many_steps_as_fit(monkeypatch):
    table = count(monkeypatch, seconds=1000.0)
    assert table.steps == int(0.95 * (1000 - 60 - 52.8) / 4)
    assert table.spent_s + table.left_s < 1000
    assert count(monkeypatch, seconds=1e6).steps == 1000


def test_too_few_seconds_name_what_is_needed(monkeypatch):
    with pytest.raises(ValueError, match="seconds 130 are too few: 155 are needed for 10 joint steps"):
        count(monkeypatch, seconds=130.0)
    assert count(monkeypatch, seconds=155.0).steps == 10


@pytest.mark.parametrize(("seconds", "said"), [(7.4, "7 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_written_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_the_batches_that_are_timed_are_as_long_as_all_in_the_mean():
    lengths = np.random.default_rng(0).integers(3, 60, size=2000)
    batches = typical_batches(examples_of(lengths), 16, seed=0)
    longest = [lengths[which].max() for which in batches]
    assert longest == sorted(longest)
    assert np.mean(longest) == pytest.approx(lengths.mean(), rel=0.15)


def test_a_step_of_many_logits_is_cut_into_pieces():
    examples, which = examples_of([8] * 30), np.arange(3, 23)
    found = distil.pieces(examples, which, "causal", 100, most=8 * 100 * 6)
    assert [len(piece) for piece in found] == [5, 5, 5, 5]
    assert np.array_equal(np.concatenate(found), which)
    assert len(distil.pieces(examples, which, "masked", 100, most=1)) == 20
    assert len(distil.pieces(examples, which, "embedding", 100, most=1)) == 1


def test_pieces_teach_what_the_whole_step_teaches(monkeypatch):
    """Up to the hidden states' variance, which is that of a piece."""
    gradients = {}
    for limit in (2**28, 62 * 8 * 3):
        monkeypatch.setattr(distil, "LOGITS", limit)
        teacher, student = tiny("gpt2"), tiny("gpt2", seed=1)
        examples = TextExamples(np.random.default_rng(0).integers(2, 62, 96), np.arange(0, 97, 8), 0)
        recipe = distil.Recipe(steps=1, batch=12)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        distil.distil(student, teacher, examples, recipe, kind="causal")
        gradients[limit] = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    whole, cut = gradients.values()
    assert not torch.equal(whole, cut)
    assert torch.nn.functional.cosine_similarity(whole, cut, dim=0) > 0.97
    assert float(cut.norm() / whole.norm()) == pytest.approx(1, abs=0.1)


def test_models_are_timed_where_they_are_or_where_one_says():
    model = tiny()
    assert place_of(model, None) == place_of(model, "cpu") == torch.device("cpu")
    threads = torch.get_num_threads()
    assert place_name(torch.device("cpu")) == f"CPU, {threads} thread{'s' * (threads > 1)}"
    with pytest.raises(ValueError, match="time_on 'gpu' is not one of cpu, cuda"):
        ConversionSettings(model="m", text="t", out="o", time_on="gpu")
    with pytest.raises(ValueError, match="seconds -1"):
        ConversionSettings(model="m", text="t", out="o", seconds=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_timing_on_a_gpu_that_is_not_there_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="there is no GPU here"):
        convert(settings_for(tmp_path, "model", text, time_on="cuda"))


def test_a_budget_that_is_too_small_is_mended_by_more_seconds(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer)
    settings = settings_for(
        tmp_path, model, text, steps=12, batch=0, max_length=900, baselines=("none",), time_on="cpu"
    )
    with pytest.raises(ValueError, match=r"seconds 0 are too few: \d+ are needed for the dense model's part alone"):
        convert(replace(settings, seconds=0.01))
    said, taken = [], []
    record = convert(
        replace(settings, seconds=3600.0), say=said.append, progress=lambda what, done, of, _: taken.append((what, of))
    )
    assert said[0].startswith("trying ")
    assert len([line for line in said if line.startswith("about ")]) == 1
    assert record["continued"]
    assert record["timetable"]["steps"] == 12
    assert ("distil chosen", 12) in taken
    assert record["variants"]["chosen"]["steps"] == record["variants"]["none"]["steps"] == 12
    assert record["settings"]["batch"] == BATCH["embedding"]
    assert record["settings"]["max_length"] == 512  # positions of the model
    assert "interrupted" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_settings_that_were_refused_can_be_put_right(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match="tokens to learn from"):
        convert(settings_for(tmp_path, model, text, rows=900_000))
    assert not (tmp_path / "out" / "work").exists()


def test_further_tables_are_told_but_decide_nothing(tokenizer, text, tmp_path):
    model = saved(tmp_path / "model", tokenizer, "gpt2")
    for name, lines in (("first", 40), ("second", 60)):
        (tmp_path / f"{name}.txt").write_text("\n".join(" ".join(WORDS[k % 50 :]) for k in range(lines)))
    tables = (tmp_path / "first.txt", tmp_path / "second.txt")
    record = convert(settings_for(tmp_path, model, text, tables=tables, baselines=("none",), steps=2, layer_steps=1))
    names = [f"{tmp_path.name}/{name}" for name in ("first", "second")]
    assert record["tables"] == names
    for figures in (record["dense"], *record["variants"].values()):
        assert list(figures["further"]) == names[1:]
        assert all(score > 1 for score in figures["further"].values())
    head, dense = (
        line for line in (tmp_path / "out/README.md").read_text().splitlines() if line[:4] in ("| mo", "| de")
    )
    assert f"perplexity, {names[0]} | perplexity, {names[1]} |" in head
    assert f"{record['dense']['quality']:.2f} | {record['dense']['further'][names[1]]:.2f} |" in dense
    assert json.loads((tmp_path / "out/report/report.json").read_text())["tables"] == names


@pytest.mark.parametrize(
    ("kind", "content", "why"),
    [
        ("masked", "a", "a masked model has no metric"),
        ("causal", "w1 w2", "less than one block of 8 tokens"),
        ("embedding", "sentence1\tlabel\nx\t1", "has no column sentence2, only sentence1, label"),
        ("classifier", "sentence\nx", "has no column label"),
        ("classifier", "text\tlabel\nx\t1", "has no column sentence or sentence1, only text, label"),
        ("classifier", "sentence\tlabel\nx\tgood", "label 'good' of row 1 is not the number of a class"),
    ],
)
def test_a_table_of_no_use_is_refused_with_the_reason(kind, content, why, tokenizer, tmp_path):
    table = tmp_path / ("a.txt" if kind == "causal" else "a.tsv")
    table.write_text(content + "\n")
    with pytest.raises(CheckpointError, match=why):
        measures_of(kind, tokenizer, (table,), tmp_path / "work", max_length=8, max_tokens=100)


def test_tables_of_one_name_are_refused(tokenizer, tmp_path):
    tables = tmp_path / "dev.tsv", tmp_path / "dev.csv"
    tables[0].write_text("sentence1\tsentence2\tlabel\na\tb\t1\n")
    tables[1].write_text("sentence1,sentence2,label\na,b,1\n")
    with pytest.raises(CheckpointError, match=rf"two tables are named {tmp_path.name}/dev"):
        measures_of("embedding", tokenizer, tables, tmp_path / "work", max_length=8, max_tokens=100)
    other = tables[1].rename(tmp_path / "dev.de.csv")
    found = measures_of("embedding", tokenizer, (tables[0], other), tmp_path / "work", max_length=8, max_tokens=100)
    assert list(found) == [f"{tmp_path.name}/dev", f"{tmp_path.name}/dev.de"]


def test_a_model_that_diverged_is_never_the_best():
    point = Point(None, None, [], ())
    point.variants = {
        name: {"after": loss} for name, loss in [("chosen", float("nan")), ("narrow", 70.0), ("none", 90.0)]
    }
    assert point.ranking("causal") == ["narrow", "none", "chosen"]
    assert point.ranking("embedding") == ["none", "narrow", "chosen"]


def test_the_converted_model_does_not_take_the_place_of_the_dense_one(tokenizer, text, tmp_path):
    folder = Path(saved(tmp_path / "model", tokenizer))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    settings = replace(settings_for(tmp_path, str(folder), text), out=tmp_path / "other" / ".." / "model")
    with pytest.raises(ValueError, match="is the folder of the model itself"):
        convert(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_model_under_the_same_name_is_not_mixed_in(tokenizer, text, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", tokenizer)
    settings = settings_for(tmp_path, folder, text, baselines=())

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_timetable", cut_off)
        with pytest.raises(KeyboardInterrupt):
            convert(settings)
    assert (settings.out / "work" / "plan.json").is_file()
    saved(tmp_path / "model", tokenizer, seed=1)
    with pytest.raises(FileError, match=r"holds another run: inputs .*model\.safetensors"):
        convert(settings)


def test_two_conversions_do_not_write_into_one_folder(tokenizer, text, tmp_path):
    settings = settings_for(tmp_path, saved(tmp_path / "model", tokenizer), text)
    settings.out.mkdir()
    with alone_in(settings.out, "converts into"), pytest.raises(FileError, match="another process converts into"):
        convert(settings)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_candidate_is_measured_as_what_it_would_be(pruned, monkeypatch):
    """A pruned layer is taught nothing, and so it is measured untaught."""
    teacher, trials = tiny(), candidates.Trials.__new__(candidates.Trials)
    trials.teacher, trials.family = teacher, candidates.family_of(teacher.config.model_type)
    trials.dense, trials.captured = candidates.dense_layers(teacher), [None] * teacher.config.num_hidden_layers
    trials.settings = SimpleNamespace(layer_steps=3, probe_rows=8)
    trials.batches, trials.wanted, trials.trained_s = [], [], float("inf")
    monkeypatch.setattr(candidates, "teach_layer", lambda *_, **__: 0.25)
    monkeypatch.setattr(candidates, "prune_layer", lambda *_: 0.75)
    found = trials.try_out(
        0, {"kind": "dense", "intermediate_size": 4, "activation": "gelu", "bias": True}, pruned=pruned
    )
    assert found == (0.75 if pruned else 0.25, 0.0)
    assert (trials.trained_s == float("inf")) is pruned


def test_a_slow_phase_says_within_a_minute_how_long_it_will_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now[0])
    said, passed = [], []
    report = TimeLeft(lambda *step: passed.append(step), said.append)
    for done in range(1, 31):
        now[0] += 12
        report("probe", done, 30)
    assert len(passed) == 30
    assert said[0] == "probe: 3 of 30, about 5 min left"  # at 36 s
    assert len(said) == 6  # every minute
    report("layers tree", 1, 2)
    assert len(said) == 6  # nothing is known of it yet


def test_what_a_limit_leaves_no_time_for_is_refused_after_the_first_candidate(tokenizer, text, tmp_path, monkeypatch):
    tried = []

    def try_out(trials, block, description, pruned=False):
        tried.append(block)
        trials.trained_s = 1e6
        return 0.5, 1.0

    monkeypatch.setattr(candidates.Trials, "try_out", try_out)
    settings = settings_for(tmp_path, saved(tmp_path / "model", tokenizer), text, baselines=("narrow",), seconds=3600.0)
    said = []
    with pytest.raises(ValueError, match=r"seconds 3600 are too few: 400\d{4} are needed for the layers of 2 models"):
        convert(settings, say=said.append)
    assert tried == [1]
    assert re.match(r"trying \d+ candidates takes about ", said[0])  # those that were measured slower are left out
    assert (tmp_path / "out" / "work" / "input-000.f16").is_file()  # with more seconds it goes on from here


def test_the_layers_of_a_first_student_are_given_up_when_they_cannot_end_in_time(
    tokenizer, text, tmp_path, monkeypatch
):
    class Slow(TimeLimit):
        """Time flies while layers are taught."""

        def check(self, needed_s, what):
            super().check(needed_s * (1e9 if what.startswith("the layers") else 1), what)

    monkeypatch.setattr(candidates.Trials, "trained_s", 0.0, raising=False)
    monkeypatch.setattr(conversion, "TimeLimit", Slow)
    monkeypatch.setattr(candidates.Trials, "try_out", lambda *_, **__: (0.5, 1.0))
    monkeypatch.setattr(conversion, "probe", cheap_probe)
    taught = []
    settings = settings_for(tmp_path, saved(tmp_path / "model", tokenizer), text, baselines=(), seconds=3600.0)
    with pytest.raises(ValueError, match="are needed for the layers of 1 models alone"):
        convert(settings, progress=lambda what, done, *_: taught.append((what, done)))
    assert [done for what, done in taught if what == "layers chosen"] == [1]


def cheap_probe(trials, found, shares, progress, _out_of_time):
    return candidates.probe(trials, found, shares, progress, lambda: False)


def test_out_of_time_the_nearest_block_stands_for_those_that_were_not_tried():
    dense = random_dense(neurons=128, width=32)
    tried = []

    class Trials:
        settings = settings_for(Path(), "m", "t", shapes=((1, 8),))
        teacher = SimpleNamespace(config=SimpleNamespace(hidden_size=32), device=torch.device("cpu"))

        def __init__(self, blocks):
            self.dense = [dense] * blocks

        def try_out(self, block, description, *, pruned):
            tried.append(block)
            return 0.1 * block, float(block)

    shapes = (Shape(2, 3), Shape(1, 3))
    found = SimpleNamespace(shapes=shapes, profile=LatencyProfile((100.0,), ((30.0,),) * 6))
    shares = [0.6, 0.3]
    options, measured = candidates.probe(Trials(6), found, shares, lambda *_: None, lambda: len(tried) >= 6)
    assert tried[:2] == [3, 3]  # both shapes on the middle block
    assert len(tried) == 6
    assert len(measured) == 2
    assert [len(block) for block in options] == [3] * 6
    for k, block in enumerate(options):
        for option in block[1:]:
            assert option.loss_increase == option.measured_on
        assert abs(block[2].measured_on - k) <= 2  # the share asked for was tried on three blocks
    whole, _ = candidates.probe(Trials(6), found, shares, lambda *_: None, lambda: False)
    assert all(option.measured_on == k for k, block in enumerate(whole) for option in block[1:])


def test_calls_that_are_very_slow_are_measured_once(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def slow():
        calls.append(1)
        now[0] += 60.0

    measured = latency._medians_us({"slow": slow}, 0.9, torch.device("cpu"))
    assert measured == {"slow": 60e6}
    assert len(calls) == 2


class Killed(Exception):
    """What ends a conversion at some point."""


def killed_at(stage, done_):
    def progress(what, done, *_):
        if (what, done) == (stage, done_):
            raise Killed

    return progress


def test_a_resumed_run_plans_its_steps_by_its_own_seconds(tokenizer, text, tmp_path, monkeypatch):
    """Until joint steps were taken; the time for the first student's layers is that of when they were taught."""
    seen = []

    def timetable_of(context, students, *, build_s, **_):
        seen.append(build_s)
        return Timetable(len(students), 3 + 3 * len(seen), 1e-6, 0.0, 0.0)

    monkeypatch.setattr(conversion, "timetable", timetable_of)
    monkeypatch.setitem(distil.distil.__kwdefaults__, "checkpoint_every", 2)
    settings = settings_for(tmp_path, saved(tmp_path / "model", tokenizer), text, baselines=("narrow",), steps=99)
    with pytest.raises(Killed):
        convert(replace(settings, seconds=3600.0), progress=killed_at("distil chosen", 1))
    with pytest.raises(Killed):
        convert(replace(settings, seconds=1800.0), progress=killed_at("distil chosen", 5))
    record = convert(replace(settings, seconds=900.0))
    assert len(seen) == 2
    assert seen[0] == seen[1] > 0
    assert {variant["steps"] for variant in record["variants"].values()} == {9}


def test_a_resumed_run_that_cannot_end_in_time_says_so(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        conversion, "timetable", lambda _, students, **__: Timetable(len(students), 6, 2000.0, 0.0, 0.0)
    )
    monkeypatch.setitem(distil.distil.__kwdefaults__, "checkpoint_every", 2)
    settings = settings_for(tmp_path, saved(tmp_path / "model", tokenizer), text, baselines=("narrow",))
    with pytest.raises(Killed):
        convert(settings, progress=killed_at("distil chosen", 5))
    # Two models, six steps of 1,000 s each, of which four were taken and kept.
    with pytest.raises(
        ValueError, match=r"seconds 600 are too few: 8\d\d\d are needed for the joint steps that are left"
    ):
        convert(replace(settings, seconds=600.0))
    assert convert(replace(settings, seconds=9000.0))["continued"]


def test_a_pruned_layer_is_not_taken_for_a_narrow_one_of_its_width():
    same = {"kind": "dense", "intermediate_size": 4, "activation": "gelu", "bias": True}
    options = [
        Option(None, 1.0, (9.0,)),
        Option(same, 0.1, (1.0,), 0.2, 0.4, kind="narrow"),
        Option(same, 0.1, (1.0,), 0.3, 0.2, kind="pruned"),
        Option({"kind": "none"}, 0.0, (0.0,), 1.0, 9.0, kind="none"),
    ]
    kinds = [standing(options, same, pruned=pruned).kind for pruned in (False, True)]
    assert kinds == ["narrow", "pruned"]
    assert standing(options, None, pruned=True).kind == "dense"
    assert runner_up(options, options[1])["kind"] == "pruned"
    assert runner_up(options, options[2])["kind"] == "narrow"
    layer = {"block": 0, "description": same, "kind": "pruned", "reason": "chosen", "unexplained": 0.3}
    layer |= {"options": [asdict(option) for option in options], "runner_up": None, "best_selection_unexplained": {}}
    (row,) = layer_rows({"layers": [layer]})
    assert row[2] == "chosen: pruned"
    assert row[5] == "0.2000"


def test_a_model_beside_may_take_fewer_tokens(tokenizer, tmp_path):
    saved(tmp_path / "short", tokenizer, max_position_embeddings=8)
    table = tmp_path / "table.tsv"
    rows = [f"{' '.join(WORDS[k : k + 12])}\t{' '.join(WORDS[k + 1 : k + 13])}\t{k}" for k in range(8)]
    table.write_text("sentence1\tsentence2\tlabel\n" + "\n".join(rows) + "\n")
    settings = settings_for(
        tmp_path, "model", "text", tables=(table,), max_length=20, shapes=((1, 8), (1, 9)), timing_s=0.001
    )
    found = Beside.of(str(tmp_path / "short"), "embedding").figures(settings, tmp_path / "work")
    assert len(found["scores"]) == 1
    assert found["latency_ms"][0] > 0
    assert found["latency_ms"][1] is None


def test_a_decoder_on_the_native_engine_is_timed_once_for_a_length(monkeypatch):
    """However many sequences: its tokens are generated one by one, so a batch takes as many times as long."""
    measured = []

    def timed(calls, *_, **__):
        measured.append(list(calls))
        for call in calls.values():
            call()
        return {name: SimpleNamespace(p50_us=8.0 * len(measured)) for name in calls}

    monkeypatch.setattr(engine_latency, "interleaved", timed)
    model = tiny("llama")
    model.config.architectures = [type(model).__name__]
    times = EngineTimes(model, "native", ((1, 8), (3, 8), (1, 4)), 0.01)
    tokens = engine_latency.DECODED
    assert times.whole(None) == (8.0 * 8 / tokens, 3 * 8.0 * 8 / tokens, 16.0 * 4 / tokens)
    assert len(measured) == 2
    assert times.layer({"kind": "none"}) == (0.0, 0.0, 0.0)
