"""Embeddings over HTTP: `fastff serve` beside infinity-emb on the same model, machine and clients.

    python benchmarks/serving.py --model DIR --native DIR --infinity PATH/infinity_emb --out serving.json
    python benchmarks/serving.py --model DIR --native DIR --soak 20000 --out serving.json

--model    the model as Transformers and sentence-transformers keep it
--native   what `fastff export` made of it
--infinity the command of infinity-emb, in an environment of its own

Servers take turns on this machine's loopback, with all processors; those that wait are stopped. Every figure is the
median of the rounds. Clients are threads of one process, each with a connection that it keeps; they cost processor time
that all servers miss alike. Answers are compared with sentence-transformers' before any timing.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fastff.io import write_json
from fastff.machine import commit, machine

CLIENTS = 64
SENTENCES = (1, 4, 32)
LEAST_COSINE = 0.995
START_SECONDS = 120
TEXT = (
    "the museum opens at nine on most days she asked whether last train had already left a function that returns "
    "nothing is still useful heat oil add onions and stir until soft revenue rose by four percent why does moon look "
    "larger close to horizon committee postponed its decision because members disagreed about budget"
)


def sentences(count: int, seed: int) -> list[str]:
    """Short ones, 6 to 14 words."""
    draw, words = random.Random(seed), TEXT.split()
    return [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(count)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> list[list[float]]:
    """Embeddings of one request. Raises AssertionError for an answer that is none."""
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, f"{answer.status}: {content[:200]!r}"
    return [one["embedding"] for one in json.loads(content)["data"]]


def body_of(texts: list[str], name: str) -> bytes:
    return json.dumps({"model": name, "input": texts}).encode()


class Served:
    """A running server. command: with {port}; path: of its embeddings; name: of its model."""

    def __init__(self, label: str, command: list[str], path: str, name: str) -> None:
        self.label, self.path, self.name, self.port = label, path, name, free_port()
        words = [word.format(port=self.port) for word in command]
        self.log = tempfile.NamedTemporaryFile(prefix=f"serving-{label}-", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(words, stdout=self.log, stderr=subprocess.STDOUT)
        self.started = time.perf_counter()
        self.ready_seconds = self._wait()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def _wait(self) -> float:
        while time.perf_counter() - self.started < START_SECONDS:
            assert self.process.poll() is None, f"{self.label} ended; see {self.log.name}"
            with contextlib.suppress(OSError, AssertionError), contextlib.closing(self.connection()) as one:
                ask(one, self.path, body_of(["ready?"], self.name))
                return time.perf_counter() - self.started
            time.sleep(0.1)
        raise TimeoutError(f"{self.label} did not answer within {START_SECONDS} s")

    def bytes(self) -> int:
        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(psutil.Process(one.pid).memory_info().rss for one in family)

    def pause(self, on: bool) -> None:
        """Stop the process, so that its idle threads take no time of another's turn; or let it go on."""
        os.kill(self.process.pid, signal.SIGSTOP if on else signal.SIGCONT)

    def close(self) -> None:
        self.pause(False)
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def load(server: Served, bodies: list[bytes], count: int, seconds: float, clients: int) -> dict[str, float]:
    """Clients ask as fast as they are answered; requests a second, latencies in ms."""
    times: list[list[float]] = [[] for _ in range(clients)]
    began = time.perf_counter()

    def client(number: int) -> None:
        with contextlib.closing(server.connection()) as connection:
            while time.perf_counter() - began < seconds:
                body = bodies[random.randrange(len(bodies))]
                start = time.perf_counter()
                connection.request("POST", server.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, answer.status
                times[number].append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    every = sorted(t for own in times for t in own)
    return {
        "requests_per_s": len(every) / took,
        "sentences_per_s": count * len(every) / took,
        "p50_ms": 1e3 * every[len(every) // 2],
        "p95_ms": 1e3 * every[int(0.95 * len(every))],
    }


def check(server: Served, reference: Any) -> float:
    """Least cosine of the server's embeddings with the reference's. Raises AssertionError below LEAST_COSINE."""
    texts = sentences(64, seed=1)
    with contextlib.closing(server.connection()) as connection:
        found = np.array(ask(connection, server.path, body_of(texts, server.name)))
    want = reference.encode(texts, normalize_embeddings=True)
    cosine = float(((found / np.linalg.norm(found, axis=1, keepdims=True)) * want).sum(1).min())
    assert cosine >= LEAST_COSINE, f"{server.label}: cosine {cosine}"
    return cosine


def compare(servers: list[Served], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Medians over rounds of every server, count of sentences and number of clients."""
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for count, clients in (*((count, CLIENTS) for count in SENTENCES), (1, 1)):
            bodies_of = [sentences(count, seed) for seed in range(64)]
            for server in servers:
                server.pause(False)
                bodies = [body_of(texts, server.name) for texts in bodies_of]
                result = load(server, bodies, count, seconds, clients)
                server.pause(True)
                found.setdefault((server.label, count, clients), []).append(result)
                print(server.label, count, clients, {k: round(v, 2) for k, v in result.items()}, flush=True)
    return [
        {"server": label, "sentences": count, "clients": clients}
        | {name: statistics.median(one[name] for one in every) for name in every[0]}
        for (label, count, clients), every in found.items()
    ]


def overhead(server: Served, native: Path, rounds: int = 300) -> dict[str, float]:
    """One client, one sentence: what HTTP adds to the engine's own time, tokenizer included, in ms."""
    import fastff.engine

    engine = fastff.engine.load(native)
    texts = sentences(rounds, seed=2)
    engine.encode(texts[:8])
    http_ms, engine_ms = [], []
    with contextlib.closing(server.connection()) as connection:
        for text in texts:
            body = body_of([text], server.name)
            start = time.perf_counter()
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
            connection.getresponse().read()
            http_ms.append(1e3 * (time.perf_counter() - start))
            start = time.perf_counter()
            engine.encode([text])
            engine_ms.append(1e3 * (time.perf_counter() - start))
    middle = statistics.median(http_ms), statistics.median(engine_ms)
    return {"request_ms": middle[0], "engine_ms": middle[1], "overhead_ms": middle[0] - middle[1]}


def soak(server: Served, native: Path, requests: int) -> dict[str, Any]:
    """Many requests of many clients, some of which break off or send nonsense; every answer is compared."""
    import fastff.engine

    engine = fastff.engine.load(native)
    texts = [sentences(1 + seed % 8, seed) for seed in range(256)]
    want = [engine.encode(one, normalize_embeddings=True) for one in texts]
    left, lock = iter(range(requests)), threading.Lock()
    outcomes: list[str] = []
    memory = []

    def client(number: int) -> None:
        draw = random.Random(number)
        connection = server.connection()
        while True:
            with lock:
                turn = next(left, None)
                if turn is not None and turn % (requests // 20) == 0:
                    memory.append(server.bytes())
            if turn is None:
                break
            if turn % 50 == 7:
                spoil(server, draw)
            chosen = draw.randrange(len(texts))
            try:
                found = np.array(ask(connection, server.path, body_of(texts[chosen], server.name)))
                outcomes.append("wrong" if np.abs(found - want[chosen]).max() > 1e-6 else "right")
            except Exception:
                outcomes.append("lost")
                connection = server.connection()
        connection.close()

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.append(server.bytes())
    return {
        "requests": requests,
        "seconds": time.perf_counter() - began,
        "right": outcomes.count("right"),
        "wrong": outcomes.count("wrong"),
        "lost": outcomes.count("lost"),
        "memory_mib": [round(size / 2**20, 1) for size in memory],
    }


def spoil(server: Served, draw: random.Random) -> None:
    """A request that breaks off, is no JSON, or asks for what there is not."""
    head = f"POST {server.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n"
    junk = [
        head + '{"input": ["a',
        "POST / HTTP/9\r\n\r\n",
        head + "{" * 90,
        "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=5) as one:
        one.sendall(draw.choice(junk).encode())
        if draw.random() < 0.5:
            one.recv(100)


def first_token(model: Path, rounds: int = 15) -> dict[str, float]:
    """From a prompt to the first token, by the engine and by the first event of a stream, in ms."""
    import fastff.engine

    engine = fastff.engine.load(model)
    prompt = " ".join(sentences(10, seed=3))
    ids = engine.encode_prompt(prompt)
    command = [sys.executable, "-m", "fastff.cli", "serve", str(model), "--port", "{port}", "--name", "m"]
    engine_ms, http_ms = [], []
    with generating(command) as port:
        for _ in range(rounds):
            start = time.perf_counter()
            next(iter(engine.generate_ids(engine.encode_prompt(prompt), max_new_tokens=16)))
            engine_ms.append(1e3 * (time.perf_counter() - start))
            body = json.dumps({"prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": True})
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                connection.connect()
                start = time.perf_counter()
                connection.request("POST", "/v1/completions", body)
                answer = connection.getresponse()
                answer.readline()
                http_ms.append(1e3 * (time.perf_counter() - start))
                answer.read()
    engine_median, http_median = statistics.median(engine_ms), statistics.median(http_ms)
    return {
        "prompt_tokens": len(ids),
        "engine_ms": engine_median,
        "first_event_ms": http_median,
        "ratio": http_median / engine_median,
    }


@contextlib.contextmanager
def generating(command: list[str]) -> Iterator[int]:
    """Port of a server of a decoder."""
    port = free_port()
    process = subprocess.Popen([word.format(port=port) for word in command], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def servers_of(options: argparse.Namespace) -> list[Served]:
    found = []
    for label, folder in (("fastff native", options.native), ("fastff torch", options.torch and options.model)):
        if folder:
            words = [sys.executable, "-m", "fastff.cli", "serve", str(folder), "--port", "{port}", "--name", "m"]
            found.append(Served(label.replace(" ", "-"), words, "/v1/embeddings", "m"))
            found[-1].pause(True)
    for engine in options.engines if options.infinity else ():
        words = [str(options.infinity), "v2", "--model-id", str(options.model), "--engine", engine, "--port", "{port}"]
        words += ["--host", "127.0.0.1", "--served-model-name", "m", "--device", "cpu", "--batch-size", "64"]
        found.append(Served(f"infinity-{engine}", words, "/embeddings", "m"))
        found[-1].pause(True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--native", type=Path, required=True)
    parser.add_argument("--torch", action="store_true", help="serve --model with PyTorch too")
    parser.add_argument("--infinity", type=Path)
    parser.add_argument("--engines", nargs="*", default=["torch"], help="of infinity-emb: torch, optimum")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round of a server")
    parser.add_argument("--soak", type=int, default=0, help="requests, instead of the comparison")
    parser.add_argument("--overhead", action="store_true", help="what HTTP adds, instead of the comparison")
    parser.add_argument("--decoder", type=Path, help="measure its first token, instead of the comparison")
    parser.add_argument("--out", type=Path, required=True, help="results; those of other parts are kept")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.decoder:
        results["first_token"] = first_token(options.decoder)
    else:
        results |= measured(options)
    results["machine"] = {**machine(), "commit": commit()}
    write_json(options.out, results)
    print(json.dumps({name: part for name, part in results.items() if name != "machine"}, indent=1))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(options.model), device="cpu")
    servers = servers_of(options)
    try:
        if options.soak:
            servers[0].pause(False)
            return {"soak": soak(servers[0], options.native, options.soak)}
        if options.overhead:
            servers[0].pause(False)
            return {"overhead": overhead(servers[0], options.native)}
        cosines = {}
        for server in servers:
            server.pause(False)
            cosines[server.label] = check(server, reference)
            server.pause(True)
        ready = {server.label: server.ready_seconds for server in servers}
        rows = compare(servers, options.rounds, options.seconds)
        servers[0].pause(False)
        return {
            "load": rows,
            "least_cosine": cosines,
            "ready_seconds": ready,
            "overhead": overhead(servers[0], options.native),
        }
    finally:
        for server in servers:
            server.close()


if __name__ == "__main__":
    main()
