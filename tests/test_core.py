"""tests/c/check_core.c: what the core promises to programs with threads, pools and forks of their own, without torch's.

Under `make sanitize` leaks are looked for too: this process holds the core's memory alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import SANITIZED, make_layer, weights_of
from fastff.ops import native
from fastff.ops.library import find_library, library
from fastff.ops.weights import Weights

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
        ("snapshots", "sixteen readers"),
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


@pytest.mark.parametrize("quantization", [None, "bf16", "int8"])
def test_small_packs_take_their_size(quantization):
    layer = make_layer(256, 256, depth=5).eval()
    weights = 4 * (layer.w_in.numel() + layer.w_out.numel())
    needed = {None: weights, "bf16": weights // 2, "int8": weights // 4}[quantization]
    needed += 0 if quantization is None else 4 * 31 * 256 + 64 * 63  # routing rows in fp32, a line to a neuron
    pack = native.new_pack(layer.config, Weights(*weights_of(layer)), quantization)
    try:
        assert needed <= native.pack_bytes(pack) <= needed + 3 * 4096
    finally:
        library().fastff_packed_free(pack)


def test_large_packs_lie_on_huge_pages():
    layer = make_layer(768, 768, depth=9).eval()  # 1023 neurons, 6.3 MB: three huge pages but for the last 3 KB
    pack = native.new_pack(layer.config, Weights(*weights_of(layer)), None)
    try:
        assert native.pack_bytes(pack) == 3 * 2**21
    finally:
        library().fastff_packed_free(pack)
