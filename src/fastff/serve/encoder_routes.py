"""Routes of embedding models and classifiers: OpenAI's /v1/embeddings, and text-embeddings-inference's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from fastff.serve import request_schema as schema
from fastff.serve.batcher import Rows, Tokens
from fastff.serve.encoder_backends import EncoderModel
from fastff.serve.refusals import Refused, invalid, too_large
from fastff.serve.texts import Text

if TYPE_CHECKING:
    from fastff.serve.service import Service

_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class EncoderRoutes:
    """Answers of one model."""

    def __init__(self, service: Service, model: EncoderModel) -> None:
        self._service, self._model = service, model

    async def embeddings(self, request: Request) -> Response:
        asked = await self._service.parsed(request, schema.EmbeddingsRequest)
        schema.check_model(asked.model, self._service.settings.served_name)
        self._check_kind("embedding")
        if asked.dimensions not in (None, self._model.outputs):
            message = f"dimensions {asked.dimensions}: the model has {self._model.outputs}, and they cannot be fewer"
            raise invalid(message, param="dimensions")
        inputs = await self._inputs(asked.input, asked.truncate)
        rows = normalised(await self._service.rows(request, inputs))
        written = [_base64(row) for row in rows] if asked.encoding_format == "base64" else rows
        tokens = sum(len(one.ids) for one in inputs)
        return _json(
            {
                "object": "list",
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(written)],
                "model": self._service.settings.served_name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def embed(self, request: Request) -> Response:
        asked = await self._service.parsed(request, schema.EmbedRequest)
        self._check_kind("embedding")
        rows = await self._service.rows(request, await self._inputs(asked.inputs, asked.truncate))
        return _json(normalised(rows) if asked.normalize else np.ascontiguousarray(rows))

    async def rerank(self, request: Request) -> Response:
        """Scores of a query with texts: by a classifier of one label for each pair, or by the cosine of embeddings."""
        asked = await self._service.parsed(request, schema.RerankRequest)
        if self._model.labels:
            if len(self._model.labels) != 1:
                raise invalid(f"the classifier has {len(self._model.labels)} labels, a reranker has 1")
            pairs: list[Text] = [(asked.query, text) for text in asked.texts]
            logits = (await self._service.rows(request, await self._tokens(pairs, asked.truncate)))[:, 0]
            scores = logits if asked.raw_scores else _sigmoid(logits)
        else:
            rows = normalised(
                await self._service.rows(request, await self._tokens([asked.query, *asked.texts], asked.truncate))
            )
            scores = rows[1:] @ rows[0]
        order = np.argsort(-scores, kind="stable")
        found: list[dict[str, Any]] = [{"index": int(i), "score": float(scores[i])} for i in order]
        if asked.return_text:
            found = [one | {"text": asked.texts[one["index"]]} for one in found]
        return _json(found)

    async def predict(self, request: Request) -> Response:
        """Labels of every input with their probabilities, likeliest first."""
        asked = await self._service.parsed(request, schema.PredictRequest)
        self._check_kind("classifier")
        if not asked.inputs:
            raise invalid("inputs is empty", param="inputs")
        logits = await self._service.rows(request, await self._tokens(asked.texts(), asked.truncate))
        if not asked.raw_scores:
            logits = _sigmoid(logits) if logits.shape[1] == 1 else _softmax(logits)
        found = [self._labelled(row) for row in logits]
        several = not isinstance(asked.inputs, str) and not isinstance(asked.inputs[0], str)
        return _json(found if several else found[0])

    def _labelled(self, scores: Rows) -> list[dict[str, Any]]:
        order = np.argsort(-scores, kind="stable")
        return [{"label": self._model.labels[i], "score": float(scores[i])} for i in order]

    def _check_kind(self, kind: str) -> None:
        if self._model.kind != kind:
            raise Refused(
                404, f"the model served is of kind {self._model.kind!r}, not {kind!r}", code="model_not_supported"
            )

    async def _inputs(self, given: schema.Input, truncate: bool | None) -> list[Tokens]:
        """Tokens of texts or ids. Raises Refused."""
        if isinstance(given, str):
            return await self._tokens([given], truncate)
        if not given:
            raise invalid("input is empty", param="input")
        if isinstance(given[0], str):
            return await self._tokens(given, truncate)
        ids: Any = [given] if isinstance(given[0], int) else given
        self._check_count(len(ids))
        return self._model.texts.given(ids, truncate=self._service.truncates(truncate))

    async def _tokens(self, texts: Sequence[Text], truncate: bool | None) -> list[Tokens]:
        self._check_count(len(texts))
        cut = self._service.truncates(truncate)
        characters = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)
        found: list[Tokens] = await self._service.beside(
            characters, lambda: self._model.texts.tokens(texts, truncate=cut)
        )
        return found

    def _check_count(self, count: int) -> None:
        most = self._service.settings.max_inputs
        if count > most:
            raise too_large(f"the request has {count} inputs, at most {most} are read", code="too_many_inputs")


def normalised(rows: Rows) -> Rows:
    """Rows of length 1."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Rows = rows / np.maximum(lengths, 1e-12)
    return found


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode()


def _sigmoid(logits: Rows) -> Rows:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def _softmax(logits: Rows) -> Rows:
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    found: Rows = shares / shares.sum(1, keepdims=True)
    return found


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content, option=_NUMPY), media_type="application/json")
