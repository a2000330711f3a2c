"""The C++ core: its shared library found, loaded once through ctypes, and the signatures of csrc/fastff.h.

The library knows nothing of torch. It runs on torch's own thread pool, handed to it as a C function pointer: two
spinning pools in one process slow each other down a hundredfold.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastff.errors import BackendUnavailable, FastffError

ABI_VERSION = 3
OK = 0
SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}  # of a function, by the dtype that it takes
_LIBRARY_NAMES = ("libfastff.so", "libfastff.dylib")
# Arguments of the functions of csrc, by the letters of _TYPES; what returns no status says its type behind an arrow.
# `infer_f32` takes its count as a pointer: ctypes converts a Python int to one twice as fast as to an int64, and both
# are one 64-bit register.
_SIGNATURES = """
    advise_huge_pages(pl)->v
    backward_visited_{f32,f64}(pppppplpppppppi)
    backward_{f32,f64}(pppppplpppppppi)
    checksum(pl)->u
    conditional_backward_{f32,f64}(ppppppppllpppppppi)
    conditional_forward_{f32,f64}(ppppppppllppi)
    conditional_infer_f32(ppppllpi)
    conditional_pack_f32(pppppip)
    conditional_packed_bytes(p)->l
    conditional_packed_free(p)
    encoder_describe(pp)
    encoder_free(p)->v
    encoder_open(sip)
    encoder_run(pppplpi)
    error()->s
    forward_packed_f32(pplpppi)
    forward_{f32,f64}(pppppplppppi)
    infer_f32(ppppp)
    isa()->s
    layer_bytes(p)->l
    layer_free(p)->v
    layer_infer_f32(pppli)
    layer_pack_f32(pppppppppip)
    matrix_bytes(p)->l
    matrix_multiply_f32(ppplpiiipi)
    matrix_pack_blocks(ppp)
    matrix_pack_f32(ppp)
    model_describe(pp)
    model_free(p)->v
    model_open(sip)
    pack_f32(pppppip)
    packed_bytes(p)->l
    packed_free(p)
    packed_watch(ppi)
    plan_forward(pilip)
    read_memory(pllp)
    route_{f32,f64}(ppppplpppi)
    router_bytes(p)->l
    router_free(p)->v
    router_infer_f32(pplppi)
    router_pack_f32(ppppip)
    session_feed(pplpi)
    session_free(p)->v
    session_length(p)->l
    session_new(plp)
    session_rewind(pl)
    session_sample(ppp)
    session_seed(pu)
    set_isa(s)
    set_parallel_for(p)->v
    visited(pplpppp)
"""
_TYPES = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "u": ctypes.c_uint64,
    "v": None,
}


def find_library() -> Path:
    """The library's file: the one that FASTFF_LIBRARY names in the environment (another build, say one with
    sanitizers), else the one beside the package."""
    named = os.environ.get("FASTFF_LIBRARY")
    if named:
        return Path(named)
    # An editable install keeps the Python in src/ and the library in site-packages: both are on the package's path.
    spec = importlib.util.find_spec("fastff")
    places = [Path(entry) for entry in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        for name in _LIBRARY_NAMES:
            if (place / name).is_file():
                return place / name
    raise BackendUnavailable(
        f"backend 'native' needs {_LIBRARY_NAMES[0]}, which is in none of {', '.join(map(str, places))}"
    )


def _declare(library: ctypes.CDLL) -> None:
    for name, both, arguments, _, result in re.findall(r"(\w+?)(_\{f32,f64\})?\((\w*)\)(->(\w))?", _SIGNATURES):
        for suffix in ("_f32", "_f64") if both else ("",):
            function = getattr(library, f"fastff_{name}{suffix}")
            function.argtypes = [_TYPES[letter] for letter in arguments]
            function.restype = _TYPES[result or "i"]


def _torch_pool() -> int | None:
    """Address of torch's parallel_for, None where this torch does not export it (then the library's own pool runs)."""
    for directory in (Path(torch.__file__).parent / "lib",):
        for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
            if (directory / name).is_file():
                function = getattr(ctypes.CDLL(str(directory / name)), "torch_parallel_for", None)
                return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendUnavailable saying what is missing."""
    path = find_library()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"backend 'native' could not load {path}: {error}") from error
    version = loaded.fastff_abi_version()
    if version != ABI_VERSION:
        raise BackendUnavailable(f"{path} has ABI version {version}, expected {ABI_VERSION}: reinstall fastff")
    _declare(loaded)
    if not loaded.fastff_isa():
        raise BackendUnavailable(_message(loaded))
    loaded.fastff_set_parallel_for(_torch_pool())
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status. Raises FastffError with the library's message."""
    if getattr(library(), name)(*arguments) != OK:
        raise FastffError(last_error())


def last_error() -> str:
    """What the core says about this thread's last call."""
    return _message(library())


def _message(loaded: ctypes.CDLL) -> str:
    said: bytes = loaded.fastff_error()  # with file names of any bytes in it, and cut where it is long
    return said.decode(errors="replace")


class Owner:
    """Holds something that the core made, and frees it with `fastff_<of>_free` when it goes itself."""

    of: ClassVar[str]

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        self._free = getattr(library(), f"fastff_{self.of}_free")  # found now: at exit the library may be gone before

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(self._handle)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"a {type(self).__name__} cannot be copied: both would free the same memory")


class Pack(Owner):
    """An Owner of packed weights, whose size `fastff_<of>_bytes` tells."""

    @property
    def bytes(self) -> int:
        """Memory of the copy."""
        size: int = getattr(library(), f"fastff_{self.of}_bytes")(self._handle)
        return size


def threads_within(processors: int, available: int) -> Callable[[], int]:
    """What tells how many threads a call gets: torch's number, at most the processors of a control group's quota, which
    torch does not know. processors: that this process may use; available: those of its affinity mask, equal without a
    quota."""
    if processors >= available:
        return torch.get_num_threads
    return lambda: min(torch.get_num_threads(), processors)


def processors() -> int:
    """How many processors this process may use, by its affinity and its control groups' quotas."""
    return int(library().fastff_processors())


@functools.cache
def thread_counter() -> Callable[[], int]:
    """`threads_within` of this process: found once, for the shortest path of inference to call."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads_within(processors(), available)


def get_num_threads() -> int:
    """torch.get_num_threads(), within this process's quota of processor time."""
    return thread_counter()()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
