"""Reading text: every kind of source, and clear words for what cannot be read."""

from __future__ import annotations

import gzip
import lzma
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastff.errors import TrainingError
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
    return tokens.make_tokenizer(
        [str(text)], tmp_path / "tokenizer", vocab_size=200, length=16, column="text", most=10**5
    )


def test_a_trained_tokenizer_masks_and_pairs_like_bert(tokenizer):
    vocabulary = tokens.Vocabulary.of(tokenizer)
    assert vocabulary == tokens.Vocabulary(size=200, pad=0, first=2, last=3, mask=4, special=5)
    pair = tokenizer("a", "b")
    assert [pair["input_ids"][0], pair["input_ids"][-1], pair["input_ids"].count(3)] == [2, 3, 2]


def test_windows_hold_the_text_between_first_and_last(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    read = tokens.prepare_tokens([str(text)], tokenizer, tmp_path / "tokens", length=10)
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
    first = tokens.prepare_tokens([str(text)], tokenizer, folder, length=10)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encoded", lambda *_: pytest.fail("read again"))
        assert len(tokens.prepare_tokens([str(text)], tokenizer, folder, length=10)) == len(first)
    fewer = tokens.prepare_tokens([str(text)], tokenizer, folder, length=10, most=100)
    assert fewer.meta["tokens"] == 100


@pytest.mark.parametrize(("content", "message"), [("", "the text is empty"), ("one", "a window needs 8")])
def test_too_little_text(tmp_path, tokenizer, content, message):
    path = tmp_path / "little.txt"
    path.write_text(content)
    with pytest.raises(TrainingError, match=message):
        tokens.prepare_tokens([str(path)], tokenizer, tmp_path / "tokens", length=10)


def test_no_tokenizer_from_nothing(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(TrainingError, match="the text is empty"):
        tokens.make_tokenizer([str(path)], tmp_path / "t", vocab_size=99, length=16, column="text", most=99)
    assert not (tmp_path / "t").exists()


def test_tokenizers_that_do_not_fit(tmp_path):
    words = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    with pytest.raises(TrainingError, match="the tokenizer has no pad, cls, sep, mask token"):
        tokens.Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0"))
    late = dict.fromkeys(("pad_token", "cls_token", "sep_token", "mask_token"), "49")
    with pytest.raises(TrainingError, match="special ids reach 49 of 50"):
        tokens.Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", **late))
    with pytest.raises(TrainingError, match="holds no tokenizer that can be read"):
        tokens.load_tokenizer(tmp_path)
