"""What a directory holds, opened with the backend that reads it."""

from __future__ import annotations

import torch

from fastff.engine.facts import FACTS_FILE, OPENVINO_FILE, kind_of_export
from fastff.errors import CheckpointError
from fastff.ops.library import processors
from fastff.serve import decoder_backends, encoder_backends
from fastff.serve.decoder_backends import DecoderModel
from fastff.serve.encoder_backends import EncoderModel
from fastff.serve.serve_settings import BackendName, ServeSettings

Model = EncoderModel | DecoderModel


def open_model(settings: ServeSettings) -> Model:
    """The model to serve. Sets the threads of this process: one pool works, the others have one thread.

    Raises CheckpointError for a directory that is no model or not one of the backend asked for, and what the backends
    raise.
    """
    backend = settings.backend or backend_of(settings)
    threads = settings.threads or processors()
    torch.set_num_threads(1 if backend == "openvino" else threads)
    folder = settings.model
    if backend == "native":
        if kind_of_export(folder) == "decoder":
            return decoder_backends.open_native(folder, threads)
        return encoder_backends.open_native(folder, threads)
    if backend == "openvino":
        return encoder_backends.open_openvino(folder, threads)
    from fastff.engine.export import load_model

    model, tokenizer, kind = load_model(str(folder))
    if kind == "causal":
        return decoder_backends.open_torch(folder, model, tokenizer, threads)
    if kind == "masked":
        raise CheckpointError(f"{folder} is a masked language model: embeddings, classifiers and decoders are served")
    return encoder_backends.open_torch(folder, model, tokenizer, threads)


def backend_of(settings: ServeSettings) -> BackendName:
    """By the files of the directory."""
    folder = settings.model
    files: dict[str, BackendName] = {FACTS_FILE: "native", OPENVINO_FILE: "openvino", "config.json": "torch"}
    for name, backend in files.items():
        if (folder / name).is_file():
            return backend
    raise CheckpointError(f"{folder} holds none of {', '.join(files)}: give the directory of a model or of an export")
