"""What requests may hold. A field that would change the answer and is not served is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic.types import FailFast

from fastff.serve.refusals import Refused, invalid


class FirstError(FailFast):
    """Of a list: do not look for a second one in a list of thousands."""

    __hash__ = object.__hash__  # as members of a union are asked for


Strings = Annotated[list[StrictStr], FirstError()]
Ids = Annotated[list[StrictInt], FirstError()]
IdLists = Annotated[list[Ids], FirstError()]
Input = Annotated[StrictStr | Strings | Ids | IdLists, Field(union_mode="left_to_right")]
Pair = Annotated[list[StrictStr], Field(min_length=1, max_length=2)]
PairLists = Annotated[list[Pair], FirstError()]
Parsed = TypeVar("Parsed", bound="Request")
_TEXTS = "expected a text, a list of texts, token ids, or a list of lists of token ids"
# Of a field that takes several forms, instead of what is wrong with the first of them.
_UNIONS = {"input": _TEXTS, "prompt": _TEXTS, "inputs": "expected a text or texts, in one of the forms of this route"}


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls: type[Parsed], body: bytes) -> Parsed:
        """Raises Refused (400) that names the field."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise cls._refusal(error) from error

    @classmethod
    def _refusal(cls, error: ValidationError) -> Refused:
        first = error.errors(include_url=False, include_input=False)[0]
        names, message = [str(part) for part in first["loc"]], first["msg"]
        if len(names) > 1 and names[0] in _UNIONS:
            names, message = names[:1], _UNIONS[names[0]]
        elif first["type"] == "extra_forbidden":
            message = f"not a field of this request (its fields are {', '.join(cls.model_fields)})"
        place = ".".join(names)
        return invalid(f"{place or 'body'}: {message}", param=place or None)


class OfOpenAI(Request):
    """What OpenAI's clients may send beside the question, and what changes nothing."""

    model: StrictStr | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class EmbeddingsRequest(OfOpenAI):
    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    truncate: bool | None = None


class EmbedRequest(Request):
    """Of text-embeddings-inference."""

    inputs: Input
    normalize: bool = True
    truncate: bool | None = None


class RerankRequest(Request):
    """Of text-embeddings-inference."""

    query: StrictStr
    texts: Annotated[Strings, Field(min_length=1)]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class PredictRequest(Request):
    """Of text-embeddings-inference: a text, a pair of texts, or a list of either, each in a list of its own."""

    inputs: Annotated[StrictStr | Pair | PairLists, Field(union_mode="left_to_right")]
    raw_scores: bool = False
    truncate: bool | None = None

    def texts(self) -> list[str | tuple[str, str]]:
        """One entry for each input."""
        if isinstance(self.inputs, str):
            return [self.inputs]
        if isinstance(self.inputs[0], str):
            return [_text(self.inputs)]
        return [_text(one) for one in self.inputs]


def _text(one: Sequence[str]) -> str | tuple[str, str]:
    return one[0] if len(one) == 1 else (one[0], one[1])


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(OfOpenAI):
    """What completions and chats share."""

    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[StrictInt, Field(ge=0)] = 0
    seed: StrictInt | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate: bool | None = None
    # Only as they change nothing:
    n: Literal[1] = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in texts if text]


class CompletionRequest(GenerationRequest):
    prompt: Input
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    logprobs: None = None
    suffix: Literal[""] | None = None


class TextPart(Request):
    type: Literal["text"]
    text: StrictStr


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Request):
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: ResponseFormat | None = None


def check_model(asked: str | None, served: str) -> None:
    """Raises Refused (404) for another model."""
    if asked is not None and asked != served:
        raise Refused(404, f"the model {asked!r} is not served: {served!r} is", code="model_not_found", param="model")
