"""Training and scoring one model: the same loop for masked words and for authors, resumable at any step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.demo.data import Corpus, Sentences, pad
from fastff.layers import FFF
from fastff.models import (
    DenseFeedforward,
    UltraFastBertConfig,
    UltraFastBertForMaskedLM,
    UltraFastBertForSequenceClassification,
)
from fastff.text.examples import batches_by_length
from fastff.text.windows import IGNORED
from fastff.train.interrupt import Stop
from fastff.train.schedule import triangle
from train_tiny import settings as sizes
from train_tiny.settings import Variant
from train_tiny.store import Store

Batch = dict[str, Tensor]
CHECKPOINT_SECONDS = 10.0
CURVE_POINTS = 60
POOL = 16  # batches whose sentences are sorted by length together
WARMUP = 0.15  # of the steps, the learning rate rises; then it falls to zero


@dataclass(frozen=True)
class Job:
    """What to train for how long. batch(step) must depend on the step alone, so that a second run can go on."""

    name: str
    steps: int
    lr: float
    batch: Callable[[int], Batch]
    seed: int


def configuration(variant: Variant, vocab_size: int, labels: int, dropout: float) -> UltraFastBertConfig:
    config = UltraFastBertConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.HIDDEN,
        num_hidden_layers=sizes.LAYERS,
        num_attention_heads=sizes.HEADS,
        max_position_embeddings=sizes.LONGEST,
        feedforward=variant.feedforward,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        embedding_dropout=dropout,
        classifier_dropout=dropout,
        sparse_prediction=True,
        head_dim=sizes.HIDDEN,
    )
    config.num_labels = labels
    return config


def masked_word_model(variant: Variant, vocab_size: int, seed: int, start: dict[str, Tensor] | None) -> Any:
    """A model to pretrain. With `start`, the weights of the shared start, its feedforwards begin by adding nothing, so
    that every variant begins as exactly the same function."""
    torch.manual_seed(seed)
    model = UltraFastBertForMaskedLM(configuration(variant, vocab_size, labels=2, dropout=0.0))
    if start is not None:
        missing, extra = model.load_state_dict(start, strict=False)
        if extra or any(".feedforward" not in name for name in missing):
            raise RuntimeError(f"the shared start does not fit {variant.name}: missing {missing}, extra {extra}")
        for layer in model.modules():
            if isinstance(layer, FFF):
                nn.init.zeros_(layer.w_out)
            elif isinstance(layer, DenseFeedforward):
                nn.init.zeros_(layer.linear_out.weight)
    return model


def author_model(variant: Variant, vocab_size: int, labels: int, seed: int, pretrained: dict[str, Tensor]) -> Any:
    """A model to fine-tune, on the encoder of a pretrained one."""
    torch.manual_seed(seed)
    model = UltraFastBertForSequenceClassification(configuration(variant, vocab_size, labels=labels, dropout=0.1))
    prefix = "encoder."
    encoder = {name.removeprefix(prefix): value for name, value in pretrained.items() if name.startswith(prefix)}
    model.encoder.load_state_dict(encoder)
    return model


def train(job: Job, model: nn.Module, store: Store, stop: Stop, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; returns the curve, the seconds and the tokens.

    Writes the state `job.name`: a checkpoint now and then and when stopped, the weights alone at the end.
    report(step, loss) is called after every step. Raises KeyboardInterrupt, with the checkpoint written.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, betas=(0.9, 0.98), weight_decay=0.01)
    at = _restore(store.load_state(job.name), model, optimizer)
    model.train()
    saved = begin = time.perf_counter()
    try:
        while at["step"] < job.steps:
            with stop.deferred():
                loss, tokens = _step(job, at["step"], model, optimizer)
                at["step"] += 1
                at["tokens"] += tokens
                _note(at, loss, job.steps)
                report(at["step"], at["smooth"])
                if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    saved = time.perf_counter()
                    _checkpoint(store, job.name, at, saved - begin, model, optimizer)
            stop.check()
    except KeyboardInterrupt:
        _checkpoint(store, job.name, at, time.perf_counter() - begin, model, optimizer)
        raise
    seconds = at["seconds"] + time.perf_counter() - begin
    store.save_state(job.name, {"model": model.state_dict()})
    return {"curve": at["curve"], "seconds": seconds, "tokens": at["tokens"], "steps": job.steps}


def _step(job: Job, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    torch.manual_seed(job.seed * 1_000_003 + step)  # dropout, the same after a break
    for group in optimizer.param_groups:
        group["lr"] = job.lr * triangle((step + 1) / (job.steps + 1), WARMUP)
    batch = job.batch(step)
    loss = model(**batch).loss
    value = float(loss.detach())
    if not value < float("inf"):
        raise RuntimeError(f"{job.name}: the loss is {value} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return value, batch["input_ids"].numel()


def _restore(state: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if state is None or "optimizer" not in state:
        return {"step": 0, "tokens": 0, "curve": [], "smooth": 0.0, "seconds": 0.0}
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return dict(state["at"])


def _checkpoint(
    store: Store, name: str, at: dict[str, Any], seconds: float, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    state = {**at, "seconds": at["seconds"] + seconds}
    store.save_state(name, {"at": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _note(at: dict[str, Any], loss: float, steps: int) -> None:
    # A mean over about twenty steps, unbiased from the first on.
    keep = min(0.95, 1 - 1 / at["step"])
    at["smooth"] = keep * at["smooth"] + (1 - keep) * loss
    if at["step"] % max(1, steps // CURVE_POINTS) == 0 or at["step"] == steps:
        at["curve"].append([at["step"], round(at["smooth"], 4)])


def start_batches(corpus: Corpus, steps: int, seed: int) -> Callable[[int], Batch]:
    """Windows that grow, for the shared start."""
    plan = [length for length, share in sizes.START_WINDOWS for _ in range(round(share * steps))]
    plan += [sizes.START_WINDOWS[-1][0]] * (steps - len(plan))
    shuffled = {length: _shuffled(corpus.windows(corpus.learn, length), seed) for length, _ in sizes.START_WINDOWS}
    before = [plan[:step].count(plan[step]) for step in range(steps)]

    def batch(step: int) -> Batch:
        rows = max(1, sizes.START_BATCH_TOKENS // plan[step])
        return _masked(corpus, shuffled[plan[step]], before[step], rows, seed * 7919 + step)

    return batch


def pretrain_batches(corpus: Corpus, seed: int) -> Callable[[int], Batch]:
    """Windows of full length, the same for every variant."""
    shuffled = _shuffled(corpus.windows(corpus.learn, sizes.WINDOW), seed + 1)
    rows = sizes.BATCH_TOKENS // sizes.WINDOW
    return lambda step: _masked(corpus, shuffled, step, rows, seed * 7919 + 500_000 + step)


def _shuffled(windows: Tensor, seed: int) -> Tensor:
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _masked(corpus: Corpus, windows: Tensor, number: int, rows: int, seed: int) -> Batch:
    chosen = windows[torch.arange(number * rows, (number + 1) * rows) % len(windows)]
    inputs, labels = corpus.mask(chosen, seed)
    return {"input_ids": inputs, "labels": labels}


def author_batches(sentences: Sentences, steps: int, seed: int) -> Callable[[int], Batch]:
    """Sentences of like length together, pass after pass."""
    lengths, rng = sentences.lengths, np.random.default_rng(seed)
    order: list[np.ndarray[Any, Any]] = []
    while len(order) < steps:
        order += batches_by_length(lengths, sizes.BATCH_SENTENCES, rng, pool=POOL)

    def batch(step: int) -> Batch:
        tokens, mask = pad([sentences.tokens[i] for i in order[step]], sizes.LONGEST)
        return {"input_ids": tokens, "attention_mask": mask, "labels": sentences.labels[torch.from_numpy(order[step])]}

    return batch


@torch.no_grad()
def masked_word_losses(model: nn.Module, inputs: Tensor, labels: Tensor, stop: Stop) -> list[float]:
    """Mean loss (nats) over the masked pieces of each window."""
    model.eval()
    losses: list[float] = []
    for begin in range(0, len(inputs), 16):
        logits = model(input_ids=inputs[begin : begin + 16]).logits
        want = labels[begin : begin + 16]
        each = F.cross_entropy(logits.transpose(1, 2), want, ignore_index=IGNORED, reduction="none")
        losses += (each.sum(1) / (want != IGNORED).sum(1)).tolist()
        stop.check()
    return losses


@torch.no_grad()
def author_predictions(model: nn.Module, sentences: Sentences, stop: Stop) -> list[int]:
    """The likeliest author of each sentence."""
    model.eval()
    found = [0] * len(sentences.tokens)
    for rows in batches_by_length(sentences.lengths, 64, np.random.default_rng(0), pool=POOL):
        tokens, mask = pad([sentences.tokens[i] for i in rows], sizes.LONGEST)
        best = model(input_ids=tokens, attention_mask=mask).logits.argmax(1)
        for index, label in zip(rows, best.tolist(), strict=True):
            found[index] = label
        stop.check()
    return found
