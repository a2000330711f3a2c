"""`fastff serve`: one model behind HTTP, as OpenAI's clients and text-embeddings-inference's ask for it."""

from fastff.serve.serve_settings import ServeSettings

__all__ = ["ServeSettings"]
