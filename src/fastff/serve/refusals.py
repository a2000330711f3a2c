"""What a request is refused with: a status, and an error object as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
_TYPES |= {503: "server_error"}


class Refused(Exception):
    """A request that is not served. status: of HTTP; code: a word for programs."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        return Response(orjson.dumps(self.body()), self.status, dict(headers or {}), "application/json")

    def body(self) -> dict[str, object]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> Refused:
    return Refused(400, message, code=code, param=param)


def too_large(message: str, *, code: str) -> Refused:
    return Refused(413, message, code=code)


def busy(message: str) -> Refused:
    """The queue is full: the client may try again."""
    return Refused(429, message, code="queue_full")
