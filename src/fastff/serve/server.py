"""uvicorn around the application: limits of connections, and a stop that loses no request."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastff.serve.serve_settings import ServeSettings

_HEADER_BYTES = 64 * 1024
_KEEP_ALIVE_SECONDS = 75
_SWITCH_SECONDS = 0.0005  # the model's thread is not kept waiting for the interpreter by the event loop


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which gives up on clients that send their headers or read their answers too slowly."""

    client_seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.client_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._cancel_timer()
        self._header_bytes, self._in_headers = 0, True
        self._timer = self.loop.call_later(self.client_seconds, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._cancel_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.client_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _cancel(self) -> None:
        self._cancel_timer()
        if self._stalled is not None:
            self._stalled.cancel()


def serve(settings: ServeSettings, *, say: Callable[[str], object]) -> int:
    """Open the model and serve it until SIGTERM or Ctrl-C; returns an exit code. say: told of the address.

    Raises CheckpointError and what the model's backend raises.
    """
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # texts are short, and the pool would spin beside the model's
    from fastff.serve.served_model import open_model

    model = open_model(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # to which uvicorn hands a signal on when it has stopped
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    server = make_server(model, settings)
    say(f"opened {settings.model} ({model.kind}) with {model.backend} on {model.threads} threads")
    server.run()
    return 0 if server.started else 1


def make_server(model: Any, settings: ServeSettings) -> uvicorn.Server:
    """A server that is not running yet."""
    from fastff.serve.service import create_app

    connection = type("Connection", (Connection,), {"client_seconds": settings.client_seconds})
    config = uvicorn.Config(
        create_app(model, settings),
        host=settings.host,
        port=settings.port,
        http=connection,
        ws="none",
        access_log=False,
        log_config=None,  # uvicorn's own would close the handlers of whatever else runs in this process
        log_level="info",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.stop_seconds)),
        limit_concurrency=settings.max_connections,
    )
    return uvicorn.Server(config)
