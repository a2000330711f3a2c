"""`fastff serve` over real connections: what it answers, what it refuses, and what it survives."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import http.client
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

import fastff.engine
from encoder_cases import mpnet
from fastff.engine.generate import Sampling
from fastff.errors import CheckpointError
from fastff.serve import ServeSettings, encoder_backends
from fastff.serve import request_schema as schema
from fastff.serve.batcher import Batcher, Tokens
from fastff.serve.decoder_backends import DecoderModel
from fastff.serve.generation_routes import Answer, GenerationRoutes, StopTexts
from fastff.serve.refusals import Refused
from fastff.serve.server import serve
from fastff.serve.streams import Stream
from fastff.serve.texts import Texts
from serve_cases import TEMPLATE, serving, tokenizer, write_export, write_model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return functools.cache(lambda kind: write_export(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def embedding(exports):
    with serving(exports("embedding"), max_inputs=300, max_body_bytes=200_000, batch_tokens=64) as (base, server):
        yield base, server


@pytest.fixture(scope="module")
def engine(exports):
    return fastff.engine.load(exports("embedding"))


@pytest.fixture(scope="module")
def causal(exports):
    with serving(exports("causal")) as (base, _):
        yield base


def client_of(base, **options):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="any", **{"max_retries": 0, **options})


def post(address, content, headers=None):
    """Status and answer of a request; content is sent as it is if it is bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers or {})) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def get(address):
    with urllib.request.urlopen(address) as answer:
        return answer.read().decode()


def texts_of(count, seed=0, longest=12):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(70)}" for _ in range(draw.randint(1, longest))) for _ in range(count)]


def unit(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_openais_client_gets_the_engines_embeddings(embedding, engine, form):
    texts = texts_of(40)
    found = client_of(embedding[0]).embeddings.create(model="small", input=texts, **form)
    want = unit(engine.embed(texts, normalise=False))
    assert np.abs(np.array([one.embedding for one in found.data]) - want).max() <= 2e-7
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    assert [one.index for one in found.data] == list(range(40))
    assert found.usage.prompt_tokens == sum(map(len, ids))
    again = client_of(embedding[0]).embeddings.create(model="small", input=ids)
    assert np.array_equal([one.embedding for one in again.data], np.float32([one.embedding for one in found.data]))


def test_many_clients_at_once_get_their_own_answers(embedding, engine):
    requests = [texts_of(1 + number % 5, seed=number) for number in range(60)]
    client = client_of(embedding[0])

    def ask(texts):
        return [one.embedding for one in client.embeddings.create(model="small", input=texts).data]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, requests))
    for texts, rows in zip(requests, found, strict=True):
        assert np.abs(np.array(rows) - unit(engine.embed(texts, normalise=False))).max() <= 2e-7


def test_tei_routes(embedding, engine):
    base = embedding[0]
    texts = texts_of(5)
    want = engine.embed(texts, normalise=False).numpy()
    _, plain = post(f"{base}/embed", {"inputs": texts, "normalize": False})
    assert np.abs(np.array(plain) - want).max() <= 1e-6
    status, found = post(f"{base}/rerank", {"query": texts[0], "texts": texts, "return_text": True})
    cosines = unit(want) @ unit(want)[0]
    assert status == 200
    assert [one["index"] for one in found] == np.argsort(-cosines, kind="stable").tolist()
    assert all(one["text"] == texts[one["index"]] for one in found)
    assert post(f"{base}/predict", {"inputs": "w1"})[0] == 404
    assert post(f"{base}/v1/completions", {"prompt": "w1"})[0] == 404


