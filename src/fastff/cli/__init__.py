"""The command line: `fastff`."""

from fastff.cli.app import app, main, run

__all__ = ["app", "main", "run"]
