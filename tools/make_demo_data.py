"""Make the text that `fastff demo` ships: eight novelists, two books of each to learn from, one to score on.

    python tools/make_demo_data.py BOOKS [BOOKS ...] --out src/fastff/demo/data

BOOKS are text files, plain or .xz, of documents: a title line `= Author_Title_Year`, one paragraph a line, an empty
line between documents; or folders of `Author_Title_Year.txt`, the layout of computationalstylistics/100_english_novels,
where paragraphs are separated by empty lines. Needs `fastff[train]`. Writes four text files, the tokenizer and
manifest.json. The same input gives the same text files from the same version of xz; the tokenizer differs from run to
run, because its training is not deterministic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, processors

from fastff.text.tokenizer import train_tokenizer

# author: (full name, year of death, books to learn from, unseen book)
AUTHORS = {
    "Cbronte": ("Charlotte Brontë", 1855, ("Jane_1847", "Shirley_1849"), "Villette_1853"),
    "Conrad": ("Joseph Conrad", 1924, ("Almayer_1895", "Rover_1923"), "Nostromo_1904"),
    "Dickens": ("Charles Dickens", 1870, ("Oliver_1839", "Bleak_1853"), "Expectations_1861"),
    "Eliot": ("George Eliot", 1880, ("Felix_1866", "Daniel_1876"), "Adam_1859"),
    "Hardy": ("Thomas Hardy", 1928, ("Madding_1874", "Jude_1895"), "Tess_1891"),
    "James": ("Henry James", 1916, ("Roderick_1875", "Tragic_1890"), "Ambassadors_1903"),
    "Morris": ("William Morris", 1896, ("Roots_1890", "Water_1897"), "Wood_1894"),
    "Thackeray": ("William Makepeace Thackeray", 1863, ("Pendennis_1850", "Virginians_1859"), "Esmond_1852"),
}
TITLES = {
    "Jane": "Jane Eyre",
    "Shirley": "Shirley",
    "Villette": "Villette",
    "Almayer": "Almayer's Folly",
    "Rover": "The Rover",
    "Nostromo": "Nostromo",
    "Oliver": "Oliver Twist",
    "Bleak": "Bleak House",
    "Expectations": "Great Expectations",
    "Felix": "Felix Holt, the Radical",
    "Daniel": "Daniel Deronda",
    "Adam": "Adam Bede",
    "Madding": "Far from the Madding Crowd",
    "Jude": "Jude the Obscure",
    "Tess": "Tess of the d'Urbervilles",
    "Roderick": "Roderick Hudson",
    "Tragic": "The Tragic Muse",
    "Ambassadors": "The Ambassadors",
    "Roots": "The Roots of the Mountains",
    "Water": "The Water of the Wondrous Isles",
    "Wood": "The Wood Beyond the World",
    "Pendennis": "The History of Pendennis",
    "Virginians": "The Virginians",
    "Esmond": "The History of Henry Esmond",
}
LEARN_CHARACTERS = 480_000  # of each book to learn from
UNSEEN_CHARACTERS = 36_000  # of each unseen book, for the masked-word loss
LEARN_SENTENCES = 1000  # labelled sentences of each book to learn from
UNSEEN_SENTENCES = 250  # labelled sentences of each unseen book
WORDS = (12, 40)  # shortest and longest labelled sentence
# Whole words for the common ones: sentences are shorter, so more of them are seen, and a mask is one word. No
# controlled comparison with smaller vocabularies was made; for the masked-word loss alone, about a hundred pieces may
# do better.
VOCABULARY = 4096
ALPHABET = 44  # letters, digits and marks; a rarer character is [UNK]
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Esq|Capt|Rev|Hon|Sir|No|[A-Z])\.[\"')]*$")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*(?=\s+[\"'(]*[A-Z])|(?<=[.!?][\"')])(?=\s+[\"'(]*[A-Z])")


def read_books(sources: list[Path]) -> dict[str, list[str]]:
    """Every book of the sources: name -> paragraphs."""
    books: dict[str, list[str]] = {}
    for source in sources:
        if source.is_dir():
            for path in sorted(source.glob("*.txt")):
                blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
                books[path.stem] = [" ".join(block.split()) for block in blocks if block.strip()]
            continue
        opener = lzma.open if source.suffix == ".xz" else open
        with opener(source, "rt", encoding="utf-8") as handle:
            for document in handle.read().split("\n\n"):
                title, *paragraphs = document.strip().split("\n")
                if title.startswith("= "):
                    books[title[2:]] = paragraphs
    return books


def sentences(paragraphs: list[str]) -> Iterator[str]:
    """Split paragraphs at sentence ends that are not abbreviations."""
    for paragraph in paragraphs:
        begin = 0
        for match in SENTENCE_END.finditer(paragraph):
            piece = paragraph[begin : match.end()].strip()
            if ABBREVIATION.search(piece):
                continue
            if piece:
                yield piece
            begin = match.end()
        last = paragraph[begin:].strip()
        if last.endswith((".", "!", "?", '."', '!"', '?"')):
            yield last


def key(sentence: str) -> str:
    """What two sentences share when they count as the same: letters only, in lower case."""
    return re.sub(r"[^a-z]+", " ", sentence.lower()).strip()


def usable(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split()) <= WORDS[1] and "\t" not in sentence


def head(paragraphs: list[str], characters: int) -> list[str]:
    """The first paragraphs, up to a number of characters."""
    kept, size = [], 0
    for paragraph in paragraphs:
        size += len(paragraph) + 1
        if size > characters:
            break
        kept.append(paragraph)
    return kept


def pick(paragraphs: list[str], count: int, rng: random.Random, taken: set[str]) -> list[str]:
    """`count` random usable sentences, none of which is in `taken`, which grows by them."""
    found = {key(sentence): sentence for sentence in sentences(paragraphs) if usable(sentence)}
    pool = [sentence for name, sentence in sorted(found.items()) if name not in taken]
    if len(pool) < count:
        raise SystemExit(f"{len(pool)} usable sentences, expected at least {count}")
    chosen = rng.sample(pool, count)
    taken.update(key(sentence) for sentence in chosen)
    return chosen


def make_tokenizer(text: list[str]) -> Tokenizer:
    """The tokenizer of `fastff pretrain`, for single sentences and with few characters."""
    tokenizer = train_tokenizer(lambda: text, VOCABULARY, alphabet=ALPHABET)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def write(path: Path, text: str) -> dict[str, object]:
    """Write text packed with xz; returns its entry of the manifest."""
    raw = text.encode()
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(packed)
    return {"bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest(), "bytes_unpacked": len(raw)}


def document(name: str, paragraphs: list[str]) -> str:
    return f"= {name}\n" + "\n".join(paragraphs) + "\n\n"


def labelled(rows: list[tuple[str, str]], rng: random.Random) -> str:
    rng.shuffle(rows)
    return "".join(f"{author}\t{sentence}\n" for author, sentence in rows)


def build(books: dict[str, list[str]], out: Path) -> dict[str, object]:
    """Write every file but the manifest; returns the manifest."""
    rng = random.Random(0)
    learn, unseen, entries = {}, {}, []
    for author, (full_name, died, learn_titles, unseen_title) in AUTHORS.items():
        for title in (*learn_titles, unseen_title):
            name = f"{author}_{title}"
            if name not in books:
                raise SystemExit(f"{name} is not among the {len(books)} books given")
            short, year = title.split("_")
            use = "unseen" if title == unseen_title else "learn"
            (unseen if use == "unseen" else learn)[name] = books[name]
            entries.append({"name": name, "author": full_name, "author_died": died, "title": TITLES[short],
                            "year": int(year), "use": use})  # fmt: skip
    seen = {key(sentence) for paragraphs in learn.values() for sentence in sentences(paragraphs)}
    parts = {name: head(paragraphs, LEARN_CHARACTERS) for name, paragraphs in learn.items()}
    taken: set[str] = set()
    train = [(name.split("_")[0], s) for name in parts for s in pick(parts[name], LEARN_SENTENCES, rng, taken)]
    # The masked-word text is the start of an unseen book, its labelled sentences come from the rest.
    starts = {name: head(paragraphs, UNSEEN_CHARACTERS) for name, paragraphs in unseen.items()}
    test = [
        (name.split("_")[0], sentence)
        for name, paragraphs in unseen.items()
        for sentence in pick(paragraphs[len(starts[name]) :], UNSEEN_SENTENCES, rng, seen)
    ]
    files = {
        "learn.txt.xz": write(out / "learn.txt.xz", "".join(document(n, p) for n, p in parts.items())),
        "unseen.txt.xz": write(out / "unseen.txt.xz", "".join(document(n, p) for n, p in starts.items())),
        "authors-learn.tsv.xz": write(out / "authors-learn.tsv.xz", labelled(train, rng)),
        "authors-unseen.tsv.xz": write(out / "authors-unseen.tsv.xz", labelled(test, rng)),
    }
    tokenizer = make_tokenizer([paragraph for paragraphs in parts.values() for paragraph in paragraphs])
    path = out / "tokenizer.json"
    path.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    raw = path.read_bytes()
    files["tokenizer.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    source = "https://github.com/computationalstylistics/100_english_novels"
    return {"source": source, "licence": "public domain", "books": entries, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    manifest = build(read_books(arguments.books), arguments.out)
    path = arguments.out / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(manifest["files"], indent=1))


if __name__ == "__main__":
    main()
