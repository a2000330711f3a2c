"""What a user may ask of `fastff serve`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

BackendName = Literal["native", "openvino", "torch"]
_POSITIVE = (
    "batch_tokens", "queue_tokens", "max_inputs", "max_request_tokens", "max_body_bytes", "max_connections", "streams",
    "queued_prompts", "client_seconds", "stop_seconds",
)  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True)
class ServeSettings:
    """Options of one server. Raises ValueError for values that cannot be."""

    model: Path
    """Directory of an export (`fastff export`) or of a Transformers model."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one."""
    port: int = 8080
    """Port to listen on; 0 for a free one."""
    name: str | None = None
    """Name of the model in requests and answers. Default: that of the directory."""
    backend: BackendName | None = None
    """What runs the model. Default: what the directory holds."""
    threads: int = 0
    """Threads of the model; 0 for all that this process may use, by its affinity and its quota."""
    truncate: bool = False
    """Cut inputs that are too long, unless a request says otherwise; without it they are errors."""
    batch_tokens: int = 8192
    """Tokens of one batch of the model; longer requests take several."""
    queue_tokens: int = 262_144
    """Tokens that may wait; a request that finds no room is answered with 429."""
    max_inputs: int = 2048
    """Most texts of one request; more are answered with 413."""
    max_request_tokens: int = 262_144
    """Most tokens of one request; more are answered with 413."""
    max_body_bytes: int = 16 * 2**20
    """Most bytes of one request; more are answered with 413."""
    max_connections: int = 1024
    """Connections at once; others are answered with 503."""
    streams: int = 4
    """Texts that are generated at once, in turns."""
    queued_prompts: int = 64
    """Prompts that may wait for their turn; further ones are answered with 429."""
    client_seconds: float = 30.0
    """Seconds that a client may take to send a request, or to go on reading an answer."""
    stop_seconds: float = 30.0
    """Seconds after SIGTERM or Ctrl-C in which accepted requests are still answered."""
    api_key: Annotated[str | None, Parameter(env_var="FASTFF_API_KEY")] = None
    """Key that clients must send as `Authorization: Bearer KEY`. Other users of this machine can read options: set
    FASTFF_API_KEY in the environment instead."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is not above 0")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} is not between 0 and 65535")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads} is negative")
        if self.max_request_tokens > self.queue_tokens:
            raise ValueError(
                f"--max-request-tokens {self.max_request_tokens} is above --queue-tokens {self.queue_tokens}: "
                "such a request could never be taken"
            )
        if self.api_key == "":
            raise ValueError("the API key is empty: leave it out, or choose one")

    @property
    def served_name(self) -> str:
        return self.name or self.model.resolve().name