def test_classifier(exports):
    reference = fastff.engine.load(exports("classifier"))
    with serving(exports("classifier")) as (base, _):
        status, one = post(f"{base}/predict", {"inputs": "w1 w2"})
        chances = reference.classify(["w1 w2"]).softmax(-1)[0]
        assert status == 200
        assert [c["label"] for c in one] == [reference.labels[i] for i in chances.argsort(descending=True)]
        assert [c["score"] for c in one] == pytest.approx(sorted(chances.tolist(), reverse=True), abs=1e-6)
        _, several = post(f"{base}/predict", {"inputs": [["w1 w2"], ["w3", "w4"]], "raw_scores": True})
        pair = reference.tokenizer("w3", "w4", return_token_type_ids=True)
        want = reference.classify([pair["input_ids"]], types=[pair["token_type_ids"]])[0]
        assert several[1][0]["score"] == pytest.approx(float(want.max()), abs=1e-5)
        _, again = post(f"{base}/predict", {"inputs": ["w3", "w4"], "raw_scores": True})
        assert [c["score"] for c in again] == pytest.approx([c["score"] for c in several[1]], abs=1e-5)
        assert post(f"{base}/rerank", {"query": "a", "texts": ["b"]})[0] == 400  # three labels


def test_pytorch_agrees_with_transformers(tmp_path):
    model, words = write_model("embedding", tmp_path)
    texts = texts_of(9)
    with torch.inference_mode():
        alone = [model(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    with serving(tmp_path) as (base, _):
        assert json.loads(get(f"{base}/info"))["backend"] == "torch"
        _, found = post(f"{base}/embed", {"inputs": texts, "normalize": False})
    assert np.abs(np.array(found) - torch.stack(alone).numpy()).max() <= 1e-4


def test_too_long_inputs_are_cut_or_refused_as_the_request_says(embedding, engine):
    base, long = embedding[0], " ".join(["w5"] * 150)
    status, answer = post(f"{base}/v1/embeddings", {"input": ["w1", long]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "input 1 has 152 tokens, at most 100" in answer["error"]["message"]
    _, cut = post(f"{base}/embed", {"inputs": [long], "truncate": True, "normalize": False})
    assert np.abs(np.array(cut) - engine.embed([long], normalise=False).numpy()).max() <= 1e-6
    ids = [[7] * 150]
    assert post(f"{base}/embed", {"inputs": ids})[0] == 400
    assert post(f"{base}/embed", {"inputs": ids, "truncate": True})[0] == 200


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 5000, "recursion"),
        ({"input": ["a", 3]}, "expected a text"),
        ({"input": [True]}, "expected a text"),
        ({"input": []}, "empty"),
        ({"input": [[]]}, "no tokens"),
        ({"input": [[99]]}, "token 99, expected 0 to 79"),
        ({"input": [[-1]]}, "token -1"),
        ({"input": [10**30]}, "expected"),
        ({"input": "a", "dimensions": 3}, "dimensions 3"),
        ({"input": "a", "colour": 1}, "not a field"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({}, "input"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(embedding, body, word):
    status, answer = post(f"{embedding[0]}/v1/embeddings", body)
    assert status == 400
    assert word in answer["error"]["message"]


def test_limits(embedding):
    base = embedding[0]
    assert post(f"{base}/embed", {"inputs": ["w1"] * 301})[0] == 413
    assert post(f"{base}/embed", {"inputs": "w1 " * 70_000})[0] == 413
    assert post(f"{base}/embed", {"inputs": ["w1"] * 300})[0] == 200  # 900 tokens, in batches of 64
    assert post(f"{base}/v1/embeddings", {"input": "a", "model": "large"})[0] == 404
    assert post(f"{base}/nothing", {})[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="405"):
        get(f"{base}/embed")


def test_facts_and_metrics(embedding):
    base = embedding[0]
    assert [model.id for model in client_of(base).models.list()] == ["small"]
    assert client_of(base).models.retrieve("small").id == "small"
    assert json.loads(get(f"{base}/info"))["max_length"] == 100
    text = get(f"{base}/metrics")
    assert 'fastff_requests_total{path="/v1/models",status="200"} 1.0' in text
    assert "fastff_queued_tokens 0.0" in text
    assert "/embed" in get(f"{base}/openapi.json")


def test_a_key(exports):
    with serving(exports("embedding"), api_key="secret") as (base, _):
        assert post(f"{base}/embed", {"inputs": "w1"})[0] == 401
        assert post(f"{base}/embed", {"inputs": "w1"}, {"Authorization": "Bearer secret"})[0] == 200
        assert json.loads(get(f"{base}/health")) == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            client_of(base).models.list()


def test_slow_and_vanishing_clients_hold_nobody_up(exports):
    with serving(exports("embedding"), client_seconds=0.3) as (base, server):
        address = ("127.0.0.1", int(base.rsplit(":", 1)[1]))
        head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n"
        slow = [socket.create_connection(address) for _ in range(3)]
        slow[1].sendall(b"POST /embed HT")
        slow[2].sendall(head + b'{"inputs"')
        for _ in range(10):  # leave in the middle of a body
            with socket.create_connection(address) as one:
                one.sendall(head + b'{"inp')
        assert post(f"{base}/embed", {"inputs": "w1"})[0] == 200
        endings = [b"".join(iter(lambda s=one: s.recv(4096), b"")) for one in slow]
        assert endings[:2] == [b"", b""]
        assert endings[2].startswith(b"HTTP/1.1 408")
        for one in slow:
            one.close()
        with socket.create_connection(address) as one:
            one.sendall(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
            with contextlib.suppress(ConnectionError):  # reset while it still sends
                assert one.recv(4096).startswith(b"HTTP/1.1 400")
        assert not [task for task in server.server_state.tasks if not task.done()]


class Gate:
    """A model that waits until it may go on."""

    def __init__(self):
        self.open, self.batches = threading.Event(), []

    def __call__(self, batch):
        self.batches.append([len(one.ids) for one in batch])
        self.open.wait()
        return np.array([[sum(one.ids)] for one in batch], np.float32)


def test_a_full_queue_refuses_single_inputs_and_lists_alike():
    async def run():
        gate = Gate()
        batcher = Batcher(gate, batch_tokens=8, queue_tokens=20)
        batcher.start()
        first = batcher.submit([Tokens([1] * 5)])
        while not gate.batches:
            await asyncio.sleep(0.001)
        several = batcher.submit([Tokens([number] * 6) for number in range(3)])
        single = batcher.submit([Tokens([9, 9])])
        for refused in ([Tokens([1])], [Tokens([1]), Tokens([2])]):
            with pytest.raises(Refused, match="20 tokens wait, at most 20") as caught:
                batcher.submit(refused)
            assert caught.value.status == 429
        gate.open.set()
        assert (await first).tolist() == [[5]]
        assert (await several).tolist() == [[0], [6], [12]]
        assert (await single).tolist() == [[18]]
        assert gate.batches == [[5], [6, 2], [6], [6]]  # cut at the budget; the short request is not last
        assert batcher.queued_tokens == 0
        batcher.close()

    asyncio.run(run())


def test_what_nobody_waits_for_is_not_computed_and_a_failure_is_of_its_batch_alone():
    def compute(batch):
        if any(one.ids[0] == 3 for one in batch):
            raise RuntimeError("out of order")
        return gate(batch)

    async def run():
        batcher = Batcher(compute, batch_tokens=4, queue_tokens=100)
        batcher.start()
        first, gone = batcher.submit([Tokens([1] * 4)]), batcher.submit([Tokens([2] * 4)])
        bad, last = batcher.submit([Tokens([3] * 4)]), batcher.submit([Tokens([4] * 4)])
        gone.cancel()
        gate.open.set()
        assert (await first).tolist() == [[4]]
        with pytest.raises(Refused, match="out of order"):
            await bad
        assert (await last).tolist() == [[16]]
        assert batcher.queued_tokens == 0
        batcher.close()

    gate = Gate()
    asyncio.run(run())
    assert len(gate.batches) == 2


def test_a_text_without_a_token_is_refused_alone():
    """In a batch it would fail those beside it."""
    texts = Texts(tokenizer(TEMPLATE).backend_tokenizer, max_length=9, vocab_size=76)  # adds no tokens of its own
    assert [one.ids for one in texts.tokens(["w1 w2"], truncate=False)] == [[5, 6]]
    with pytest.raises(Refused, match="input 1 has no tokens"):
        texts.tokens(["w1", " "], truncate=False)


def test_positions_and_widths_are_those_of_the_model_type(tmp_path):
    """Positions after the padding's are fewer than their table; DistilBERT has another name for its width."""
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    served = encoder_backends.open_torch(tmp_path, mpnet().eval(), words, 1)
    assert served.texts.max_length == 100
    assert served.compute([Tokens([5] * 100)]).shape == (1, 96)
    assert encoder_backends._hidden({"dim": 64}, tmp_path) == 64
    with pytest.raises(CheckpointError, match="hidden_size is None"):
        encoder_backends._hidden({}, tmp_path)


def test_padding_is_bounded():
    lengths = [random.Random(1).randint(1, 100) for _ in range(200)]
    found = list(encoder_backends.calls(lengths))
    assert sorted(i for call in found for i in call) == list(range(200))
    for call in found:
        assert max(lengths[i] for i in call) * len(call) <= 1.25 * sum(lengths[i] for i in call)


def test_generation_is_the_engines(causal, exports):
    reference, client = fastff.engine.load(exports("causal")), client_of(causal)
    options = {"model": "small", "max_tokens": 20, "temperature": 0}
    ids = reference.encode_prompt("w5 w6 w7")
    want = reference.tokenizer.decode(list(reference.generate_ids(ids, max_new_tokens=20)))
    whole = client.completions.create(prompt="w5 w6 w7", **options)
    assert whole.choices[0].text.strip() == want
    assert client.completions.create(prompt=ids, **options).choices[0].text == whole.choices[0].text
    several = client.completions.create(prompt=["w5 w6 w7", "w8"], **options)
    assert several.choices[0].text == whole.choices[0].text
    assert several.choices[1].text != whole.choices[0].text
    streamed = list(client.completions.create(prompt="w5 w6 w7", stream=True, **options))
    assert "".join(one.choices[0].text for one in streamed) == whole.choices[0].text
    assert streamed[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.prompt_tokens == 3


def test_chats_stream_and_draw_by_seed(causal, exports):
    client, reference = client_of(causal), fastff.engine.load(exports("causal"))
    asked = {"model": "small", "messages": [{"role": "user", "content": "w5 w9"}], "max_completion_tokens": 12}
    asked |= {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    whole = client.chat.completions.create(**asked)
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=7)
    ids = reference.tokenizer.encode("w5 w9 w1")
    want = list(reference.generate_ids(ids, max_new_tokens=12, sampling=sampling))
    assert whole.choices[0].message.content.strip() == reference.tokenizer.decode(want)
    parts = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"messages": []}, "messages"),
        ({"n": 2}, "n:"),
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"tools": []}, "not a field"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "w1 " * 96}]}, "the prompt has 97 tokens, the model 96 positions"),
    ],
)
def test_generation_refuses_what_it_does_not_do(causal, more, word):
    asked = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 4}
    status, answer = post(f"{causal}/v1/chat/completions", asked | more)
    assert status == 400
    assert word in answer["error"]["message"]


