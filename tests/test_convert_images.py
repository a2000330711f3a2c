"""`fastff convert` of image models: pictures instead of text, features instead of tables, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

import fastff.models  # registers converted models
from cli_runner import invoke
from convert_cases import few_shapes, saved, settings_for, tokenizer
from fastff.convert import candidates, convert, distill_context
from fastff.convert import pictures as pictures_module
from fastff.convert.conversion import split_examples
from fastff.convert.dense_model import load_dense
from fastff.convert.distil_loss import distillation_loss
from fastff.convert.distill_context import converted_blocks
from fastff.convert.pictures import STORED, Pictures, picture_paths, store_pictures
from fastff.convert.quality import likeness
from fastff.engine.export import load_model
from fastff.errors import CheckpointError

PROCESSORS = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
}
SIDE, PATCH = 16, 4
PATCHES = {"vit": 17, "deit": 18, "dinov2": 17, "clip_vision_model": 17, "siglip_vision_model": 16}


def write_processor(folder, model_type, side=SIDE):
    square = {"height": side, "width": side}
    size = {"shortest_edge": side} if model_type in ("dinov2", "clip_vision_model") else square
    content = {"image_processor_type": PROCESSORS[model_type], "size": size, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def image_model(folder, model_type="vit", auto=AutoModel, **extra):
    """A tiny random model's directory."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    sizes |= {"image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3} | extra
    auto.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    write_processor(folder, model_type)
    return str(folder)


