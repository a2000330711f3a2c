"""Reads C++ as far as a test of its shape needs it: which functions a file defines, and how long they are."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Comments, strings, characters and preprocessor lines: braces in them do not count.
_PASSED_OVER = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.S)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
_NO_NAME = re.compile(r"<[^<>()]*>|alignas\([^)]*\)|__attribute__\s*\(\([^;]*?\)\)")
_SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b[^()]*$")
_NAME = re.compile(r"([\w~:]+|operator\s*[^\s\w(]+)\s*\(")


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and lines of every function that C++ source defines; a lambda is a part of its function."""
    source = _DIRECTIVE.sub(_blank, _PASSED_OVER.sub(_blank, source))
    braces: list[tuple[str, int]] = []  # of those that are open: name and first line of a function, "" of a scope
    start = 0  # of the declaration that the next brace may belong to
    for mark in re.finditer(r"[{};]", source):
        in_scope = all(name == "" for name, _ in braces)
        if mark[0] == "{":
            header = source[start : mark.start()]
            first = source.count("\n", 0, mark.start() - len(header.lstrip())) + 1
            plain = _NO_NAME.sub(_blank, header)
            called = _NAME.search(plain)
            if in_scope and (_SCOPE.search(plain) or called is None):
                braces.append(("", 0))
            else:
                braces.append((called[1] if in_scope and called else "{", first))
        elif mark[0] == "}":
            name, first = braces.pop()
            if name not in ("", "{") and all(outer == "" for outer, _ in braces):
                yield name, first, source.count("\n", 0, mark.start()) + 2 - first
        if all(name == "" for name, _ in braces):
            start = mark.end()
