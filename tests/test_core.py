"""tests/c/check_core.c: what the core promises to programs with threads, pools and forks of their own, without torch's.

Under `make sanitize` leaks are looked for too: this process holds the core's memory alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import SANITIZED
from fastff.ops.library import find_library

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    to, library = tmp_path_factory.mktemp("core") / "check_core", str(find_library())
    source = [
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests" / "c" / "check_core.c"),
        library,
        f"-Wl,-rpath,{Path(library).parent}",
    ]
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "-g", *source, "-lm", "-lpthread", "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return to


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("kernels", "kernels: 60 layers"),
        ("threads", "six callers"),
        ("fork", "eight children"),
        ("scarce", "few given"),
    ],
)
def test_without_python(mode, text, program):
    if SANITIZED and mode == "fork":
        pytest.skip(
            "a sanitizer's malloc keeps the lock that another thread held at the fork: one child in fifty waits"
        )
    if SANITIZED and mode == "scarce":
        pytest.skip("a sanitizer's shadow memory is larger than the limit that this sets")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([program, mode], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
