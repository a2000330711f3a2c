"""The C++ core: its shared library found, loaded once through ctypes, and the signatures of csrc/fastff.h.

The library knows nothing of torch. It runs on torch's own thread pool, handed to it as a C function pointer: two
spinning pools in one process slow each other down a hundredfold.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
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
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for suffix in SUFFIXES.values():
        forward = getattr(library, f"fastff_forward_{suffix}")
        forward.argtypes = [pointer] * 6 + [int64] + [pointer] * 4 + [int32]
        for kind in ("backward", "backward_visited"):
            backward = getattr(library, f"fastff_{kind}_{suffix}")
            backward.argtypes = [pointer] * 6 + [int64] + [pointer] * 7 + [int32]
        conditional = getattr(library, f"fastff_conditional_forward_{suffix}")
        conditional.argtypes = [pointer] * 8 + [int64, int64, pointer, pointer, int32]
        conditional = getattr(library, f"fastff_conditional_backward_{suffix}")
        conditional.argtypes = [pointer] * 8 + [int64, int64] + [pointer] * 7 + [int32]
        route = getattr(library, f"fastff_route_{suffix}")
        route.argtypes = [pointer] * 5 + [int64] + [pointer] * 3 + [int32]
    library.fastff_router_pack_f32.argtypes = [pointer] * 4 + [int32, pointer]
    library.fastff_router_infer_f32.argtypes = [pointer, pointer, int64, pointer, pointer, int32]
    library.fastff_router_bytes.argtypes = [pointer]
    library.fastff_router_bytes.restype = int64
    library.fastff_router_free.argtypes = [pointer]
    library.fastff_router_free.restype = None
    library.fastff_layer_pack_f32.argtypes = [pointer] * 9 + [int32, pointer]
    library.fastff_layer_infer_f32.argtypes = [pointer, pointer, pointer, int64, int32]
    library.fastff_layer_bytes.argtypes = [pointer]
    library.fastff_layer_bytes.restype = int64
    library.fastff_layer_free.argtypes = [pointer]
    library.fastff_layer_free.restype = None
    library.fastff_conditional_pack_f32.argtypes = [pointer] * 5 + [int32, pointer]
    library.fastff_conditional_infer_f32.argtypes = [pointer] * 4 + [int64, int64, pointer, int32]
    library.fastff_conditional_packed_free.argtypes = [pointer]
    library.fastff_conditional_packed_bytes.argtypes = [pointer]
    library.fastff_conditional_packed_bytes.restype = int64
    library.fastff_matrix_bytes.argtypes = [pointer]
    library.fastff_matrix_bytes.restype = int64
    library.fastff_matrix_pack_f32.argtypes = [pointer] * 3
    library.fastff_matrix_multiply_f32.argtypes = (
        [pointer] * 3 + [int64] + [pointer] + [int32] * 3 + [pointer] + [int32]
    )
    library.fastff_model_open.argtypes = [ctypes.c_char_p, int32, pointer]
    library.fastff_model_describe.argtypes = [pointer, pointer]
    library.fastff_model_free.argtypes = [pointer]
    library.fastff_model_free.restype = None
    library.fastff_session_new.argtypes = [pointer, int64, pointer]
    library.fastff_session_length.argtypes = [pointer]
    library.fastff_session_length.restype = int64
    library.fastff_session_rewind.argtypes = [pointer, int64]
    library.fastff_session_feed.argtypes = [pointer, pointer, int64, pointer, int32]
    library.fastff_session_seed.argtypes = [pointer, ctypes.c_uint64]
    library.fastff_session_sample.argtypes = [pointer, pointer, pointer]
    library.fastff_session_free.argtypes = [pointer]
    library.fastff_session_free.restype = None
    library.fastff_encoder_open.argtypes = [ctypes.c_char_p, int32, pointer]
    library.fastff_encoder_describe.argtypes = [pointer, pointer]
    library.fastff_encoder_run.argtypes = [pointer] * 4 + [int64, pointer, int32]
    library.fastff_encoder_free.argtypes = [pointer]
    library.fastff_encoder_free.restype = None
    library.fastff_visited.argtypes = [pointer, pointer, int64, pointer, pointer, pointer, pointer]
    library.fastff_pack_f32.argtypes = [pointer] * 5 + [int32, pointer]
    library.fastff_plan_forward.argtypes = [pointer, int32, int64, int32, pointer]
    library.fastff_packed_watch.argtypes = [pointer, pointer, int32]
    library.fastff_checksum.argtypes = [pointer, int64]
    library.fastff_checksum.restype = ctypes.c_uint64
    # ctypes converts a Python int to a pointer twice as fast as to an int64; both are one 64-bit register.
    library.fastff_infer_f32.argtypes = [pointer] * 5
    library.fastff_forward_packed_f32.argtypes = [pointer, pointer, int64, pointer, pointer, pointer, int32]
    library.fastff_packed_free.argtypes = [pointer]
    library.fastff_advise_huge_pages.argtypes = [pointer, int64]
    library.fastff_advise_huge_pages.restype = None
    library.fastff_packed_bytes.argtypes = [pointer]
    library.fastff_packed_bytes.restype = int64
    library.fastff_set_parallel_for.argtypes = [pointer]
    library.fastff_set_parallel_for.restype = None
    library.fastff_set_isa.argtypes = [ctypes.c_char_p]
    library.fastff_error.restype = ctypes.c_char_p
    library.fastff_isa.restype = ctypes.c_char_p


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
        raise BackendUnavailable(loaded.fastff_error().decode())
    loaded.fastff_set_parallel_for(_torch_pool())
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns a status. Raises FastffError with the library's message."""
    if getattr(library(), name)(*arguments) != OK:
        raise FastffError(library().fastff_error().decode())


class Owner:
    """Holds something that the core made, and frees it with `fastff_<of>_free` when it goes itself."""

    of: ClassVar[str]

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        self._free = getattr(library(), f"fastff_{self.of}_free")  # found now: at exit the library may be gone before

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(self._handle)


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
