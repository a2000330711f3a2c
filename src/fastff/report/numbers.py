"""Numbers as text."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """Three digits, and no exponent: 0.123, 1.23, 12.3, 123, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times_faster(ratio: float) -> str:
    """A ratio of speeds: 0.8x, 2.3x, 41x, 1,615x."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x"
