"""Make an existing dense model conditional: capture, initialise, distil, report.

`convert(settings)` does all of it; the parts are usable alone.
"""

from fastff.convert.pipeline import Settings, convert

__all__ = ["Settings", "convert"]