def test_streams_take_turns_and_a_reader_that_rests_stops_none(exports):
    with serving(exports("causal"), streams=2, queued_prompts=1) as (base, _):
        asked = json.dumps({"prompt": "w5", "max_tokens": 90, "temperature": 1, "seed": 4, "stream": True}).encode()
        held = http.client.HTTPConnection(base.removeprefix("http://"))
        held.request("POST", "/v1/completions", asked)  # whose answer is not read for now
        whole = post(f"{base}/v1/completions", {"prompt": "w5", "max_tokens": 90, "temperature": 1, "seed": 4})[1]
        events = [line[6:] for line in held.getresponse().read().split(b"\n") if line.startswith(b"data: {")]
        held.close()
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        assert text == whole["choices"][0]["text"]
        asked = {"prompt": ["w5"] * 4, "max_tokens": 2}
        assert post(f"{base}/v1/completions", asked)[0] == 429
        endless = json.dumps({"prompt": "w5", "max_tokens": 90, "stream": True})
        for _ in range(5):  # leave after the first event
            with contextlib.closing(http.client.HTTPConnection(base.removeprefix("http://"))) as gone:
                gone.request("POST", "/v1/completions", endless)
                with gone.getresponse() as answer:
                    answer.read(10)
        assert post(f"{base}/v1/completions", {"prompt": "w5", "max_tokens": 2})[0] in (200, 429)
        until = time.monotonic() + 5
        while "in_flight 1.0" not in get(f"{base}/metrics") and time.monotonic() < until:
            time.sleep(0.02)
        assert post(f"{base}/v1/completions", {"prompt": "w5", "max_tokens": 2})[0] == 200


