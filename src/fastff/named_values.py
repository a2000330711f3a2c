"""NAME=VALUE, as options that have many names are given."""

from __future__ import annotations

from collections.abc import Collection


def named_value(
    text: str, names: Collection[str] | None = None, *, flags: Collection[str] = (), form: str = "NAME=VALUE"
) -> tuple[str, str]:
    """Name and value of `text`; hyphens in the name are underscores. names: those that there are, None if another
    program knows them; flags: those of them that need no value; form: how the text should look.

    Raises ValueError for a name that is not of `names`, or has no value."""
    name, _, value = text.partition("=")
    name = name.replace("-", "_")
    if names is not None and (name not in names or not (value or name in flags)):
        raise ValueError(f"{text!r} is not {form} with a {form.partition('=')[0].lower()} of {', '.join(names)}")
    return name, value
