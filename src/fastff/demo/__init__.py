"""`fastff demo`: a few minutes on a CPU that show what the layer is worth, baselines included, and write a report."""

from fastff.demo.settings import Settings

__all__ = ["Settings"]
