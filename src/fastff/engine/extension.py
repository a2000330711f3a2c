"""fastff's operations as an OpenVINO extension: a library built for the OpenVINO that is installed.

OpenVINO's C++ interface belongs to one release, so that the library is compiled where it is used: in a few seconds,
against the headers in OpenVINO's own wheel, once for each OpenVINO and each build of fastff.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import fastff
from fastff.errors import BackendUnavailable
from fastff.io import replacing_folder
from fastff.ops.library import find_library

# Releases whose headers and operations the extension was written for.
OLDEST, NEXT = (2025, 0), (2027, 0)
NAME = "libfastff_openvino.so"
# A model may outlive the ov::Core that read it, which closes the library with the model's code in it: nodelete.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-rpath,$ORIGIN", "-Wl,-z,nodelete")


def openvino_version() -> str:
    """Release of the OpenVINO that is installed, like "2026.4.1". Raises BackendUnavailable, also for one that does not
    fit."""
    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError as error:
        raise BackendUnavailable(f"OpenVINO is not installed: pip install 'fastff[openvino]' ({error})") from error
    if not OLDEST <= _release(version) < NEXT:
        fitting = f"{'.'.join(map(str, OLDEST))} up to, not including, {'.'.join(map(str, NEXT))}"
        raise BackendUnavailable(f"OpenVINO {version} does not fit this fastff: expected {fitting}")
    return version


@functools.cache
def openvino_core() -> Any:
    """The ov::Core of this process, which is never destroyed.

    OpenVINO's plugin for CPUs gives the thread that loads it a stack for signals and takes it back when its core is
    destroyed. Of two cores the second gives back the first one's, which may be gone: the next Ctrl-C then ends the
    process with a segmentation fault. Raises ImportError without OpenVINO.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")
    import openvino as ov

    return ov.Core()


@functools.cache
def extended_core() -> Any:
    """The same core, told of fastff's operations. Raises BackendUnavailable, as openvino_extension."""
    extension = openvino_extension()
    core = openvino_core()
    core.add_extension(extension)
    return core


def openvino_extension() -> Path:
    """The library that teaches the installed OpenVINO fastff's layers, for `core.add_extension`.

    Compiled at the first call, a few seconds; kept under $XDG_CACHE_HOME/fastff. The core of fastff lies beside it.
    Raises BackendUnavailable without OpenVINO, with one that does not fit, or without a C++ compiler.
    """
    version = openvino_version()
    sources, core = _sources(), find_library()
    content = [path.read_bytes() for path in (*sources, core)]
    stamp = hashlib.sha256(b"\0".join([" ".join([version, *FLAGS]).encode(), *content])).hexdigest()[:16]
    folder = _cache() / f"openvino-{version}-{stamp}"
    if not (folder / NAME).is_file():
        with replacing_folder(folder) as made:
            shutil.copyfile(core, made / core.name)
            _compile(sources[0], made / core.name, made / NAME)
    return folder / NAME


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastff"


def _sources() -> tuple[Path, Path]:
    """The extension's source and fastff.h, from the wheel or, in a checkout, from csrc. Raises BackendUnavailable."""
    places = [Path(entry) / "csrc" for entry in fastff.__path__]
    places += [Path(entry).parents[1] / "csrc" for entry in fastff.__path__]
    for place in places:
        if (place / "openvino" / "extension.cpp").is_file():
            return place / "openvino" / "extension.cpp", place / "fastff.h"
    raise BackendUnavailable(f"openvino/extension.cpp is in none of {', '.join(map(str, places))}: reinstall fastff")


def _compile(source: Path, core: Path, out: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise BackendUnavailable("the OpenVINO extension needs a C++ compiler: none of $CXX, c++ and g++ is there")
    package = Path(str(metadata.distribution("openvino").locate_file("openvino")))
    libraries = [next((package / "libs").glob(name), None) for name in ("libopenvino.so.*", "libtbb.so.*")]
    if None in libraries:
        raise BackendUnavailable(f"{package / 'libs'} lacks libopenvino.so or libtbb.so: install OpenVINO's wheel")
    headers = ["-isystem", package / "include", f"-I{source.parents[1]}"]
    words = (*shlex.split(compiler), *FLAGS, *headers, source, "-o", out, core, *libraries)  # $CXX may be "ccache g++"
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackendUnavailable(f"the OpenVINO extension needs a C++ compiler: {error}") from error
    if done.returncode:
        raise BackendUnavailable(f"{compiler} cannot build the OpenVINO extension: {done.stderr.strip()[-2000:]}")