def small_decoder():
    words = tokenizer()
    words.sep_token = "[SEP]"
    return DecoderModel("torch", None, words, frozenset(), 96, 76, 1)


def stream_of(tokens=(), kind=Stream):
    """Of the running loop, with these tokens drawn, and how often its thread was woken."""
    woken = []
    stream = kind([5], Sampling(), 90, asyncio.get_running_loop(), lambda: woken.append(None))
    for token in tokens:
        stream.give(token)
    return stream, woken


def test_a_reader_that_reads_while_the_thread_comes_to_rest_wakes_it():
    class Raced(Stream):
        """Just before the reader counts the first token, the thread draws one more, looks, and rests."""

        @property
        def read(self):
            return self._read

        @read.setter
        def read(self, value):
            if value == 1:
                self.made += 1
                self.rested = self.behind()
            self._read = value

    async def run():
        stream, woken = stream_of([5], Raced)
        stream.made = 63
        async for _ in stream:
            break
        assert stream.rested
        assert not stream.behind()
        assert woken

    asyncio.run(run())


def test_a_client_that_leaves_before_the_first_event_holds_no_stream():
    async def gone():
        return {"type": "http.disconnect"}

    async def never(_):
        await asyncio.Event().wait()  # of a connection that is full of earlier answers

    async def run():
        stream, _ = stream_of()
        streams = types.SimpleNamespace(submit=lambda _: [stream])
        service = types.SimpleNamespace(streams=streams, truncates=lambda _: False)
        answer = Answer(small_decoder(), schema.CompletionRequest(prompt=[5], stream=True), "cmpl", "small")
        response = await GenerationRoutes(service, small_decoder())._answered(None, answer, [[5]], 9)
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, never)
        assert stream.closed

    asyncio.run(run())


