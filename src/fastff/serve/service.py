"""The application: one model, its queue, and the routes that fit its kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import fastff
from fastff.serve import request_schema as schema
from fastff.serve.batcher import Batcher, Rows, Tokens
from fastff.serve.decoder_backends import DecoderModel
from fastff.serve.encoder_backends import EncoderModel
from fastff.serve.encoder_routes import EncoderRoutes
from fastff.serve.generation_routes import GenerationRoutes
from fastff.serve.guard import Guard, read_body, while_connected
from fastff.serve.metrics import Metrics
from fastff.serve.refusals import Refused, too_large
from fastff.serve.serve_settings import ServeSettings
from fastff.serve.served_model import Model
from fastff.serve.streams import Streams

Parsed = TypeVar("Parsed", bound=schema.Request)
_LONG_TEXT = 20_000  # characters above which texts are cut into tokens beside the event loop


class Service:
    """What routes share: the settings, the counts, and the model's queue of its kind."""

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.model, self.settings, self.metrics = model, settings, Metrics()
        self.created = int(time.time())
        self.batcher: Batcher | None = None
        self.streams: Streams | None = None
        if isinstance(model, EncoderModel):
            self.batcher = Batcher(
                model.compute,
                batch_tokens=settings.batch_tokens,
                queue_tokens=settings.queue_tokens,
                observe=self.metrics.batch,
            )
            batcher = self.batcher
            self.metrics.watch("fastff_queued_tokens", "Tokens that wait.", lambda: batcher.queued_tokens)
        else:
            self.streams = Streams(
                model.session,
                model.stop,
                at_once=settings.streams,
                queued=settings.queued_prompts,
                observe=self.metrics.generated,
            )
            streams = self.streams
            self.metrics.watch("fastff_queued_prompts", "Prompts that wait.", lambda: streams.waiting)

    @property
    def queue(self) -> Batcher | Streams:
        queue = self.batcher or self.streams
        assert queue is not None
        return queue

    async def parsed(self, request: Request, kind: type[Parsed]) -> Parsed:
        """The body of a request. Raises Refused."""
        limits = self.settings
        body = await read_body(request, most=limits.max_body_bytes, seconds=limits.client_seconds)
        return kind.parse(body)

    def truncates(self, asked: bool | None) -> bool:
        return self.settings.truncate if asked is None else asked

    async def beside(self, characters: int, work: Callable[[], Any]) -> Any:
        """Runs `work`, beside the event loop when it is long."""
        return work() if characters < _LONG_TEXT else await asyncio.to_thread(work)

    async def rows(self, request: Request, inputs: Sequence[Tokens]) -> Rows:
        """What the encoder makes of inputs. Raises Refused; ClientDisconnect once nobody waits for it."""
        assert self.batcher is not None
        tokens = sum(len(one.ids) for one in inputs)
        if tokens > self.settings.max_request_tokens:
            most = self.settings.max_request_tokens
            raise too_large(f"the request has {tokens} tokens, at most {most} are read", code="too_many_tokens")
        return await while_connected(request, self.batcher.submit(inputs))

    def info(self) -> dict[str, Any]:
        model, limits = self.model, self.settings
        facts = {
            "model": limits.served_name,
            "kind": model.kind,
            "backend": model.backend,
            "threads": model.threads,
            "version": fastff.__version__,
            "max_body_bytes": limits.max_body_bytes,
            "truncate": limits.truncate,
        }
        if isinstance(model, DecoderModel):
            return facts | {"positions": model.positions, "streams": limits.streams}
        return facts | {
            "max_length": model.texts.max_length,
            "outputs": model.outputs,
            "labels": model.labels,
            "max_inputs": limits.max_inputs,
            "max_request_tokens": limits.max_request_tokens,
            "batch_tokens": limits.batch_tokens,
            "queue_tokens": limits.queue_tokens,
        }


def create_app(model: Model, settings: ServeSettings) -> FastAPI:
    """The ASGI application that serves a model."""
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.queue.start()
        yield
        await asyncio.to_thread(service.queue.close)

    app = FastAPI(title=f"fastff: {settings.served_name}", version=fastff.__version__, lifespan=lifespan)
    _add_facts(app, service)
    if isinstance(model, EncoderModel):
        encoder = EncoderRoutes(service, model)
        add_post(app, "/v1/embeddings", encoder.embeddings, schema.EmbeddingsRequest)
        add_post(app, "/embed", encoder.embed, schema.EmbedRequest)
        add_post(app, "/rerank", encoder.rerank, schema.RerankRequest)
        add_post(app, "/predict", encoder.predict, schema.PredictRequest)
    else:
        generation = GenerationRoutes(service, model)
        add_post(app, "/v1/completions", generation.complete, schema.CompletionRequest)
        add_post(app, "/v1/chat/completions", generation.chat, schema.ChatRequest)
    _add_refusals(app, service)
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    app.add_middleware(Guard, metrics=service.metrics, api_key=settings.api_key, paths=paths)
    return app


def add_post(
    app: FastAPI, path: str, answer: Callable[[Request], Awaitable[Response]], body: type[schema.Request]
) -> None:
    """A route whose body is read by `answer` itself: limits come before parsing."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    described = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, answer, methods=["POST"], response_model=None, openapi_extra=described)


def _add_facts(app: FastAPI, service: Service) -> None:
    name = service.settings.served_name
    card = {"id": name, "object": "model", "created": service.created, "owned_by": "fastff"}
    bodies: dict[str, Callable[[], Any]] = {
        "/health": lambda: {"status": "ok"},
        "/info": service.info,
        "/v1/models": lambda: {"object": "list", "data": [card]},
        f"/v1/models/{name}": lambda: card,
    }
    for path, make in bodies.items():

        async def answer(make: Callable[[], Any] = make) -> Response:
            return Response(orjson.dumps(make()), media_type="application/json")

        async def get(_: Request, answer: Callable[[], Awaitable[Response]] = answer) -> Response:
            return await answer()

        app.add_route(path, get, methods=["GET"])

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_route("/metrics", metrics, methods=["GET"])


def _add_refusals(app: FastAPI, service: Service) -> None:
    kind = service.model.kind

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {"retry-after": "1"} if error.status == 429 else {}
        if error.status in (408, 413):
            headers["connection"] = "close"
        return error.response(headers)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            message += f"; the model served is of kind {kind!r}, and /docs lists its routes"
        return Refused(error.status_code, message, code="not_found").response(error.headers)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, unknown)
