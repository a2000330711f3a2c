"""Teaching the new layers: each from its dense layer, then all together from the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.convert.capture import Captured, Progress
from fastff.convert.initialise import dense_forward, initialise, prune
from fastff.convert.schedule import Average, Fade, SlowTurns
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.text.examples import Examples

Kind = Literal["embedding", "causal", "masked", "classifier"]
CHUNK_ROWS = 8192
CLIP = 1.0
WARMUP = 0.05  # of the steps
LOGITS = 2**28  # at once, of a teacher or a student: a step of more is taken in pieces


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over unpadded positions: hidden (examples, length, width), mask (examples, length)."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def normaliser(model: Any, block: nn.Module) -> Callable[[Tensor], Tensor]:
    """What acts on residual plus feedforward next: the block's own norm, or a plain one where that follows later."""
    norm = family_of(model.config.model_type).norm_of(block)
    return norm if norm is not None else lambda h: F.layer_norm(h, h.shape[-1:])


def missed(norm: Callable[[Tensor], Tensor], dense: DenseWeights, module: nn.Module, x: Tensor, r: Tensor) -> Tensor:
    """Share of the dense layer's effect that the new layer misses, after the norm: 0 is exact, 1 is the mean output.

    Every dimension counts by its own variance, since a few outlying ones would hide all others."""
    y = dense_forward(dense, x)
    want = norm(r + y)
    scale = want.var(0).clamp(min=1e-12)
    error = ((norm(r + module(x)) - want).square() / scale).mean()
    effect = ((norm(r + y.mean(0)) - want).square() / scale).mean()
    return error / effect.clamp(min=1e-12)


