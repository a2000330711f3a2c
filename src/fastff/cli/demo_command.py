"""`fastff demo`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.demo import DemoSettings


def demo(settings: DemoSettings | None = None) -> int:
    """Search novels, generate text and time a layer, beside dense twins; show routes; write a page."""
    from fastff.demo.demo_page import run_demo

    return run_demo(settings or DemoSettings(), console)
