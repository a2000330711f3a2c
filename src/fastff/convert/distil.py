"""Teaching the new layers: each from its dense layer, then all together from the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle
from transformers import get_cosine_schedule_with_warmup

from fastff.convert import earlier
from fastff.convert.capture import Captured
from fastff.convert.distil_loss import distillation_loss
from fastff.convert.initialise import initialise, prune
from fastff.convert.neurons import dense_forward
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.models.kinds import Kind
from fastff.report.progress import Progress, silent
from fastff.routers import Router
from fastff.text.batches import Batch
from fastff.text.examples import Examples
from fastff.train.layer_training import RoutingRows
from fastff.train.recorded import Record, RecordedStep, on_gpu

Normaliser = Callable[[Tensor, Tensor], Tensor]

CHUNK_ROWS = 8192
CLIP = 1.0
ROUTER_SHARE = 0.05  # of a layer's learning rate, for its router
WARMUP = 0.05  # of the steps
LOGITS = 2**28  # at once, of a teacher or a student: a step of more is taken in pieces
MOST_LOGITS, LOGITS_BYTES = 2**30, 24  # on a GPU, of whose memory a quarter is for them and copies


def normaliser(model: Any, block: nn.Module) -> Normaliser:
    """What becomes of a residual and a feedforward's output: the block's own norm of their sum, or a plain one where
    that follows later; the output first goes through the module that the block has for it, if any."""
    family = family_of(model.config.model_type)
    norm, after = family.norm_of(block), family.after_of(block)

    def both(r: Tensor, y: Tensor) -> Tensor:
        total = r + (y if after is None else after(y))
        return F.layer_norm(total, total.shape[-1:]) if norm is None else norm(total)

    return both


def unexplained(norm: Normaliser, dense: DenseWeights, module: nn.Module, x: Tensor, r: Tensor) -> Tensor:
    """Share of the variance of the dense layer's effect, after the norm, that the new layer leaves unexplained: 0 is
    exact, 1 is the mean output.

    Every dimension counts by its own variance, since a few outlying ones would hide all others."""
    y = dense_forward(dense, x)
    want = norm(r, y)
    scale = want.var(0).clamp(min=1e-12)
    error = ((norm(r, module(x)) - want).square() / scale).mean()
    effect = ((norm(r, y.mean(0)) - want).square() / scale).mean()
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
    norm: Normaliser,
    captured: Captured,
    *,
    steps: int,
    batch: int = 2048,
    lr: float = 1e-3,
    seed: int = 0,
    rows: int | None = None,
) -> float:
    """Initialise one layer and fit it to its dense layer on captured rows, or the first `rows` of them. Returns
    `unexplained` on rows kept aside."""
    device = module.bias.device
    rng = np.random.default_rng(seed)
    count = len(captured) if rows is None else min(rows, len(captured))
    kept = min(CHUNK_ROWS, count // 10)
    sample = captured.rows(slice(kept, min(kept + 2 * CHUNK_ROWS, count)), device)[0]
    initialise(module, dense, sample, chunks_of(captured, device, kept, count), seed=seed)
    new, _, routers = parameter_groups(module)
    groups = [{"params": new, "lr": lr}, *([{"params": routers, "lr": lr * ROUTER_SHARE}] if routers else [])]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = cosine(optimiser, steps)
    module.train()
    for _ in range(steps):
        start = int(rng.integers(kept, max(count - batch, kept) + 1))
        loss = unexplained(norm, dense, module, *captured.rows(slice(start, min(start + batch, count)), device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimiser.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        return float(unexplained(norm, dense, module, *captured.rows(slice(0, kept), device)))


@torch.no_grad()
def prune_layer(module: ConvertedFeedforward, dense: DenseWeights, norm: Normaliser, captured: Captured) -> float:
    """Fill a narrow layer or experts with the dense layer's neurons as they are. Returns `unexplained` on rows kept
    aside."""
    kept = min(CHUNK_ROWS, len(captured) // 10)
    prune(module, dense, captured.rows(slice(kept, kept + 2 * CHUNK_ROWS), module.bias.device)[0])
    return float(unexplained(norm, dense, module, *captured.rows(slice(0, kept), module.bias.device)))


def cosine(optimiser: torch.optim.Optimizer, steps: int, *, done: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rates of steps `done` and later: a short rise, whose first step is not at zero, then half a cosine."""
    for group in optimiser.param_groups:
        group.setdefault("initial_lr", group["lr"])
    schedule: torch.optim.lr_scheduler.LRScheduler = get_cosine_schedule_with_warmup(
        optimiser, max(1, int(WARMUP * steps)), steps + 1, last_epoch=done
    )
    return schedule