def chunks_of(
    captured: Captured, device: torch.device, first: int = 0, last: int | None = None
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """A function that gives the captured rows [first, last) piece by piece."""
    end = len(captured) if last is None else last

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(first, end, CHUNK_ROWS):
            yield captured.rows(slice(start, min(start + CHUNK_ROWS, end)), device)

    return chunks


def teach_layer(
    module: ConvertedFeedforward,
    dense: DenseWeights,
    norm: Callable[[Tensor], Tensor],
    captured: Captured,
    *,
    steps: int,
    batch: int = 2048,
    rate: float = 1e-3,
    seed: int = 0,
    rows: int | None = None,
) -> float:
    """Initialise one layer and fit it to its dense layer on captured rows, or the first `rows` of them. Returns
    `missed` on rows kept aside."""
    device = module.bias.device
    rng = np.random.default_rng(seed)
    count = len(captured) if rows is None else min(rows, len(captured))
    kept = min(CHUNK_ROWS, count // 10)
    sample = captured.rows(slice(kept, min(kept + 2 * CHUNK_ROWS, count)), device)[0]
    initialise(module, dense, sample, chunks_of(captured, device, kept, count), seed=seed)
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: cosine(k, steps))
    module.train()
    for _ in range(steps):
        start = int(rng.integers(kept, max(count - batch, kept) + 1))
        loss = missed(norm, dense, module, *captured.rows(slice(start, min(start + batch, count)), device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimiser.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        return float(missed(norm, dense, module, *captured.rows(slice(0, kept), device)))


@torch.no_grad()
def prune_layer(
    module: ConvertedFeedforward, dense: DenseWeights, norm: Callable[[Tensor], Tensor], captured: Captured
) -> float:
    """Fill a narrow layer with the dense layer's strongest neurons. Returns `missed` on rows kept aside."""
    kept = min(CHUNK_ROWS, len(captured) // 10)
    prune(module, dense, captured.rows(slice(kept, kept + 2 * CHUNK_ROWS), module.bias.device)[0])
    return float(missed(norm, dense, module, *captured.rows(slice(0, kept), module.bias.device)))


def cosine(step: int, steps: int) -> float:
    """Learning rate factor: a short rise, then half a cosine down to zero."""
    rise = max(1, int(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def distillation_loss(student: Any, teacher: Any, inputs: dict[str, Tensor], kind: Kind) -> Tensor:
    """Hidden states of every block, each dimension by its own variance, plus `end_loss`."""
    with torch.no_grad():
        target = teacher(**inputs, output_hidden_states=True)
    got = student(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].bool()
    hidden = []
    for h, t in zip(got.hidden_states[1:], target.hidden_states[1:], strict=True):
        h, t = h[mask], t[mask]
        hidden.append(((h - t).square() / t.var(0).clamp(min=1e-6)).mean())
    return torch.stack(hidden).mean() + end_loss(got, target, inputs["attention_mask"], kind)


def end_loss(got: Any, target: Any, mask: Tensor, kind: Kind) -> Tensor:
    """What the model is used for: cosine and in-batch similarity of mean-pooled embeddings, or the divergence from the
    teacher's distribution over tokens or classes. got, target: outputs with hidden states; mask (examples, length)."""
    if kind == "embedding":
        a = F.normalize(mean_pool(got.hidden_states[-1], mask), dim=-1)
        b = F.normalize(mean_pool(target.hidden_states[-1], mask), dim=-1)
        return 10 * (1 - (a * b).sum(-1)).mean() + 100 * (a @ a.t() - b @ b.t()).square().mean()
    logits, wanted = got.logits, target.logits
    if kind != "classifier":
        logits, wanted = logits[mask.bool()], wanted[mask.bool()]
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), log_target=True, reduction="batchmean")


@dataclass(frozen=True)
class Recipe:
    """How all layers are taught together.

    rate, rate_others  learning rates of the new layers and of everything else; embeddings are frozen
    rate_routing       factor on `rate` for what decides turns: rows of w_in and b_in that belong to nodes
    mild               share of the steps in which the dense layers' outputs are faded out: at first a block gives
                       what its dense layer gave, after that what its new layer gives
    average            decay of the average of all weights that is kept in the end, per step; 0 keeps the last weights
    """

    steps: int
    batch: int
    rate: float = 1e-3
    rate_others: float = 2e-4
    rate_routing: float = 1.0
    mild: float = 0.0
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.mild < 1.0:
            raise ValueError(f"mild {self.mild} is not in [0, 1)")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average {self.average} is not in [0, 1)")


def distil(
    student: Any,
    teacher: Any,
    examples: Examples,
    recipe: Recipe,
    *,
    kind: Kind,
    progress: Progress = lambda *_: None,
    start: int = 0,
    state: dict[str, Any] | None = None,
    checkpoint: Callable[[int, dict[str, Any]], None] = lambda *_: None,
    checkpoint_every: int = 200,
    batches: Iterator[np.ndarray[Any, Any]] | None = None,
) -> None:
    """Train the whole student but its embeddings to give what the teacher gives, on unlabelled text.

    start, state and checkpoint serve resuming: state holds what `checkpoint(step, state)` was given. batches: indices
    of the examples of every step, if not in the order of the recipe's seed."""
    new, others = parameter_groups(student)
    optimiser = torch.optim.AdamW(
        [{"params": new, "lr": recipe.rate}, {"params": others, "lr": recipe.rate_others}],
        weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: cosine(k, recipe.steps))
    average = Average([*new, *others], recipe.average)
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        average.restore(state["average"])
    drawn = batches or skip(examples.shuffled(recipe.batch, recipe.seed), start)
    learn_without_dropout(student)
    teacher.eval()
    fade, turns = Fade(student, teacher), SlowTurns(student, recipe.rate_routing)
    with _fast_products(student.device.type == "cuda"):
        for step in range(start, recipe.steps):
            fade.share = 0.0 if recipe.mild == 0 else max(0.0, 1 - step / (recipe.mild * recipe.steps))
            optimiser.zero_grad(set_to_none=True)
            which = next(drawn)
            for piece in pieces(examples, which, kind, student.config.vocab_size):
                with fade:
                    loss = distillation_loss(student, teacher, examples.batch(piece, student.device), kind)
                (loss * (len(piece) / len(which))).backward()
            nn.utils.clip_grad_norm_([*new, *others], CLIP)
            turns.remember()
            optimiser.step()
            turns.shorten()
            schedule.step()
            average.add()
            progress("distil", step + 1, recipe.steps)
            if (step + 1) % checkpoint_every == 0 and step + 1 < recipe.steps:
                kept = {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
                checkpoint(step + 1, {**kept, "average": average.state})
    average.put()
    student.eval()


def pieces(examples: Examples, which: np.ndarray[Any, Any], kind: Kind, vocabulary: int) -> list[np.ndarray[Any, Any]]:
    """A step's examples, cut so that no piece has more than LOGITS values over the vocabulary."""
    if kind not in ("causal", "masked"):
        return [which]
    longest = int((examples.offsets[which + 1] - examples.offsets[which]).max())
    count = -(-len(which) * longest * vocabulary // LOGITS)
    return np.array_split(which, min(count, len(which)))


@contextmanager
def _fast_products(enabled: bool) -> Iterator[None]:
    """TF32 in matrix products on a GPU: the noise is below that of a batch, and a regression never runs in here."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def skip(batches: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        next(batches)
    return batches


def parameter_groups(student: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the new layers, and the others; embeddings are frozen."""
    inside = {id(p) for m in student.modules() if isinstance(m, ConvertedFeedforward) for p in m.parameters()}
    frozen = {id(p) for m in student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    trained = [p for p in student.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside]


def learn_without_dropout(student: nn.Module) -> None:
    """Training mode for the new layers alone: elsewhere it would switch on dropout, in attention kernels too, and
    teacher and student would not see the same thing."""
    student.eval()
    for module in student.modules():
        if isinstance(module, ConvertedFeedforward):
            module.train()


def use_masked_training(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Choose how trees compute while training: see ConvertedFeedforward."""
    for module in modules:
        if isinstance(module, ConvertedFeedforward):
            module.masked_training = enabled
