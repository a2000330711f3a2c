"""The `fastff` command and its subcommands, whose modules are imported when they are asked for.

Options are the fields of a settings class, read by cyclopts: name, type, default and help stand once, beside the field.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from cyclopts import App, CycloptsError, Parameter

from fastff.cli.console import console
from fastff.cli.renamed import current_names
from fastff.errors import FastffError

# Name, module and function, summary; the summary stands here so that `fastff --help` need not import the functions.
COMMANDS = (
    ("bench", "bench_command:bench", "Time conditional layers beside the fastest dense layers of this machine."),
    ("convert", "convert_command:convert", "Make a trained dense model conditional, and report what that changes."),
    ("demo", "demo_command:demo", "Show what works here: search, text, a layer's speed and routes, with dense twins."),
    ("explore", "explore_command:explore", "Write a page that shows which leaves every token of a text takes."),
    ("export", "export_command:export", "Write a model for inference without PyTorch."),
    ("generate", "generate_command:generate", "Stream text from an exported model, and say how fast it came."),
    ("glue", "train_commands:glue", "Fine-tune a model on GLUE and score it: median and spread over seeds."),
    ("pretrain", "train_commands:pretrain", "Pretrain a language model on your text."),
    ("serve", "serve_command:serve", "Serve a model over HTTP to OpenAI's clients."),
    ("variants", "train_commands:variants", "List the feedforward layers of a preset and what a token costs in each."),
)

STUDIES = (
    ("pretrain", "Pretrain the variants of a plan and compare them in a table and charts."),
    ("glue", "Fine-tune pretrained variants on GLUE and say how much of the dense scores each keeps."),
    ("redraw", "Make the tables and charts of records.json or glue.json again, without running anything."),
    ("gpu-speed", "Measure tokens a second of pretraining on one GPU and on several."),
    ("frontier", "Put held-out losses of studies beside the measured speed of their models."),
    ("warm-start", "Turn the feedforwards of a pretrained dense model into trees, or narrow layers."),
    ("pack-tokens", "Pack tokenised text into a file, for a machine without the text."),
    ("unpack-tokens", "Unpack tokenised text as train, and its held-out part as valid."),
)


def _version() -> str:
    try:
        return version("fastff")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


app = App(
    name="fastff",
    help="Conditional feedforward layers.",
    version=_version,
    console=console,
    default_parameter=Parameter(negative=(), consume_multiple=False),
)
for _name, _function, _summary in COMMANDS:
    app.command(f"fastff.cli.{_function}", name=_name, help=_summary)
studies = App(name="experiment", help="Studies of several variants of a model.")
for _name, _summary in STUDIES:
    studies.command(f"fastff.cli.experiment_commands:{_name.replace('-', '_')}", name=_name, help=_summary)
app.command(studies)


def run(words: Sequence[str]) -> int:
    """Run a command line; returns its exit code: 0, 1 for what the user can put right, 2 for unknown words."""
    try:
        code = app(
            current_names(words, warn=lambda line: console.print(line, style="yellow", markup=False)),
            result_action="return_value",
            exit_on_error=False,
            print_error=False,
        )
    except CycloptsError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except (FastffError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `fastff` command."""
    sys.exit(run(sys.argv[1:]))
