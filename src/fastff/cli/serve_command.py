"""`fastff serve`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.serve import ServeSettings


def serve(settings: ServeSettings) -> int:
    """Serve a model over HTTP, as OpenAI's clients and text-embeddings-inference's ask for it.

    SIGTERM or Ctrl-C stops it when the requests that it accepted are answered.
    """
    from fastff.serve.server import serve as run

    return run(settings, say=lambda line: console.print(line, markup=False))