def test_a_completion_goes_on_with_its_prompt_and_a_chat_begins():
    model = small_decoder()
    assert model.prompt("w1 w2") == [2, 5, 6]  # without the end of a sentence, which is to go on

    async def text(asked, prefix):
        stream, _ = stream_of([6, 7, None])
        return "".join([piece async for piece in Answer(model, asked, prefix, "small").text(stream)])

    message = schema.Message(role="user", content="w1")
    assert asyncio.run(text(schema.CompletionRequest(prompt="w1"), "cmpl")) == " w2 w3"
    assert asyncio.run(text(schema.ChatRequest(messages=[message]), "chatcmpl")) == "w2 w3"
    assert Answer(model, schema.CompletionRequest(prompt="w1", top_k=2**70), "cmpl", "small").sampling.top_k == 76


def test_torch_decoder(tmp_path):
    model, words = write_model("causal", tmp_path)
    ids = torch.tensor([words.encode("w5 w6")])
    want = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 2:]
    with serving(tmp_path) as (base, _):
        asked = {"prompt": "w5 w6", "max_tokens": 8, "temperature": 0}
        status, found = post(f"{base}/v1/completions", asked)
        drawn = [post(f"{base}/v1/completions", {**asked, "temperature": 1, "seed": 5})[1] for _ in range(2)]
    assert status == 200
    assert found["choices"][0]["text"].split() == words.decode([t for t in want.tolist() if t != 3]).split()
    assert drawn[0]["choices"] == drawn[1]["choices"]


