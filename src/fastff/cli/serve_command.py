"""`fastff serve`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.serve import ServeSettings


def serve(settings: ServeSettings) -> int:
    """Serve a model over HTTP to clients of OpenAI and text-embeddings-inference.

    SIGTERM or Ctrl-C stops it when the requests that it accepted are answered.
    """
    from fastff.serve.server import serve as run

    return run(settings, say=lambda line: console.print(line, markup=False))
