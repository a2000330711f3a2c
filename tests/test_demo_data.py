"""The bundled text is what its manifest says, and nothing to be scored on can have been learnt."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

import fastff.demo
from fastff.demo import data
from fastff.errors import FastffError

FOLDER = Path(fastff.demo.__file__).parent / "data"


def key(text):
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


@pytest.fixture(scope="module")
def learn_text():
    return " ".join(key(p) for paragraphs in data.documents("learn.txt.xz").values() for p in paragraphs)


def test_every_file_is_in_the_manifest_with_its_checksum():
    described = data.manifest()["files"]
    others = {"manifest.json", "README.md"}
    assert {path.name for path in FOLDER.iterdir()} == set(described) | others
    for name, entry in described.items():
        raw = (FOLDER / name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"], name
        assert len(raw) == entry["bytes"], name


def test_at_most_four_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_a_changed_file_is_refused(monkeypatch):
    described = data.manifest()
    described["files"]["unseen.txt.xz"]["sha256"] = "0" * 64
    monkeypatch.setattr(data, "manifest", lambda: described)
    with pytest.raises(FastffError, match=r"unseen\.txt\.xz has sha256"):
        data.read("unseen.txt.xz")


def test_old_books_of_authors_long_dead():
    books = data.manifest()["books"]
    assert len(books) == 24
    assert all(book["year"] < 1929 and book["author_died"] < 1930 for book in books)
    uses = Counter((book["author"], book["use"]) for book in books)
    assert set(uses.values()) == {1, 2}
    assert all(count == (2 if use == "learn" else 1) for (_, use), count in uses.items())


def test_text_files_hold_the_books_of_their_use():
    books = data.manifest()["books"]
    for name, use in (("learn.txt.xz", "learn"), ("unseen.txt.xz", "unseen")):
        assert set(data.documents(name)) == {book["name"] for book in books if book["use"] == use}


def test_no_paragraph_of_an_unseen_book_is_learnt(learn_text):
    for paragraphs in data.documents("unseen.txt.xz").values():
        for paragraph in paragraphs:
            words = key(paragraph)
            assert len(words.split()) < 10 or words not in learn_text


def test_no_labelled_sentence_of_an_unseen_book_is_learnt(learn_text):
    learnt = {key(sentence) for _, sentence in data.labelled("authors-learn.tsv.xz")}
    for _, sentence in data.labelled("authors-unseen.tsv.xz"):
        assert key(sentence) not in learnt
        assert key(sentence) not in learn_text


def test_labelled_sentences_are_balanced_and_of_their_length():
    for name, count in (("authors-learn.tsv.xz", 2000), ("authors-unseen.tsv.xz", 250)):
        rows = data.labelled(name)
        assert set(Counter(author for author, _ in rows).values()) == {count}
        assert all(12 <= len(sentence.split()) <= 40 for _, sentence in rows)


def test_learning_sentences_come_from_the_learning_text(learn_text):
    rows = data.labelled("authors-learn.tsv.xz")
    assert all(key(sentence) in learn_text for _, sentence in rows[:500])


def test_tokenizer_knows_its_special_tokens_and_the_whole_text():
    corpus = data.Corpus(characters=20_000)
    names = {"[PAD]": data.PAD, "[UNK]": data.UNK, "[CLS]": data.CLS, "[SEP]": data.SEP, "[MASK]": data.MASK}
    assert {name: corpus.tokenizer.token_to_id(name) for name in names} == names
    pieces = [piece for tokens in corpus.learn.values() for piece in tokens]
    assert max(pieces) < corpus.vocab_size
    assert pieces.count(data.UNK) / len(pieces) < 1e-4


def test_pad_cuts_and_masks():
    tokens, mask = data.pad([[5, 6, 7, 8], [9]], longest=3)
    assert tokens.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
