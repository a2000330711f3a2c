"""Embeddings and text of a model behind `fastff serve`, with OpenAI's client.

pip install openai
fastff serve exported &
python examples/client.py "What it says."
"""

from __future__ import annotations

import argparse
import math

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="none", help="what the server was given as FASTFF_API_KEY, if anything")
    options = parser.parse_args()

    client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
    model = client.models.list().data[0].id
    if client.get("/../info", cast_to=dict)["kind"] == "causal":
        asked = {"prompt": options.text[0], "max_tokens": 64, "temperature": 0}  # the likeliest token each time
        stream = client.completions.create(model=model, stream=True, **asked)
        for event in stream:
            print(event.choices[0].text, end="", flush=True)
        print()
        return
    found = client.embeddings.create(model=model, input=options.text)
    for text, one in zip(options.text, found.data, strict=True):
        length = math.hypot(*one.embedding)
        print(f"{text[:40]!r}: {len(one.embedding)} numbers of length {length:.3f}, {one.embedding[:3]} ...")


if __name__ == "__main__":
    main()
