"""The reference of all commands as a Markdown page, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from fastff.cli.commands import app
from fastff.report.markdown import markdown_table


def command_reference() -> str:
    """One section a command: what it does, its arguments and its options with their defaults."""
    return "\n\n".join(["# Command line", "`fastff COMMAND --help` prints the same.", *_sections()]) + "\n"


def _sections() -> Iterator[str]:
    group = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        yield f"## fastff {name}"
        yield str(command.help or "").strip()
        rows = []
        for parameter in command.params:
            words = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
            default = parameter.default
            shown = "" if default is None or callable(default) else f"`{default}`"
            rows.append((f"`{words}`", getattr(parameter, "help", "") or "", shown))
        yield markdown_table(["option", "meaning", "default"], rows)
