"""The command line: `fastff`."""

from fastff.cli.commands import app, main

__all__ = ["app", "main"]