@pytest.mark.parametrize(
    ("stops", "pieces", "want"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["cd"], ["abc", "x"], ["ab", "cx"]),
        (["cd"], ["abc", "de"], ["ab", ""]),
        (["xy", "b"], ["ab", "c"], ["a", ""]),
        (["aab"], ["aa", "ab"], ["", "a"]),
    ],
)
def test_stop_texts(stops, pieces, want):
    text = StopTexts(stops)
    found = []
    for piece in pieces:
        found.append(text.add(piece) if not text.found else "")
    assert found == want


def test_logs_of_the_process_stay_open(exports):
    closed = []

    class Log(logging.StreamHandler):
        def close(self):
            closed.append(self)
            super().close()

    log = Log()
    with serving(exports("embedding")):
        assert closed == []
    log.close()


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds none of engine\.json"):
        serve(ServeSettings(tmp_path), say=print)
    with pytest.raises(ValueError, match="queue-tokens"):
        ServeSettings(tmp_path, max_request_tokens=9, queue_tokens=8)


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def forks():
    """A process that starts servers; it imports while other tests run."""
    command = [sys.executable, str(Path(__file__).with_name("serve_case.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def _told(forks, line):
    forks.stdin.write(f"{line}\n".encode())
    forks.stdin.flush()
    return int(forks.stdout.readline())


def _answers(base):
    try:
        return json.loads(get(f"{base}/health"))["status"] == "ok"
    except (OSError, http.client.HTTPException):
        return False


def test_sigterm_under_load_loses_nothing_and_a_killed_server_starts_again(forks, exports, engine):
    port = _free_port()
    base, texts = f"http://127.0.0.1:{port}", texts_of(8)
    want = unit(engine.embed(texts, normalise=False))

    def start():
        pid, until = _told(forks, f"start {exports('embedding')} {port}"), time.monotonic() + 60
        while not _answers(base):
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)
        return pid

    def ask(number):
        """Whether the answer is right; None for a connection that the server had not taken."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            try:
                connection.connect()
            except ConnectionRefusedError:
                return None
            connection.request("POST", "/embed", json.dumps({"inputs": texts[number % 8]}))
            answer = connection.getresponse()
            rows = np.array(json.loads(answer.read()))
        return answer.status == 200 and bool(np.abs(rows[0] - want[number % 8]).max() <= 2e-7)

    killed = start()
    os.kill(killed, signal.SIGKILL)
    assert _told(forks, f"wait {killed}") == -signal.SIGKILL
    stopped = start()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(300)]
        while sum(one.done() for one in asked) < 100:
            time.sleep(0.001)
        os.kill(stopped, signal.SIGTERM)
        outcomes = [one.exception() or one.result() for one in asked]
    assert _told(forks, f"wait {stopped}") == 0
    assert sum(outcome is True for outcome in outcomes) >= 100
    assert False not in outcomes
    # A connection that the system had taken, and the server not yet, is reset: nothing of it was read.
    assert {type(outcome) for outcome in outcomes} <= {
        bool,
        type(None),
        ConnectionResetError,
        BrokenPipeError,  # the same, told at the next write
        http.client.RemoteDisconnected,
    }
