"""Search by meaning with sentence-transformers and a model that `fastff convert` made.

pip install 'fastff[models]' sentence-transformers
python examples/search.py converted sentences.txt "a storm at sea"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sentence_transformers import SentenceTransformer

import fastff.models  # noqa: F401 - Transformers knows converted models from here on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory that fastff convert wrote, or any embedding model")
    parser.add_argument("sentences", type=Path, help="text, one sentence a line")
    parser.add_argument("query")
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()

    model = SentenceTransformer(options.model, device="cpu")
    sentences = options.sentences.read_text(encoding="utf-8").splitlines()
    rows = model.encode(sentences, normalize_embeddings=True)
    query = model.encode(options.query, normalize_embeddings=True)
    similarity = rows @ query
    for place in (-similarity).argsort()[: options.top]:
        print(f"{similarity[place]:.3f}  {sentences[place]}")


if __name__ == "__main__":
    main()
