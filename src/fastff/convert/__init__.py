"""Make an existing dense model conditional: capture, initialise, distil, report.

`convert(settings)` does all of it; the parts are usable alone.
"""

from fastff.convert.pipeline import convert
from fastff.convert.settings import Settings

__all__ = ["Settings", "convert"]
