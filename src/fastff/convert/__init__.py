"""Make an existing dense model conditional: capture, initialise, distil, report.

`convert(settings)` does all of it; the parts are usable alone.
"""

import warnings
from typing import Any

from fastff.convert.conversion import convert
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.earlier import renamed

__all__ = ["ConversionSettings", "convert"]


def Settings(**options: Any) -> ConversionSettings:  # noqa: N802  the name that stood for the class
    """ConversionSettings under the names of the version before; it goes with the next version."""
    warnings.warn("Settings is now ConversionSettings, with some fields renamed", DeprecationWarning, stacklevel=2)
    return ConversionSettings(**renamed(options))
