"""Routes of decoders: OpenAI's /v1/completions and /v1/chat/completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastff.engine.generate import TokenText
from fastff.serve import request_schema as schema
from fastff.serve.decoder_backends import DecoderModel, Sampling
from fastff.serve.guard import while_connected
from fastff.serve.refusals import Refused, invalid, too_large
from fastff.serve.streams import Finish, Stream

if TYPE_CHECKING:
    from fastff.serve.service import Service

_COMPLETION_TOKENS = 16  # as OpenAI's completions where max_tokens is not given


class StopTexts:
    """Lets text through until one of `stops` comes; keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._kept = ""
        self.found = False

    def add(self, text: str) -> str:
        self._kept += text
        places = [place for stop in self._stops if (place := self._kept.find(stop)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        held = max((self._begun(stop) for stop in self._stops), default=0)
        return self._release(len(self._kept) - held)

    def rest(self) -> str:
        return "" if self.found else self._release(len(self._kept))

    def _begun(self, stop: str) -> int:
        """Characters at the end that begin `stop`."""
        longest = min(len(stop) - 1, len(self._kept))
        return next((n for n in range(longest, 0, -1) if self._kept.endswith(stop[:n])), 0)

    def _release(self, count: int) -> str:
        out, self._kept = self._kept[:count], self._kept[count:]
        return out


class EventStream(StreamingResponse):
    """Events of a stream, which is closed however they end: also where its client left before the first of them."""

    def __init__(self, events: AsyncIterator[bytes], stream: Stream) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


class GenerationRoutes:
    """Answers of one model."""

    def __init__(self, service: Service, model: DecoderModel) -> None:
        self._service, self._model = service, model

    async def complete(self, request: Request) -> Response:
        asked = await self._service.parsed(request, schema.CompletionRequest)
        schema.check_model(asked.model, self._service.settings.served_name)
        prompts = await self._prompts(asked.prompt)
        if asked.stream and len(prompts) > 1:
            raise invalid(f"{len(prompts)} prompts as one stream: send one prompt, or stream=false", param="prompt")
        answer = Answer(self._model, asked, "cmpl", self._service.settings.served_name)
        return await self._answered(request, answer, prompts, asked.max_tokens or _COMPLETION_TOKENS)

    async def chat(self, request: Request) -> Response:
        asked = await self._service.parsed(request, schema.ChatRequest)
        schema.check_model(asked.model, self._service.settings.served_name)
        messages = [message.plain() for message in asked.messages]
        characters = sum(len(message["content"]) for message in messages)
        ids = await self._service.beside(characters, lambda: self._model.chat(messages))
        answer = Answer(self._model, asked, "chatcmpl", self._service.settings.served_name)
        most = asked.max_completion_tokens or asked.max_tokens or self._model.positions
        return await self._answered(request, answer, [ids], most)

    async def _answered(self, request: Request, answer: Answer, prompts: list[list[int]], most: int) -> Response:
        streams = self._service.streams
        assert streams is not None
        cut = self._service.truncates(answer.asked.truncate)
        fitting = [self._fitting(ids, most, cut) for ids in prompts]
        made = streams.submit([(ids, answer.sampling, count) for ids, count in fitting])
        if answer.asked.stream:
            return EventStream(answer.events(made[0]), made[0])
        try:
            content = await while_connected(request, answer.whole(made))
        finally:
            for stream in made:
                stream.close()
        return Response(orjson.dumps(content), media_type="application/json")

    async def _prompts(self, given: schema.Input) -> list[list[int]]:
        if isinstance(given, str):
            given = [given]
        if not given:
            raise invalid("prompt is empty", param="prompt")
        if len(given) > self._service.settings.max_inputs and not isinstance(given[0], int):
            most = self._service.settings.max_inputs
            raise too_large(f"the request has {len(given)} prompts, at most {most} are read", code="too_many_inputs")
        if isinstance(given[0], str):
            texts: Any = given
            found: list[list[int]] = await self._service.beside(
                sum(map(len, texts)), lambda: [self._model.prompt(text) for text in texts]
            )
            return found
        ids: Any = [given] if isinstance(given[0], int) else given
        return [list(one) for one in ids]

    def _fitting(self, ids: list[int], most: int, cut: bool) -> tuple[list[int], int]:
        """A prompt and its most new tokens, within the model's positions; a prompt that is cut loses its beginning."""
        if not ids:
            raise invalid("the prompt is empty: at least one token is needed", param="prompt")
        if min(ids) < 0 or max(ids) >= self._model.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise invalid(f"token {wrong} is outside the vocabulary of {self._model.vocab_size}", param="prompt")
        positions = self._model.positions
        if len(ids) >= positions and cut:
            ids = ids[len(ids) - max(1, positions - min(most, positions // 2)) :]
        if len(ids) >= positions:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens, the model {positions} positions: set truncate to cut its beginning",
                code="context_length_exceeded",
                param="prompt",
            )
        return ids, min(most, positions - len(ids))


class Answer:
    """The objects of one answer. prefix: of its id; "chatcmpl" for chats, whose objects differ."""

    def __init__(self, model: DecoderModel, asked: schema.GenerationRequest, prefix: str, name: str) -> None:
        self.asked, self._model = asked, model
        self._chat = prefix == "chatcmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        top_k = min(asked.top_k, model.vocab_size)  # of more it has none, and an integer of C no room
        self.sampling = Sampling(temperature=asked.temperature, top_p=asked.top_p, top_k=top_k, seed=seed)

    async def text(self, stream: Stream) -> AsyncIterator[str]:
        """Pieces of one text; `stream.finish` then says why it ended."""
        text = TokenText(self._model.tokenizer, () if self._chat else stream.prompt)  # a completion goes on with it
        stops = StopTexts(self.asked.stops)
        async for token in stream:
            if piece := stops.add(text.add(token)):
                yield piece
            if stops.found:
                stream.finish = "stop"
                stream.close()
                return
        if piece := stops.add(text.rest()):
            yield piece
        if stops.found:
            stream.finish = "stop"
        elif piece := stops.rest():
            yield piece

    async def whole(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """The answer at once."""

        async def joined(stream: Stream) -> str:
            return "".join([piece async for piece in self.text(stream)])

        texts = await asyncio.gather(*(joined(stream) for stream in streams))
        choices = [
            self._choice(i, t, s.finish, whole=True) for i, (t, s) in enumerate(zip(texts, streams, strict=True))
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": _usage(streams)}

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        try:
            if self._chat:
                yield self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            async for piece in self.text(stream):
                yield self._event([self._choice(0, piece, None)])
            yield self._event([self._choice(0, "", stream.finish)])
            if usage:
                yield self._event([], usage=_usage([stream]))
            yield b"data: [DONE]\n\n"
        except Refused as error:
            yield b"data: " + orjson.dumps(error.body()) + b"\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return b"data: " + orjson.dumps({**self._head, "object": kind, "choices": choices, **more}) + b"\n\n"

    def _choice(self, index: int, text: str, finish: Finish | None, *, whole: bool = False) -> dict[str, Any]:
        own: dict[str, Any] = {"text": text}
        if self._chat and whole:
            own = {"message": {"role": "assistant", "content": text}}
        elif self._chat:
            own = {"delta": {"content": text} if text else {}}
        return {"index": index, **own, "finish_reason": finish, "logprobs": None}


def _usage(streams: Sequence[Stream]) -> dict[str, int]:
    prompt, made = sum(len(s.prompt) for s in streams), sum(s.made for s in streams)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
