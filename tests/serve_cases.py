"""Small models to serve, and a server of them in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from encoder_cases import bert, random_model
from engine_cases import random_model as random_decoder
from fastff.engine import native_export
from fastff.serve import ServeSettings
from fastff.serve.served_model import open_model
from fastff.serve.server import make_server

WORDS = [f"w{number}" for number in range(70)]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


def tokenizer(template=None):
    """Of 76 words, with [CLS] and [SEP] around a text."""
    table = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is None:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", table["[CLS]"]), ("[SEP]", table["[SEP]"])],
        )
    made = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    made.chat_template = template
    return made


def write_model(kind, folder):
    """A model of Transformers with random weights: embedding, classifier or causal."""
    if kind == "causal":
        model, words = random_decoder("llama"), tokenizer(TEMPLATE)
        model.generation_config.eos_token_id = 3
    elif kind == "classifier":
        model = random_model(lambda: bert(BertForSequenceClassification, num_labels=3))
        words = tokenizer()
    else:
        model, words = random_model(bert), tokenizer()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model, words


def write_export(kind, folder):
    """The same for fastff's engine, with the model beside it."""
    model, words = write_model(kind, folder / "model")
    out = folder / "native"
    if kind == "causal":
        native_export.export_model(model, words, out)
    else:
        native_export.export_encoder(model, words, str(folder / "model"), kind, out)
    return out


@contextlib.contextmanager
def serving(folder, **options):
    """Base address, and the server, of a directory."""
    before = torch.get_num_threads()
    settings = ServeSettings(folder, port=0, **{"name": "small", "threads": 1, **options})
    server = make_server(open_model(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()
        torch.set_num_threads(before)
