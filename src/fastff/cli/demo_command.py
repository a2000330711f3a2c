"""`fastff demo`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.demo import Settings


def demo(settings: Settings | None = None, *, restart: bool = False) -> int:
    """Train a small UltraFastBERT, its dense twin and baselines on bundled novels; write a report.

    Ctrl-C leaves a partial report. Run the same command again to resume.

    Parameters
    ----------
    restart
        Discard an earlier run in the same directory.
    """
    from fastff.demo.run import run_demo

    return run_demo(settings or Settings(), console, restart=restart)