@dataclass(frozen=True)
class Recipe:
    """How all layers are trained together.

    lr, lr_others     learning rates of the new layers and of everything else; embeddings are frozen
    lr_routers        of the routers of experts, which begin fitted: a step of `lr` would be as long as their rows
    beta2             decay, per step, of the mean of squared gradients that AdamW divides by
    hidden_share      share of the steps in which a model whose output is words learns hidden states, too
    bf16              whether a GPU computes in bfloat16
    routing_lr_scale  factor on `lr` for what decides: rows of w_in and b_in that belong to nodes
    dense_fade        share of the steps in which the dense layers' outputs are faded out: at first a block gives what
                      its dense layer gave, after that what its new layer gives
    average           decay of the average of all weights that is kept in the end, per step; 0 keeps the last weights
    """

    steps: int
    batch: int
    lr: float = 1e-3
    lr_others: float = 2e-4
    lr_routers: float = 5e-5
    beta2: float = 0.98
    hidden_share: float = 0.1
    bf16: bool = True
    routing_lr_scale: float = 1.0
    dense_fade: float = 0.0
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dense_fade", "average", "hidden_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1)")

    def learns_hidden_states(self, step: int, kind: Kind) -> bool:
        """Whether a step's loss has the hidden states."""
        return kind in ("embedding", "classifier", "image") or step < self.hidden_share * self.steps

    def dense_share(self, step: int) -> float:
        """How much of the dense layers is left in a step."""
        return 0.0 if self.dense_fade == 0 else max(0.0, 1 - step / (self.dense_fade * self.steps))


def distil(
    student: Any,
    teacher: Any,
    examples: Examples,
    recipe: Recipe,
    *,
    kind: Kind,
    progress: Progress = silent,
    start: int = 0,
    state: dict[str, Any] | None = None,
    checkpoint: Callable[[int, dict[str, Any]], None] = lambda *_: None,
    checkpoint_every: int = 200,
    batches: Iterator[np.ndarray[Any, Any]] | None = None,
    recorded: bool = True,
) -> None:
    """Train the whole student but its embeddings to give what the teacher gives, on unlabelled examples.

    start, state and checkpoint serve resuming: state holds what `checkpoint(step, state)` was given. batches: indices
    of the examples of every step, if not in the order of the recipe's seed. recorded: whether a GPU records a decoder's
    step as a CUDA graph, where it can."""
    new, others, routers = parameter_groups(student)
    groups = [{"params": new, "lr": recipe.lr}, {"params": others, "lr": recipe.lr_others}]
    groups += [{"params": routers, "lr": recipe.lr_routers}] if routers else []
    fused = student.device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, recipe.beta2), fused=fused)
    trained = nn.ParameterList([*new, *others, *routers])
    average = averaged(trained, recipe.average) if recipe.average else None
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        if average is not None:
            average.load_state_dict(earlier.average_state(state["average"]))
    schedule = cosine(optimiser, recipe.steps, done=start)
    drawn = batches or islice(examples.shuffled(recipe.batch, recipe.seed), start, None)
    learn_without_dropout(student)
    teacher.eval()
    record = recording(teacher, examples, recipe, kind) if recorded else None
    backward = Backward(student, teacher, examples, recipe, kind, record)
    routing = RoutingRows(student)
    with _fast_products(student.device.type == "cuda"):
        for step in range(start, recipe.steps):
            backward.fade.share = recipe.dense_share(step)
            optimiser.zero_grad(set_to_none=True)
            backward(next(drawn), hidden_states=recipe.learns_hidden_states(step, kind))
            nn.utils.clip_grad_norm_(trained, CLIP)
            if recipe.routing_lr_scale != 1.0:
                routing.remember()
            optimiser.step()
            if recipe.routing_lr_scale != 1.0:
                routing.shorten(recipe.routing_lr_scale)
            schedule.step()
            if average is not None:
                average.update_parameters(trained)
            progress("distil", step + 1, recipe.steps)
            if (step + 1) % checkpoint_every == 0 and step + 1 < recipe.steps:
                means = None if average is None else average.state_dict()
                checkpoint(step + 1, {"optimiser": optimiser.state_dict(), "average": means})
    if average is not None:
        keep(average, trained)
    student.eval()


