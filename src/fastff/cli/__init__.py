"""The command line: `fastff`."""

from fastff.cli.main import app, main

__all__ = ["app", "main"]
