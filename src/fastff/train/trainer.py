"""Transformers' Trainer, told which rows come next, when to stop, how to save, and to say how the trees are doing."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from fastff.conditional import ConditionalFeedforward
from fastff.errors import TrainingError
from fastff.inspect import conditional_layers
from fastff.io import read_json, write_json
from fastff.report.progress import Progress, silent
from fastff.text.batches import Batch, Batches
from fastff.train import saving
from fastff.train.interrupt import Stop
from fastff.train.layer_training import LayerTraining, RoutingLrScale, RoutingStats, balance
from fastff.train.recorded import RecordedStep, on_gpu
from fastff.train.schedule import Budget, rows_at, triangle

_POSITION = "position.json"
_CACHED = 2  # times what was ever needed at once, that a GPU's memory may be kept for later


@dataclass
class Plan:
    """How a run goes. micro_batches: of a step, over all processes; micro_batch: rows of each at the end of the ramp.

    max_run_seconds: end this process after so long, with a checkpoint, so that the next one goes on.
    graph: record forward and backward of full micro-batches as a CUDA graph.
    """

    budget: Budget
    out: Path
    micro_batches: int
    micro_batch: int
    lr: float
    warmup: float
    ramp: float
    weight_decay: float
    save_every: int
    keep: int
    layer: LayerTraining
    max_run_seconds: float | None = None
    stop: Stop = field(default_factory=Stop)
    progress: Progress = silent
    graph: bool = False


class Source:
    """This process's micro-batches, step after step; `position` rows have been drawn by all processes together."""

    def __init__(self, batches: Batches, plan: Plan, rank: int, processes: int) -> None:
        self.batches, self.plan, self.rank, self.processes = batches, plan, rank, processes
        self.step = self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            plan, position = self.plan, self.position
            rows = rows_at(plan.budget.progress(self.step), plan.micro_batch, plan.ramp)
            # Drawn lazily, so when a step is over the position is that of the next one.
            self.step, self.position = self.step + 1, position + rows * plan.micro_batches
            for index in range(self.rank, plan.micro_batches, self.processes):
                yield self.batches.micro_batch(position + index * rows, rows)


