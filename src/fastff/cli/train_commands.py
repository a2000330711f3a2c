"""`fastff pretrain`, `fastff glue` and `fastff variants`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from fastff.cli.console import console
from fastff.report.progress import is_first_process, shown
from fastff.train.glue_settings import GlueSettings
from fastff.train.pretrain_settings import PretrainSettings


def pretrain(settings: PretrainSettings, *, layer_option: tuple[str, ...] = ()) -> int:
    """Pretrain a language model on your text.

    Ctrl-C leaves a checkpoint. Run the same command again to resume.

    Parameters
    ----------
    layer_option
        NAME=VALUE, how conditional layers are trained: lr_scale, level_lr_scale, freeze_after, balance,
        output_scale, routing_scale, routing_lr_scale or feedforward_init. May be repeated.
    """
    from accelerate import PartialState

    from fastff.train.layer_training import layer_training
    from fastff.train.pretrain import pretrain as run

    with shown(console, "pretrain") as progress:
        record = run(replace(settings, layer=layer_training(list(layer_option))), progress=progress)
    PartialState().destroy_process_group()  # of torchrun; NCCL warns of a group that is left
    if is_first_process():
        _say_pretrained(record, settings)
    return 128 + int(record["stopped_by"]) if record["stopped_by"] else 0


def _say_pretrained(record: dict[str, Any], settings: PretrainSettings) -> None:
    cost = record["cost"]
    neurons = f"{cost['active_neurons']} of {cost['neurons']} neurons"
    console.print(f"{cost['layer']}: {neurons}, {cost['flops']} FLOP a token and layer")
    done = "finished" if record["finished"] else "stopped; run the same command again to resume"
    loss = f"held-out loss {record['valid_loss']:.4f} after {record['steps']} steps and {record['tokens']} tokens"
    console.print(f"{done}: {loss}, {record['seconds']} s; {settings.out}", markup=False)


def glue(settings: GlueSettings) -> int:
    """Fine-tune a model on GLUE and score it: median and spread over seeds.

    A second run adds what is missing.
    """
    from fastff.train.glue import glue as run

    with shown(console, "glue") as progress:
        summary = run(settings, progress=progress)
    table = Table("task", "metrics", "median", "least - greatest", "note")
    for name, found in summary["tasks"].items():
        score = ["undefined"] * 2
        if found["median"] is not None:
            score = [f"{found['median']:.2f}", f"{found['least']:.2f} - {found['greatest']:.2f}"]
        table.add_row(name, ", ".join(found["metrics"]), *score, found["note"])
    console.print(table)
    if not summary["comparable_with_published"]:
        console.print("not comparable with published GLUE scores: see the notes")
    return 0


def variants(preset: str = "base") -> int:
    """List the feedforward layers of a preset and what a token costs in each.

    Parameters
    ----------
    preset
        tiny, mini, small or base.
    """
    from fastff.train.presets import NARROW, VARIANTS, costs, preset_of

    conditional = [name for name, variant in VARIANTS.items() if variant.options and not variant.per_hidden]
    found = costs(preset_of(preset), (*VARIANTS, *(f"{NARROW}{name}" for name in conditional)))
    dense = next(cost for cost in found if cost.name == "dense-gelu")
    table = Table("name", "layer", "active / stored neurons", "FLOP a token", "of dense", "whole model, of dense")
    for c in found:
        shares = f"{c.flops / dense.flops:.2%}", f"{c.model_flops / dense.model_flops:.1%}"
        table.add_row(c.name, c.layer, f"{c.active_neurons} / {c.neurons}", f"{c.flops:,}", *shares)
    console.print(table)
    return 0
