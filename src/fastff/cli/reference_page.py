"""The reference of all commands as a Markdown page, made from the commands themselves."""

from __future__ import annotations

from fastff.cli.app import app


def command_reference() -> str:
    """One section a command: what it does, its arguments and its options with their defaults."""
    generated = app.generate_docs(output_format="markdown", heading_level=1, recursive=True)
    _, _, sections = generated.partition("\n## ")
    opening = "After this page you can call every command. `fastff COMMAND --help` prints the same."
    return f"# Command line\n\n{opening}\n\n## {sections}"