class PretrainTrainer(Trainer):
    """Trains on the rows of a `Source` by a `Plan`.

    evaluate() gives the mean loss (nats a predicted token) on fixed windows with fixed masks. Raises TrainingError when
    the loss is not finite, naming the step and the last good checkpoint, and when a checkpoint cannot be saved.
    """

    def __init__(
        self, model: Any, args: TrainingArguments, plan: Plan, source: Source, held_out: list[Batch], tokenizer: Any
    ) -> None:
        self.plan, self.source, self.held_out, self.tokenizer = plan, source, held_out, tokenizer
        self.routing_stats = RoutingStats(model)
        self.last_routing: dict[str, dict[str, float]] = {}
        self._recording: RecordedStep | None = None
        super().__init__(model=model, args=args, train_dataset=[{}], eval_dataset=[{}], callbacks=[TrainCallback(self)])
        self.remove_callback(PrinterCallback)
        # Step of the first loss that is not finite, 0 while there is none; on the device, since reading it waits.
        self.broken = torch.zeros((), dtype=torch.int64, device=args.device)

    def get_train_dataloader(self) -> Any:
        return self.source if self.args.device.type == "cpu" else (self._sent(batch) for batch in self.source)

    def _sent(self, batch: Batch) -> Batch:
        """The batch on the device, copied while the device works on."""
        return {name: part.pin_memory().to(self.args.device, non_blocking=True) for name, part in batch.items()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = model or self.model
            plan = self.plan
            groups = parameter_groups(
                trained, plan.lr, plan.layer.lr_scale, plan.weight_decay, plan.layer.routing_lr_scale
            )
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), eps=1e-12, fused=fused)
            if plan.layer.scales_routing:
                progress = lambda: plan.budget.progress(self.state.global_step)  # noqa: E731
                RoutingLrScale(trained, plan.layer, progress).watch(self.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            plan = self.plan
            optimised: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimised, lambda step: triangle(plan.budget.progress(step), plan.warmup)
            )
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        loss = self._recorded(model)(inputs, num_items_in_batch)
        first = (self.broken == 0) & ~loss.isfinite()
        self.broken += first * (self.state.global_step + 1)
        return loss

    def _recorded(self, model: nn.Module) -> Callable[[Batch, Any], Tensor]:
        """Forward and backward of a micro-batch."""
        step = functools.partial(super().training_step, model)
        if not self.plan.graph:
            return step
        if self._recording is None:
            self._recording = RecordedStep(step, model.parameters(), self.plan.micro_batch, on_gpu)
        return self._recording

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model: Any = self.model
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        pieces, processes = self.held_out, self.args.world_size
        for index in range(self.args.process_index, -(-len(pieces) // processes) * processes, processes):
            # As many passes in each process: sharded weights are gathered by all together.
            inputs = self._prepare_inputs(pieces[index % len(pieces)])
            labels = inputs["labels"][:, 1:] if self.source.batches.causal else inputs["labels"]
            count = int((labels != -100).sum()) if index < len(pieces) else 0
            with self.accelerator.autocast():  # also where nothing is left to train and the model was not prepared
                loss = model(**inputs).loss
            sums += torch.tensor([float(loss) * count, count], dtype=torch.float64, device=sums.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        metrics = {"eval_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.last_routing = self.routing_stats.report()
            for name, stats in self.last_routing.items():
                logs.update({f"{name}/{key}": value for key, value in stats.items() if value is not None})
            logs |= {"rows": self.source.position, "seconds": round(self.plan.budget.used, 3)}
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.plan.out / saving.PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def write(folder: Path) -> None:
            super(PretrainTrainer, self)._save_checkpoint(model, trial)
            if self.args.should_save:
                self.tokenizer.save_pretrained(folder)
                budget = self.plan.budget
                position = {"rows": self.source.position, "seconds": budget.used, "routing": self.last_routing}
                write_json(folder / _POSITION, position)

        saving.save(
            self.plan.out,
            self.state.global_step,
            write,
            keep=self.plan.keep,
            leader=self.args.should_save,
            meet=self.accelerator.wait_for_everyone,
        )

    def resume(self, folder: Path) -> None:
        """Train on from a checkpoint until the budget is spent."""
        position = read_json(folder / _POSITION, needs={"rows": int, "seconds": float})
        self.source.step = int(folder.name.rpartition("-")[2])
        self.source.position = position["rows"]
        self.plan.budget.used = position["seconds"]
        self.last_routing = position.get("routing", {})
        if self.plan.budget.spent(self.source.step):  # killed after the last step, before the record was written
            self._load_from_checkpoint(str(folder))
            self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        else:
            self.train(resume_from_checkpoint=str(folder))


class TrainCallback(TrainerCallback):
    """Decides after every step, for all processes alike, whether to stop and whether to save."""

    def __init__(self, trainer: PretrainTrainer) -> None:
        self.trainer = trainer
        self.started = time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.plan.budget.clock = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, plan = self.trainer, self.trainer.plan
        plan.budget.tick()
        over = plan.max_run_seconds is not None and time.monotonic() - self.started >= plan.max_run_seconds
        plan.budget.used, stop = agreed([plan.budget.used, plan.stop.asked or over], args.device)
        if plan.layer.balance:
            balance(trainer.routing_stats.layers, trainer.routing_stats.collect(), plan.layer.balance)
        if stop or plan.budget.spent(state.global_step):
            control.should_training_stop = control.should_save = True
        if plan.budget.progress(state.global_step) < plan.ramp:
            release_unused(args.device)
        if state.global_step % plan.save_every == 0:
            control.should_save = True
        if control.should_save:  # so that the means that are logged begin anew where a resumed run begins
            control.should_log = True
        if control.should_log:  # not after every step: a GPU would wait for the answer
            self._check_finite(args.device)

    def _check_finite(self, device: torch.device) -> None:
        trainer = self.trainer
        [step] = agreed([int(trainer.broken)], device)
        if step:
            good = saving.last_checkpoint(trainer.plan.out)
            raise TrainingError(
                f"the loss is not finite in step {int(step)}; the last good checkpoint is {good or 'none'}. "
                "A lower lr, or a longer warmup, usually helps"
            )

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            done = self.trainer.plan.budget.progress(state.global_step)
            self.trainer.plan.progress("training", done, 1.0, f"step {state.global_step}, loss {logs['loss']:.3f}")


def release_unused(device: torch.device) -> None:
    """Give a GPU's cached memory back once there is more than _CACHED times what was ever needed of it.

    A freed block serves tensors of at most its size, so a batch that grows by a row a step leaves the logits of every
    size behind."""
    if device.type == "cuda" and torch.cuda.memory_reserved(device) > _CACHED * torch.cuda.max_memory_allocated(device):
        torch.cuda.empty_cache()


def agreed(values: list[float], device: torch.device) -> list[float]:
    """The greatest of each value over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return [float(value) for value in values]
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def parameter_groups(
    model: nn.Module, lr: float, layer_lr_scale: float, weight_decay: float, routing_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters by learning rate and by decay (matrices only): `layer_lr_scale` times `lr` in conditional layers, and
    `routing_lr_scale` times that in their routers."""
    kinds: dict[int, int] = {}  # of a parameter: 1 in a conditional layer, 2 in its router, 0 elsewhere
    for layer in conditional_layers(model).values():
        kinds |= {id(parameter): 1 for parameter in layer.parameters()}
        if isinstance(layer, ConditionalFeedforward):
            kinds |= {id(parameter): 2 for parameter in layer.router.parameters()}
    scales = (1.0, layer_lr_scale, layer_lr_scale * routing_lr_scale)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and not name.endswith((".b_in", ".b_out"))
        groups.setdefault((kinds.get(id(parameter), 0), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * scales[kind], "weight_decay": weight_decay if decays else 0.0}
        for (kind, decays), parameters in groups.items()
    ]