def write_pictures(folder, count=60):
    """Small pictures of waves, some of them in a folder below, of every format and size."""
    rng = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for k in range(count):
        height, width = rng.integers(14, 30, 2)
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0, 2, (3, 3))]
        picture = Image.fromarray((127 * (1 + np.stack(waves, -1))).astype(np.uint8))
        picture.save(folder / ("more" if k % 3 else ".") / f"{k:03d}{('.png', '.jpg', '.webp', '.JPEG')[k % 4]}")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "all")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Pieces of the photographs that scikit-learn carries."""
    folder = tmp_path_factory.mktemp("crops")
    for k, photograph in enumerate(load_sample_images().images):
        for row in range(0, 420, 42):
            for column in range(0, 640, 64):
                crop = Image.fromarray(photograph[row : row + 42, column : column + 64])
                crop.save(folder / f"{k}-{row:03d}-{column:03d}.png")
    return folder


def image_settings(folder, model, images, **changes):
    return settings_for(folder, model, None, **{"images": images, "shapes": ((1, 1), (3, 1)), "rows": 500, **changes})


def processor_of(model_type, folder):
    write_processor(folder, model_type)
    return AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("model_type", PROCESSORS)
def test_a_whole_conversion(model_type, pictures, tmp_path):
    model = image_model(tmp_path / "model", model_type)
    record = convert(image_settings(tmp_path, model, pictures, baselines=("narrow",)))
    assert record["kind"] == "image"
    assert record["shapes"] == ((1, PATCHES[model_type]), (3, PATCHES[model_type]))
    assert record["dense"]["quality"] == pytest.approx(100, abs=1e-3)
    assert 0 < record["variants"]["chosen"]["after"] < 100
    assert all(layer["description"] for layer in record["layers"])
    assert not (tmp_path / "out" / "work").exists()
    found = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert converted_blocks(found) == [0, 1]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(model).to_dict()
    with torch.no_grad():
        inputs = processor(images=[Image.open(picture_paths(pictures)[0]).convert("RGB")], return_tensors="pt")
        assert found(**inputs).last_hidden_state.shape == (1, PATCHES[model_type], 32)


def test_what_is_said_of_an_image_model_is_of_pictures(pictures, tmp_path):
    convert(image_settings(tmp_path, image_model(tmp_path / "model"), pictures, baselines=()))
    card, page = (tmp_path / "out" / "README.md").read_text(), (tmp_path / "out/report/index.html").read_text()
    for said in (card, page):
        assert "1 picture takes" in said
        assert "3 pictures take" in said
        assert "cosine with dense features x 100, pictures kept aside: 100.00 before" in said
        assert "tokens" not in said
        assert "held-out text" not in said
    assert "from transformers import AutoImageProcessor, AutoModel\n" in card
    assert 'processor = AutoImageProcessor.from_pretrained("path/to/this/directory")' in card


def test_stored_pictures_are_what_the_processor_makes_and_are_opened_again(pictures, tmp_path):
    processor, paths = processor_of("vit", tmp_path), picture_paths(pictures)
    assert len(paths) == 60
    assert paths == sorted(paths)
    stored = store_pictures(processor, paths, tmp_path, patches=17)
    assert (len(stored), stored.tokens, stored.picture) == (60, 60 * 17, (3, 16, 16))
    order = np.random.default_rng(0).permutation(60)
    some = np.array([3, 58])
    want = [processor(images=Image.open(paths[order[k]]).convert("RGB"), return_tensors="pt") for k in some]
    got = stored.batch(some)
    assert set(got) == {"pixel_values"}
    # Stored in half precision: values up to 1 are off by 2**-11 at most.
    assert torch.allclose(got["pixel_values"], torch.cat([w["pixel_values"] for w in want]), atol=1e-3)
    again = store_pictures(None, paths, tmp_path, patches=17)  # opened: no processor is asked
    assert np.array_equal(again.pixel_values, stored.pixel_values)
    part = stored.slice(10, 20)
    assert (len(part), part.tokens) == (10, 170)
    assert np.array_equal(part.pixel_values, stored.pixel_values[10:20])
    one_pass = [which for which, _ in zip(part.shuffled(4, seed=1), range(3), strict=False)]
    assert sorted(np.concatenate(one_pass)) == list(range(10))


def test_pictures_of_other_modes_are_read_as_colours_or_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "turned.webp", lossless=True, exif=exif)
    (tmp_path / "._grey.png").write_bytes(b"not a picture")
    paths = picture_paths(tmp_path)
    assert [path.name for path in paths] == ["alpha.png", "grey.png", "palette.png", "turned.webp"]
    for path in paths:
        read = np.asarray(pictures_module._read(path))
        assert read.shape == (16, 16, 3)
        assert np.array_equal(read[..., 0], np.rot90(ramp, -1) if path.name == "turned.webp" else ramp)
    Image.fromarray(ramp.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(
        CheckpointError, match=r"deep\.png is not a picture that can be read: mode I;16, expected 8 bits"
    ):
        pictures_module._read(tmp_path / "deep.png")


def test_no_more_pictures_are_stored_than_can_be_learned_from(pictures, tmp_path):
    seen = []
    settings = image_settings(tmp_path, image_model(tmp_path / "model"), pictures, steps=1, batch=20, rows=300)
    convert(settings, progress=lambda stage, *of: seen.append(of) if stage == "pictures" else None)
    assert [of[:2] for of in seen] == [(22, 22)]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.9])
def test_damaged_stored_pictures_are_named(keep, pictures, tmp_path):
    processor, paths = processor_of("vit", tmp_path), picture_paths(pictures)
    store_pictures(processor, paths, tmp_path, patches=17)
    content = (tmp_path / STORED).read_bytes()
    (tmp_path / STORED).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"pictures\.npy is damaged"):
        store_pictures(processor, paths, tmp_path, patches=17)
    (tmp_path / STORED).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"float16 \(60, 3, 16, 16\), expected float16 of 59 pictures"):
        store_pictures(processor, paths[:-1], tmp_path, patches=17)


def test_distillation_on_photographs_brings_the_features_nearer_to_those_of_the_dense_model(
    crops, tmp_path, monkeypatch
):
    monkeypatch.setattr(candidates.Timer, "__call__", lambda *_: (10.0, 10.0))  # so that both runs choose alike
    model = image_model(tmp_path / "model")
    changes = {"active": 0.25, "baselines": (), "rows": 3000, "steps": 60, "batch": 16}
    with_it = convert(image_settings(tmp_path / "with", model, crops, **changes))["variants"]["chosen"]
    monkeypatch.setattr(distill_context, "distil", lambda student, *_, **__: student.eval())
    without = convert(image_settings(tmp_path / "without", model, crops, **changes))["variants"]["chosen"]
    assert without["after"] == with_it["before"]
    assert with_it["held_out_loss"] < 0.8 * without["held_out_loss"]
    assert 100 - with_it["after"] < 0.8 * (100 - without["after"])


def test_an_interrupted_conversion_resumes_where_it_stopped(pictures, tmp_path):
    settings = image_settings(tmp_path, image_model(tmp_path / "model"), pictures, baselines=("narrow",))
    stages = []

    def stop(stage, done, *_):
        if (stage, done) == ("distil narrow", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(settings, progress=stop)
    stored = (tmp_path / "out" / "work" / STORED).stat().st_mtime_ns
    seen = []

    def watch(stage, done, *_):
        stages.append(stage)
        seen.append((tmp_path / "out" / "work" / STORED).stat().st_mtime_ns)

    record = convert(settings, progress=watch)
    assert record["continued"]
    assert set(seen) == {stored}
    assert {"distil narrow"} <= set(stages)
    assert not {"pictures", "capture", "probe", "timing", "distil chosen"} & set(stages)


def test_a_conversion_does_not_go_on_with_other_pictures(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    settings = image_settings(tmp_path, image_model(tmp_path / "model"), folder)

    def stop(stage, *_):
        if stage == "capture":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(settings, progress=stop)
    Image.new("RGB", (20, 20)).save(folder / "one-more.png")
    with pytest.raises(CheckpointError, match="holds another run: inputs"):
        convert(settings)


def test_max_loss_is_of_the_features(pictures, tmp_path):
    model = image_model(tmp_path / "model")
    settings = image_settings(tmp_path, model, pictures, max_loss=0.12, baselines=(), active=0.1)
    record = convert(settings)
    assert record["variants"]["chosen"]["after"] >= 88 - 1e-3
    assert any("dense again" in layer["reason"] for layer in record["layers"])


def test_the_metric_is_the_mean_cosine_of_the_models_own_features(pictures, tmp_path):
    model = AutoModel.from_pretrained(image_model(tmp_path / "model")).eval()
    other = AutoModel.from_pretrained(image_model(tmp_path / "model")).eval()
    with torch.no_grad():
        other.pooler.dense.bias.add_(0.5)
    examples = store_pictures(processor_of("vit", tmp_path), picture_paths(pictures), tmp_path, patches=17)
    with torch.no_grad():
        inputs = examples.batch(np.arange(60))
        a, b = model(**inputs).pooler_output, other(**inputs).pooler_output
    want = 100 * torch.nn.functional.cosine_similarity(a, b).mean()
    assert likeness(model, examples)(other) == pytest.approx(float(want), abs=1e-3)
    assert float(want) < 99
    with torch.no_grad():  # of features alone, of which that metric is
        assert distillation_loss(other, model, inputs, "image", hidden_states=False) > 0.1
        assert distillation_loss(model, model, inputs, "image", hidden_states=False) < 1e-5


def test_a_pooler_that_the_directory_lacks_does_not_decide(pictures, tmp_path):
    """Features are then the mean over patches, and not what random weights make of them."""
    folder = tmp_path / "model"
    image_model(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(folder)
    assert load_dense(str(folder))[0].pooler is None
    record = convert(image_settings(tmp_path, str(folder), pictures, baselines=()))
    assert "`pooler_output` is not trained" in (tmp_path / "out" / "README.md").read_text()
    assert record["dense"]["quality"] == pytest.approx(100, abs=1e-3)
    examples = store_pictures(processor_of("vit", tmp_path), picture_paths(pictures), tmp_path, patches=17)
    found, inputs = AutoModel.from_pretrained(tmp_path / "out").eval(), examples.batch(np.arange(4))
    model.eval()
    with torch.no_grad():
        assert distillation_loss(found, model, inputs, "image") > 0
        found.pooler.dense.weight.zero_()
        zeroed = likeness(model, examples)(found)
    assert zeroed > 10


def test_budgets_of_time_a_curve_and_another_model_beside(pictures, tmp_path):
    """The other one has another width and makes more patches of a picture; its features are not compared."""
    other = tmp_path / "other"
    image_model(other, "dinov2", patch_size=2)
    model = image_model(tmp_path / "model", "siglip_vision_model")
    changes = {"seconds": 600.0, "curve": (0.5,), "beside": str(other), "baselines": ()}
    record = convert(image_settings(tmp_path, model, pictures, **changes))
    assert 0 < record["curve"][0]["variants"]["chosen"]["after"] <= 100
    assert record["beside"]["scores"] == []
    assert all(ms > 0 for ms in record["beside"]["latency_ms"])
    assert len(record["beside"]["latency_ms"]) == 2
    with pytest.raises(ValueError, match="seconds 0 are too few"):
        convert(image_settings(tmp_path / "late", model, pictures, seconds=0.1))


def refused(tmp_path, *arguments):
    """The one line that the command says."""
    result = invoke(["convert", *map(str, arguments), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_one_of_text_and_images_must_be_given(tmp_path):
    assert "neither text nor images given, expected one: text for a language model" in refused(tmp_path, "model")
    both = refused(tmp_path, "model", "--text", "t.txt", "--images", "pictures")
    assert "text t.txt and images pictures given, expected one: text for" in both


def test_an_image_model_is_refused_text_tables_and_engines(pictures, tmp_path):
    model = image_model(tmp_path / "model")
    assert f"text t.txt: {model} is an image model, expected images" in refused(tmp_path, model, "--text", "t.txt")
    with_table = refused(tmp_path, model, "--images", pictures, "--table", "t.tsv")
    assert "table t.tsv: an image model is measured on a part of the images" in with_table
    for engine in ("native", "openvino"):
        said = refused(tmp_path, model, "--images", pictures, "--time-on", engine)
        assert f"time_on '{engine}': that engine has no image models, expected cpu or cuda" in said


def test_a_converted_image_model_is_not_exported(pictures, tmp_path):
    convert(image_settings(tmp_path, image_model(tmp_path / "model"), pictures, baselines=()))
    for folder in ("model", "out"):
        with pytest.raises(CheckpointError, match="cannot be loaded: it reads pictures, expected a model of text"):
            load_model(str(tmp_path / folder))


def test_a_text_model_is_refused_images(tokenizer, pictures, tmp_path):
    model = saved(tmp_path / "model", tokenizer)
    said = refused(tmp_path, model, "--images", pictures)
    assert f"images {pictures}: {model} reads text, expected text" in said


def test_folders_without_enough_pictures_are_refused(pictures, tmp_path):
    model, empty = image_model(tmp_path / "model"), tmp_path / "empty"
    assert f"images {empty} is not a folder" in refused(tmp_path, model, "--images", empty)
    empty.mkdir()
    (empty / "a.txt").write_text("no picture")
    assert f"images {empty} holds no picture, expected files .jpeg, .jpg" in refused(tmp_path, model, "--images", empty)
    few = refused(tmp_path, model, "--images", pictures, "--rows", 1000, "--batch", 8)
    assert f"images {pictures} holds 60 pictures, at least 62 are needed: 8 (batch) and 1000 patches (rows)" in few
    few = refused(tmp_path, model, "--images", pictures, "--rows", 100, "--batch", 64)
    assert "at least 67 are needed: 64 (batch)" in few
    assert not (tmp_path / "out" / "work").exists()


def test_a_dinov2_takes_pictures_of_another_size_than_its_configuration_names(pictures, tmp_path):
    model = image_model(tmp_path / "model", "dinov2")
    write_processor(tmp_path / "model", "dinov2", side=20)
    record = convert(image_settings(tmp_path, model, pictures, baselines=()))
    assert record["shapes"] == ((1, 26), (3, 26))


def test_just_enough_pictures_are_split(pictures, tmp_path):
    settings = image_settings(tmp_path, "model", pictures, rows=57 * 17, max_length=17, batch=8)
    learned, held_out = split_examples(settings, processor_of("vit", tmp_path), "image", tmp_path)
    assert isinstance(learned, Pictures)
    assert (len(learned), len(held_out)) == (57, 2)  # of 60, no more than needed
    with pytest.raises(CheckpointError, match="holds 60 pictures, at least 61 are needed"):
        split_examples(
            image_settings(tmp_path, "model", pictures, rows=57 * 17 + 1, max_length=17), None, "image", tmp_path
        )


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_a_file_that_is_no_picture_is_named(content, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    bad = folder / "more" / "bad.png"
    if content == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(bad)
        content = bad.read_bytes()[:2000]
    bad.write_bytes(content)
    model = image_model(tmp_path / "model")
    said = refused(tmp_path, model, "--images", folder, "--rows", 500, "--batch", 8)
    assert f"{bad} is not a picture that can be read" in said
    assert not (tmp_path / "out" / "work").exists()


def test_a_model_without_an_image_processor_or_with_that_of_another_is_refused(pictures, tmp_path):
    model = image_model(tmp_path / "model")
    write_processor(tmp_path / "model", "vit", side=20)
    said = refused(tmp_path, model, "--images", pictures)
    assert "the image processor makes pictures of 3x20x20: " in said
    assert "16*16" in said
    Path(model, "preprocessor_config.json").unlink()
    assert "has no image processor that loads (preprocessor_config.json)" in refused(
        tmp_path, model, "--images", pictures
    )


def test_pictures_of_different_sizes_are_refused(pictures, tmp_path):
    """A processor that keeps the proportions gives a model nothing that fits into one array."""
    model = image_model(tmp_path / "model", "dinov2")
    path = Path(model, "preprocessor_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": False}))
    said = refused(tmp_path, model, "--images", pictures, "--rows", 500, "--batch", 8)
    assert "the image processor" in said
    assert "one size" in said or "equally large" in said


def test_a_head_that_would_be_lost_is_refused(pictures, tmp_path):
    model = image_model(tmp_path / "model", auto=AutoModelForImageClassification)
    said = refused(tmp_path, model, "--images", pictures)
    assert "ViTForImageClassification has a head that a conversion would lose" in said
