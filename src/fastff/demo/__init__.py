"""`fastff demo`: a few minutes on a CPU that show what works, beside its dense twin, on one page."""

from fastff.demo.demo_settings import DemoSettings

__all__ = ["DemoSettings"]