class Backward:
    """Gradients of a step's loss, piece by piece.

    record: of a decoder's blocks, all of one length, makes a CUDA graph, since a step is thousands of small kernels;
    anew when the loss changes."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        examples: Examples,
        recipe: Recipe,
        kind: Kind,
        record: Record | None = None,
    ) -> None:
        self.fade = DenseFade(student, teacher)
        self._student, self._teacher, self._examples = student, teacher, examples
        self._recipe, self._kind, self._record = recipe, kind, record
        self._vocabulary = getattr(student.config, "vocab_size", 0)  # an image model has none
        self._hidden_states = False
        self._recorded: RecordedStep | None = None
        self._rows = 0  # of what is recorded
        self._whole = all_of_one_length(examples)

    def __call__(self, which: np.ndarray[Any, Any], *, hidden_states: bool) -> None:
        """Add to the gradients of the student's parameters."""
        if hidden_states is not self._hidden_states:
            self._hidden_states, self._recorded = hidden_states, None
        device = self._student.device
        cut = pieces(self._examples, which, self._kind, self._vocabulary, logits_at_once(device))
        for piece in cut:
            share = torch.tensor(len(piece) / len(which))
            inputs, share = self._examples.batch(piece, device), share.to(device, non_blocking=True)
            if self._record is None or len(cut) > 1:
                self._run(inputs, share)
            else:
                self._replay(inputs, share, self._record)

    def _replay(self, inputs: Batch, share: Tensor, record: Record) -> None:
        """`_run` of a whole step, recorded if it can be."""
        rows = len(inputs["input_ids"])
        if self._recorded is None or rows != self._rows:
            self._recorded = None  # gives its memory back before other work needs as much
            self._recorded, self._rows = RecordedStep(self._run, self._student.parameters(), rows, record), rows
        try:
            self._recorded(inputs, share)
        except RuntimeError as error:  # a model whose work cannot be recorded, or too little memory for it
            self._record = self._recorded = None
            warnings.warn(f"steps are not recorded as a CUDA graph: {error!s:.200}", stacklevel=2)
            self._student.zero_grad(set_to_none=True)
            self._run(inputs, share)

    def _run(self, inputs: Batch, share: Tensor | None) -> Tensor:
        bf16 = self._recipe.bf16 and self._student.device.type == "cuda"
        with self.fade, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = distillation_loss(
                self._student,
                self._teacher,
                inputs,
                self._kind,
                hidden_states=self._hidden_states,
                padded=not self._whole,
            )
        loss = loss if share is None else loss * share
        loss.backward()
        return loss.detach()


def recording(teacher: Any, examples: Examples, recipe: Recipe, kind: Kind) -> Record | None:
    """What records the steps of a distillation; None without a GPU or where no step is like another."""
    same = kind == "causal" and all_of_one_length(examples) and recipe.dense_fade == 0
    known = teacher.device.type == "cuda" and getattr(teacher, "_can_compile_fullgraph", False)
    return on_gpu if same and known else None


def all_of_one_length(examples: Examples) -> bool:
    """Whether no batch of them is padded."""
    lengths = examples.lengths
    return len(lengths) > 0 and bool((lengths == lengths[0]).all())


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of a module's parameters, which begins with what they are; its decay rises to `decay`, so
    that the first steps fade soon."""

    def mean(value: Tensor, parameter: Tensor, count: Tensor | int) -> Tensor:
        keep = min(decay, float(count / (10 + count)))
        return torch.lerp(value, parameter, 1 - keep)

    average = AveragedModel(module, avg_fn=mean)
    average.update_parameters(module)
    return average


@torch.no_grad()
def keep(average: AveragedModel, trained: nn.ParameterList) -> None:
    """Make the parameters what their average is."""
    for parameter, mean in zip(trained, average.parameters(), strict=True):
        parameter.copy_(mean)


class DenseFade:
    """Within the context, each replaced layer gives `share` of what the teacher's dense layer gives for the same
    input, and the rest of its own; with share 0 nothing is changed or computed."""

    def __init__(self, student: Any, teacher: Any) -> None:
        family = family_of(student.config.model_type)
        pairs = zip(family.blocks_of(student), family.blocks_of(teacher), strict=True)
        self.share = 0.0
        self._layers = [
            (slot, family.dense_of(dense))
            for block, dense in pairs
            if isinstance(slot := family.slot_of(block), ConvertedFeedforward)
        ]
        for _, dense in self._layers:
            dense.requires_grad_(False)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        if self.share > 0:
            for slot, dense in self._layers:
                self._hooks.append(slot.register_forward_hook(self._mixer(dense)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _mixer(self, dense: nn.Module) -> Any:
        def mix(_slot: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
            mixed: Tensor = torch.lerp(y, dense(arguments[0]), self.share)
            return mixed

        return mix


def logits_at_once(device: torch.device) -> int:
    """Values over the vocabulary that a piece of a step may have."""
    if device.type != "cuda":
        return LOGITS
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(LOGITS // 4, min(MOST_LOGITS, memory // 4 // LOGITS_BYTES))


def pieces(
    examples: Examples, which: np.ndarray[Any, Any], kind: Kind, vocabulary: int, most: int
) -> list[np.ndarray[Any, Any]]:
    """A step's examples, cut so that no piece has more than `most` values over the vocabulary."""
    if kind not in ("causal", "masked"):
        return [which]
    longest = int((examples.offsets[which + 1] - examples.offsets[which]).max())
    count = -(-len(which) * longest * vocabulary // most)
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


def parameter_groups(student: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the new layers, of everything else, and of the new layers' routers; embeddings are frozen."""
    converted = [m for m in student.modules() if isinstance(m, ConvertedFeedforward)]
    inside = {id(p) for m in converted for p in m.parameters()}
    routing = {id(p) for m in converted for r in m.modules() if isinstance(r, Router) for p in r.parameters()}
    frozen = {id(p) for m in student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    trained = [p for p in student.parameters() if p.requires_grad]
    new = [p for p in trained if id(p) in inside - routing]
    return new, [p for p in trained if id(p) not in inside], [p for p in trained if id(p) in routing]


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
