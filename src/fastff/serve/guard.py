"""What stands before every route: the key, the count of answers, and the limits of a body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Collection
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastff.serve.metrics import Metrics
from fastff.serve.refusals import Refused, too_large

OPEN_PATHS = ("/health",)  # without a key
_OVERSIZE_SECONDS = 1.0  # in which what is too much is read and dropped, so that the client sees the answer
_LOOK_SECONDS = 0.25  # how often a waiting request looks whether its client is still there
Result = TypeVar("Result")
logger = logging.getLogger("fastff.serve")


class Guard:
    """ASGI middleware. paths: those that are counted by name."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 499  # for clients that left before an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.began()
        try:
            if self._key is not None and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
                refused = Refused(401, "this server wants `Authorization: Bearer KEY`", code="invalid_api_key")
                return await refused.response()(scope, receive, noted)
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request of %s failed", scope["path"])
            if status != 499:
                raise  # the answer has begun: the connection is closed
            await Refused(500, "the server failed; its log says more", code="internal").response()(
                scope, receive, noted
            )
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.ended(path, status, time.perf_counter() - began)

    def _allowed(self, scope: Scope) -> bool:
        assert self._key is not None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._key)


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """The whole body. Raises Refused for one that is too large (413) or comes too slowly (408)."""
    declared = request.headers.get("content-length", "")
    stream = request.stream()
    parts: list[bytes] = []
    size = int(declared) if declared.isdecimal() else 0
    try:
        async with asyncio.timeout(seconds):
            if size <= most:
                size = 0
                async for part in stream:
                    size += len(part)
                    parts.append(part)
                    if size > most:
                        break
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {seconds:g} s", code="slow_client") from error
    if size <= most:
        return b"".join(parts)
    parts.clear()
    try:
        async with asyncio.timeout(_OVERSIZE_SECONDS):
            async for _ in stream:
                pass
    except TimeoutError:
        pass
    raise too_large(f"the body has {size} bytes or more, at most {most} are read", code="body_too_large")


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when its client goes. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
