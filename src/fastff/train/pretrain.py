"""Pretraining from text to a model directory: what is asked for, what is made, and the record of it."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from fastff.errors import FileError, TrainingError
from fastff.io import alone_in, read_json, replacing_folder, write_json
from fastff.machine import machine
from fastff.models import UltraFastBertForCausalLM, UltraFastBertForMaskedLM
from fastff.report.progress import Progress, silent
from fastff.text import tokenizer as tokenizers
from fastff.text import tokens
from fastff.text.batches import Batch, Batches
from fastff.train import saving
from fastff.train.interrupt import Stop
from fastff.train.layer_training import scale_start
from fastff.train.presets import Preset, configuration, cost_of, feedforward_of
from fastff.train.pretrain_settings import PretrainSettings, upgraded
from fastff.train.schedule import Budget
from fastff.train.trainer import Plan, PretrainTrainer, Source

RESULT = "result.json"
MODEL = "model"
_HELD_OUT_SEED = 12345
MOST_SECONDS_OF_TOKENS = 24 * 60 * 60  # that other processes wait for the first one's: a large text takes hours
_LOGITS = 2**25  # of one pass over held-out windows: they are computed for every position


def pretrain(settings: PretrainSettings, *, progress: Progress = silent) -> dict[str, Any]:
    """Train until the budget is spent; returns the record that `out`/result.json holds.

    A run that was stopped, by Ctrl-C, SIGTERM, max_run_seconds or a kill, goes on from its last checkpoint; its record
    has "finished": False until the budget is spent, and in "stopped_by" the number of the signal, if one came. The
    model is in `out`/model. Under torchrun, all processes call it. Raises TrainingError (text, settings, a loss that is
    not finite, a full disk), ShapeError, ValueError.
    """
    arguments = _arguments(settings)
    state = arguments.distributed_state
    tokenizer, text, valid = prepare(settings, state, progress)
    with state.main_process_first():
        identity = settings.identity(tokenizer, text.meta.get("sha256"))
        saving.claim_run(settings.out, identity, lambda kept: upgraded(kept, identity))
    done = settings.out / RESULT
    if done.is_file() and (record := read_json(done, needs={"finished": bool}))["finished"]:
        return dict(record)
    trainer = build(settings, tokenizer, text, valid, arguments)
    trainer.plan.progress = progress
    watching = trainer.plan.stop.watching() if _may_watch() else nullcontext()
    alone = alone_in(settings.out, "trains in") if state.is_main_process else nullcontext()
    with alone, quietly(), watching, trainer.plan.stop.deferred():
        _run(trainer)
        if not math.isfinite(trainer.evaluate()["eval_loss"]):
            raise TrainingError("the held-out loss is not finite: remove the last checkpoint and train with a lower lr")
        record = _record(settings, trainer, text)
        if record["finished"]:
            _write_model(settings.out, trainer)
    if state.is_main_process:
        write_json(done, record)
    state.wait_for_everyone()
    return record


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bar that Transformers shows for every file, its report of a head that starts anew, and the warning of
    an argument that Accelerate still passes to torch."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(before)


def _may_watch() -> bool:
    return threading.current_thread() is threading.main_thread()


def prepare(
    settings: PretrainSettings, state: PartialState, progress: Progress
) -> tuple[Any, tokens.Tokens, tokens.Tokens | None]:
    """Tokenizer and tokens; the first process makes them, the others open them. Raises TrainingError."""
    failed = ""
    if state.is_main_process:
        try:
            read_text(settings, progress)
        except TrainingError as error:
            if state.num_processes == 1:
                raise
            failed = str(error)
    if state.num_processes > 1:
        shared = [failed]
        torch.distributed.broadcast_object_list(shared)
        if shared[0]:
            raise TrainingError(shared[0])
    return read_text(settings)


def read_text(
    settings: PretrainSettings, progress: Progress = silent
) -> tuple[Any, tokens.Tokens, tokens.Tokens | None]:
    """Tokenizer, tokens and held-out tokens of a run, made or, if they are there, opened. Raises TrainingError."""
    preset, folder = settings.model, settings.data or settings.out / "data"
    if settings.tokenizer is None:
        progress("tokenizer", 0)
        tokenizer = tokenizers.make_tokenizer(
            settings.text,
            folder / "tokenizer",
            vocab_size=preset.vocab_size,
            exact=settings.vocab_size is not None,
            seq_len=preset.seq_len,
            column=settings.column,
            most=preset.tokenizer_characters,
        )
    else:
        tokenizer = tokenizers.load_tokenizer(settings.tokenizer)
    tokenizer.model_max_length = preset.seq_len  # of this model: shared data keep that of the run that made them
    options: dict[str, Any] = {
        "seq_len": preset.seq_len,
        "closed": settings.objective == "masked",
        "column": settings.column,
        "progress": progress,
    }
    text = tokens.prepare_tokens(settings.text, tokenizer, folder / "train", most=settings.max_tokens, **options)
    if not settings.valid:
        return tokenizer, text, None
    return tokenizer, text, tokens.prepare_tokens(settings.valid, tokenizer, folder / "valid", **options)


def build(
    settings: PretrainSettings,
    tokenizer: Any,
    text: tokens.Tokens,
    valid: tokens.Tokens | None,
    arguments: TrainingArguments,
) -> PretrainTrainer:
    """Model, batches and trainer. Raises TrainingError for sizes that do not fit together."""
    preset, causal = settings.model, settings.objective == "causal"
    processes = arguments.world_size
    micro_batches = _micro_batches(preset, processes)
    arguments.gradient_accumulation_steps = micro_batches // processes
    set_seed(settings.seed)
    config = configuration(
        preset,
        feedforward_of(settings.feedforward, preset.hidden),
        vocab_size=text.vocabulary.size,
        pad=text.vocabulary.pad,
        causal=causal,
    )
    config.feedforward_init = settings.layer.feedforward_init
    model = (UltraFastBertForCausalLM if causal else UltraFastBertForMaskedLM)(config)
    scale_start(model, settings.layer)
    if settings.init_from is not None:
        saving.take_over(model, settings.init_from)
    last = len(text) if valid else len(text) - min(settings.valid_windows, max(1, len(text) // 20))
    batches = Batches(text, 0, last, seed=settings.seed, causal=causal)
    plan = Plan(
        budget=Budget(None if settings.seconds else preset.steps, settings.seconds),
        out=settings.out,
        micro_batches=micro_batches,
        micro_batch=preset.micro_batch,
        lr=preset.lr,
        warmup=settings.warmup,
        ramp=settings.ramp,
        weight_decay=0.01,
        save_every=settings.save_every,
        keep=settings.keep,
        layer=settings.layer,
        max_run_seconds=settings.max_run_seconds,
        stop=Stop(),
        graph=settings.graph,
    )
    source = Source(batches, plan, arguments.process_index, processes)
    held_out = _held_out(settings, batches, valid)
    return PretrainTrainer(model, arguments, plan, source, held_out, tokenizer)


def _micro_batches(preset: Preset, processes: int) -> int:
    if preset.batch % preset.micro_batch:
        raise TrainingError(f"batch {preset.batch} is not a multiple of micro_batch {preset.micro_batch}")
    count = preset.batch // preset.micro_batch
    if count % processes:
        raise TrainingError(
            f"batch {preset.batch} has {count} micro-batches of {preset.micro_batch}, "
            f"which {processes} processes cannot share"
        )
    return count


def _held_out(settings: PretrainSettings, batches: Batches, valid: tokens.Tokens | None) -> list[Batch]:
    """Fixed windows with fixed masks, in pieces whose logits fit."""
    tokens_, first = (valid, 0) if valid else (batches.tokens, batches.last)
    total = len(tokens_) - first
    count = min(settings.valid_windows, total)
    numbers = [first + index * total // count for index in range(count)]
    rows = max(1, _LOGITS // (tokens_.seq_len * tokens_.vocabulary.size))
    found = []
    for begin in range(0, count, rows):
        windows = tokens_.windows(numbers[begin : begin + rows])
        if batches.causal:
            inputs, labels = windows, windows.clone()
        else:
            inputs, labels = batches.masked(windows, _HELD_OUT_SEED + begin)
        found.append({"input_ids": inputs, "labels": labels})
    return found


def _arguments(settings: PretrainSettings) -> TrainingArguments:
    cpu = settings.cpu or not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun says
    if settings.fsdp and (cpu or not several):
        raise TrainingError("fsdp needs several processes with a GPU each: run it under torchrun")
    if settings.graph and (cpu or "LOCAL_RANK" in os.environ):
        raise TrainingError(f"graph needs a GPU and no torchrun, this is {'the CPU' if cpu else 'under torchrun'}")
    return TrainingArguments(
        output_dir=str(settings.out),
        max_steps=10**9 if settings.seconds else settings.model.steps,
        max_grad_norm=0.5,
        bf16=settings.precision == "bf16",
        torch_compile=settings.compiled,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        save_strategy="no",
        ignore_data_skip=True,
        report_to="tensorboard" if settings.tensorboard else "none",
        disable_tqdm=True,
        seed=settings.seed,
        use_cpu=cpu,
        fsdp="full_shard" if settings.fsdp else None,
        fsdp_config={"transformer_layer_cls_to_wrap": ["Layer"], "state_dict_type": "SHARDED_STATE_DICT"},
        ddp_backend="gloo" if cpu and several else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # each process counts its own leaves
        ddp_timeout=MOST_SECONDS_OF_TOKENS,
        dataloader_pin_memory=not cpu,
    )


def _run(trainer: PretrainTrainer) -> None:
    shutil.rmtree(trainer.plan.out / saving.PARTIAL, ignore_errors=True)  # of a run that was killed while saving
    last = saving.last_checkpoint(trainer.plan.out)
    if last is None:
        trainer.train()
        return
    saving.verify(last)
    try:
        trainer.resume(last)
    except (SafetensorError, OSError, EOFError, KeyError, UnpicklingError) as error:
        if trainer.state.global_step > int(last.name.rpartition("-")[2]):  # it was read, and trained on from
            raise
        raise FileError(f"{last} cannot be read: {error}; remove it to go on from the one before") from error


def _record(settings: PretrainSettings, trainer: PretrainTrainer, text: tokens.Tokens) -> dict[str, Any]:
    plan, state, preset = trainer.plan, trainer.state, settings.model
    model: Any = trainer.model
    history = state.log_history
    return {
        "finished": (finished := plan.budget.spent(state.global_step)),
        "stopped_by": None if finished else plan.stop.number,
        "settings": settings.identity(trainer.tokenizer, text.meta.get("sha256")),
        "cost": asdict(cost_of(settings.feedforward, preset)),
        "parameters": sum(layer.numel() for layer in model.parameters()),
        "text_tokens": text.meta["tokens"],
        "steps": state.global_step,
        "rows": trainer.source.position,
        "tokens": trainer.source.position * preset.seq_len,
        "seconds": round(plan.budget.used, 2),
        "tokens_per_second": tokens_per_second(history, preset.seq_len),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else None,
        "cached_gpu_bytes": torch.cuda.max_memory_reserved() if trainer.args.device.type == "cuda" else None,
        "processes": trainer.args.world_size,
        "valid_loss": next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry),
        "curve": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "valid_curve": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "routing": trainer.last_routing,
        "machine": machine("transformers"),
    }


def tokens_per_second(history: list[dict[str, Any]], seq_len: int) -> int | None:
    """Speed over the second half of the points of the loss curve, when compiling is over; None for fewer than three."""
    points = [entry for entry in history if "rows" in entry]
    points = points[len(points) // 2 :]
    if len(points) < 2 or points[-1]["seconds"] <= points[0]["seconds"]:
        return None
    rows, seconds = (float(points[-1][key] - points[0][key]) for key in ("rows", "seconds"))
    return round(rows * seq_len / seconds)


def _write_model(out: Path, trainer: PretrainTrainer) -> None:
    """`out`/model, complete or not there."""
    unwrapped = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.args.should_save:
        return
    with replacing_folder(out / MODEL) as folder:
        unwrapped.save_pretrained(folder, state_dict=weights)
        trainer.tokenizer.save_pretrained(folder)
