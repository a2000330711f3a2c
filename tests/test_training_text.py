"""Reading text: every kind of source, and clear words for what cannot be read."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastff import io
from fastff.errors import TrainingError
from fastff.text import tokenizer as tokenizers
from fastff.text import tokens
from fastff.text.reading import documents
from training_cases import write_text


def test_every_kind_of_file_and_their_order(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("four é".encode()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"five\n\nsix"))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "d").mkdir()
    parquet.write_table(pyarrow.table({"text": ["seven", "", None, "eight"]}), tmp_path / "d" / "e.parquet")
    want = ["one\ntwo", "three", "four é", "five", "six", "seven", "eight"]
    assert list(documents([str(tmp_path)])) == want
    assert list(documents([str(tmp_path / "b.txt.xz"), str(tmp_path / "a.txt")])) == ["four é", "one\ntwo", "three"]


def test_a_column_of_numbers_is_no_text(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "count": [7]}), tmp_path / "a.parquet")
    with pytest.raises(TrainingError, match="column 'count' holds int64, expected text"):
        list(documents([str(tmp_path / "a.parquet")], column="count"))


def test_a_hub_data_set_is_streamed(monkeypatch):
    def load(path, config, *, split, streaming):
        assert (path, config, split, streaming) == ("owner/name", "en", "train", True)
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))
    assert list(documents(["datasets:owner/name:en"])) == ["a", "b"]
    with pytest.raises(TrainingError, match="has no column 'body', only text"):
        list(documents(["datasets:owner/name:en"], column="body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9\n".encode("latin-1"), r"latin.txt is not UTF-8 after line 0"),
        ("broken.txt.xz", b"not packed", r"broken.txt.xz cannot be read"),
        ("broken.parquet", b"not a table", r"broken.parquet cannot be read"),
        ("folder/x.doc", b"", r"folder holds no file of .txt"),
        ("missing", None, r"missing is neither a file nor a directory"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    source = path.parent if name.startswith("folder") else path
    with pytest.raises(TrainingError, match=message):
        list(documents([str(source)]))


def test_a_table_without_the_column_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(TrainingError, match="no column 'text', only body"):
        list(documents([str(tmp_path / "t.parquet")]))


@pytest.fixture
def tokenizer(tmp_path):
    text = write_text(tmp_path)
    return tokenizers.make_tokenizer(
        [str(text)], tmp_path / "tokenizer", vocab_size=200, exact=True, seq_len=16, column="text", most=10**5
    )


def test_a_trained_tokenizer_masks_and_pairs_like_bert(tokenizer):
    vocabulary = tokenizers.Vocabulary.of(tokenizer)
    assert vocabulary == tokenizers.Vocabulary(size=200, pad=0, first=2, last=3, mask=4, special=5)
    pair = tokenizer("a", "b")
    assert [pair["input_ids"][0], pair["input_ids"][-1], pair["input_ids"].count(3)] == [2, 3, 2]


def test_windows_hold_the_text_between_first_and_last(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    read = tokens.prepare_tokens([str(text)], tokenizer, tmp_path / "tokens", seq_len=10)
    flat = [
        i for document in documents([str(text)]) for i in [*tokenizer.encode(document, add_special_tokens=False), 3]
    ]
    assert read.meta["tokens"] == len(flat)
    assert len(read) == len(flat) // 8
    assert read.windows([2]).tolist() == [[2, *flat[16:24], 3]]
    assert read.windows([0, 1]).dtype == torch.int64
    open_ended = tokens.Tokens(tmp_path / "tokens", read.vocabulary, 10, closed=False)
    assert len(open_ended) == len(flat) // 9
    assert open_ended.windows([2]).tolist() == [[2, *flat[18:27]]]


def test_tokens_are_made_once_and_anew_for_another_text(tmp_path, tokenizer, monkeypatch):
    text, folder = tmp_path / "text.txt", tmp_path / "tokens"
    first = tokens.prepare_tokens([str(text)], tokenizer, folder, seq_len=10)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encoded", lambda *_: pytest.fail("read again"))
        assert len(tokens.prepare_tokens([str(text)], tokenizer, folder, seq_len=10)) == len(first)
    fewer = tokens.prepare_tokens([str(text)], tokenizer, folder, seq_len=10, most=100)
    assert fewer.meta["tokens"] == 100


def prepared(text, tokenizer, folder, **options):
    return tokens.prepare_tokens([str(text)], tokenizer, folder, seq_len=10, **options)


def test_a_text_that_has_changed_is_tokenised_anew(tmp_path, tokenizer):
    text, folder = tmp_path / "text.txt", tmp_path / "tokens"
    first = prepared(text, tokenizer, folder).meta
    content = text.read_text(encoding="utf-8")
    text.write_text(content[:500] + content[501:] + "x", encoding="utf-8")  # of the same size
    second = prepared(text, tokenizer, folder).meta
    assert second["sha256"] != first["sha256"]
    text.unlink()
    assert prepared(text, tokenizer, folder).meta == second, "tokens outlive their text"


def test_a_text_with_a_new_date_or_of_an_earlier_version_is_not_read_again(tmp_path, tokenizer, monkeypatch):
    text, folder = tmp_path / "text.txt", tmp_path / "tokens"
    meta = prepared(text, tokenizer, folder).meta
    os.utime(text, (1, 1))
    monkeypatch.setattr(tokens, "_encoded", lambda *_: pytest.fail("read again"))
    assert prepared(text, tokenizer, folder).meta == meta
    earlier = {name: value for name, value in meta.items() if name not in ("files", "sha256")}
    io.write_json(folder / "tokens.json", earlier)
    assert prepared(text, tokenizer, folder).meta == earlier


def test_a_directory_with_another_file_is_another_text(tmp_path, tokenizer):
    folder = tmp_path / "many"
    folder.mkdir()
    shutil.copy(tmp_path / "text.txt", folder / "a.txt")
    first = prepared(folder, tokenizer, tmp_path / "tokens").meta["tokens"]
    shutil.copy(tmp_path / "text.txt", folder / "b.txt")
    assert prepared(folder, tokenizer, tmp_path / "tokens").meta["tokens"] == 2 * first


def test_a_kill_between_the_two_files_trains_no_text_under_anothers_name(tmp_path, tokenizer, monkeypatch):
    one, folder = tmp_path / "text.txt", tmp_path / "tokens"
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether, of other words.\n\n" * 50)
    want = prepared(one, tokenizer, folder).ids.tolist()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(other, tokenizer, folder)
    assert prepared(one, tokenizer, folder).ids.tolist() == want


def test_tokens_of_a_killed_run_are_cleaned_up(tmp_path, tokenizer):
    folder = tmp_path / "tokens"
    prepared(tmp_path / "text.txt", tokenizer, folder)
    (folder / ".tokens.bin.4711.tmp").write_bytes(b"half")
    prepared(tmp_path / "text.txt", tokenizer, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokens.bin", "tokens.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids.write_bytes(ids.read_bytes()[:-2]), r"tokens.bin has \d+ bytes, expected \d+: remove"),
        (lambda ids: ids.write_bytes(ids.read_bytes() + b"00"), r"tokens.bin has \d+ bytes, expected \d+: remove"),
        (lambda ids: ids.write_bytes(b"\0\0" + ids.read_bytes()[2:]), r"tokens.bin is damaged"),
        (lambda ids: ids.unlink(), r"tokens.bin is missing"),
        (lambda ids: ids.with_name("tokens.json").write_text("{"), r"tokens.json is damaged"),
    ],
)
def test_damaged_tokens_are_named(tmp_path, tokenizer, damage, message):
    text, folder = tmp_path / "text.txt", tmp_path / "tokens"
    prepared(text, tokenizer, folder)
    damage(folder / "tokens.bin")
    with pytest.raises(TrainingError, match=message):
        prepared(text, tokenizer, folder)


def test_the_same_text_makes_the_same_tokenizer(tmp_path):
    """The trainer of the library gives another one in each of these runs."""
    text = list(documents([str(write_text(tmp_path))]))
    text += ["".join(chr(97 + (i * k) % 26) for i in range(9)) + " " for k in range(1, 400)]
    for options in ({}, {"alphabet": 12}):
        made = {tokenizers.train_tokenizer(lambda: text, 300, **options).to_str() for _ in range(3)}
        assert len(made) == 1, options


def test_a_tokenizer_of_another_size_is_not_taken_silently(tmp_path, tokenizer):
    options = {"seq_len": 16, "column": "text", "most": 10**5, "exact": True}
    source, folder = [str(tmp_path / "text.txt")], tmp_path / "tokenizer"
    with pytest.raises(TrainingError, match="made for 200 entries, 300 asked for"):
        tokenizers.make_tokenizer(source, folder, vocab_size=300, **options)
    assert len(tokenizers.make_tokenizer(source, folder, vocab_size=300, **{**options, "exact": False})) == 200
    (folder / tokenizers.MADE_WITH).unlink()  # as an earlier version left it
    assert len(tokenizers.make_tokenizer(source, folder, vocab_size=300, **options)) == 200


@pytest.mark.parametrize(("content", "message"), [("", "the text is empty"), ("one", "a window needs 8")])
def test_too_little_text(tmp_path, tokenizer, content, message):
    path = tmp_path / "little.txt"
    path.write_text(content)
    with pytest.raises(TrainingError, match=message):
        tokens.prepare_tokens([str(path)], tokenizer, tmp_path / "tokens", seq_len=10)


def test_no_tokenizer_from_nothing(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(TrainingError, match="the text is empty"):
        tokenizers.make_tokenizer(
            [str(path)], tmp_path / "t", vocab_size=99, exact=True, seq_len=16, column="text", most=99
        )
    assert not (tmp_path / "t").exists()


def test_tokenizers_that_do_not_fit(tmp_path):
    words = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    with pytest.raises(TrainingError, match="the tokenizer has no pad, cls, sep, mask token"):
        tokenizers.Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0"))
    late = dict.fromkeys(("pad_token", "cls_token", "sep_token", "mask_token"), "49")
    with pytest.raises(TrainingError, match="special ids reach 49 of 50"):
        tokenizers.Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", **late))
    with pytest.raises(TrainingError, match="holds no tokenizer that can be read"):
        tokenizers.load_tokenizer(tmp_path)
