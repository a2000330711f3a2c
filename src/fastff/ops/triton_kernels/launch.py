"""Launches that cost the host little: a pass is recorded when it first runs, and replayed from then on.

What a pass (one forward or backward of a layer) allocates and launches depends on the key that its caller gives, not on
the values in its tensors. Its first run goes through Triton's own launch, which binds and specialises every argument:
some 20 us a kernel. `replay` keeps the compiled kernels and the place of every tensor among their arguments; later runs
allocate one workspace, fill in addresses and hand the kernels to Triton's driver. Results are the same tensors' worth
of memory; temporaries that are not needed at the same time share it.

A recorded kernel was compiled for addresses that are multiples of 16. Inputs that are not, versions of Triton whose
driver interface was not checked, launch hooks (profilers) and the interpreter get Triton's own launch instead.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from fastff.ops.triton_kernels.plan import ceil_div

Result = TypeVar("Result")

MOST_RECORDED = 512  # passes; the number of rows is part of a key, and may change with every call
ALIGNMENT = 512  # bytes between temporaries: that of torch's own allocations on a GPU
KNOWN = ((3, 6), (3, 7))  # first and last Triton whose CompiledKernel.run takes what `_bind` gives it


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`, of its dtype unless another is named."""
    made = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if _local.tape is not None:
        _local.tape.allocated(made)
    return made


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """`kernel[grid](*operands, **options)`; options: compile-time arguments and Triton's own, like num_warps."""
    compiled = kernel[grid](*operands, **options)
    if _local.tape is not None:
        _local.tape.ran(_Launch(kernel, grid, options, compiled), operands)


def apply(function: Callable[..., object], *tensors: Tensor) -> None:
    """Run torch operations that write into tensors of the pass."""
    function(*tensors)
    if _local.tape is not None:
        _local.tape.ran(function, tensors)


def attempt(function: Callable[[], Result]) -> Result:
    """What the function gives; if it raises, a recording forgets what it did, so that another way can be tried."""
    tape = _local.tape
    before = tape.place() if tape is not None else (0, 0)
    try:
        return function()
    except BaseException:
        if tape is not None:
            tape.back_to(before)
        raise


def replay(key: Hashable, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """`function(*inputs)`, recorded when the key is first seen.

    key: all that decides what the function allocates and launches: shapes, dtypes, device, which inputs are None.
    function: makes its tensors with `new`, works with `launch` and `apply` only, and returns tensors that it made.
    """
    recorded = _recordings(key)
    if recorded:
        return recorded[0](inputs)
    given = [tensor for tensor in inputs if tensor is not None]
    # One tensor in two places could not be told apart, and kernels would be compiled for unaligned addresses.
    if len({id(tensor) for tensor in given}) < len(given) or not all(map(_aligned, given)):
        return function(*inputs)
    tape = _Tape()
    for tensor in inputs:
        tape.given(tensor)
    before, _local.tape = _local.tape, tape
    try:
        outputs = function(*inputs)
    finally:
        _local.tape = before
    recorded.append(_Recording(tape, outputs))
    return outputs


class _Local(threading.local):
    tape: _Tape | None = None


@functools.lru_cache(maxsize=MOST_RECORDED)
def _recordings(key: Hashable) -> list[_Recording]:
    """The recording of a key, to be put in by its first run."""
    return []


@dataclass(frozen=True)
class _Launch:
    """A kernel as it was launched; compiled: what Triton made of it, None in the interpreter."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    compiled: Any

    def __call__(self, *operands: Any) -> None:
        self.kernel[self.grid](*operands, **self.options)


class _Tape:
    """What a pass did so far. Tensors are numbered: inputs, then those that it allocated, which `tensors` keeps alive
    so that no other takes over an identity."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.inputs = 0  # how many of them
        self.steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._numbers: dict[int, int] = {}

    def given(self, tensor: Tensor | None) -> None:
        self.allocated(tensor)
        self.inputs += 1

    def allocated(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._numbers[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)

    def ran(self, call: Callable[..., object], operands: Iterable[Any]) -> None:
        self.steps.append((call, tuple(_Number(self.number(o)) if isinstance(o, Tensor) else o for o in operands)))

    def place(self) -> tuple[int, int]:
        return len(self.tensors), len(self.steps)

    def back_to(self, place: tuple[int, int]) -> None:
        tensors, steps = place
        del self.tensors[tensors:], self.steps[steps:]
        self._numbers = {identity: number for identity, number in self._numbers.items() if number < tensors}

    def number(self, tensor: Tensor) -> int:
        return self._numbers[id(tensor)]


class _Number(int):
    """The number of a tensor, in the place of the tensor."""


@dataclass
class _Buffer:
    """A tensor that the pass allocates. offset: bytes into the workspace, None for one that is allocated by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    used: list[int] = field(default_factory=list)  # steps
    offset: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Bound:
    """The steps of a pass for Triton's driver: what to call, and what picks its arguments out of one list. That holds
    the stream, the addresses of inputs and buffers, the same as tensors (None for those in the workspace), constants.
    """

    steps: list[tuple[Callable[..., object], Callable[[list[Any]], tuple[Any, ...]]]]
    constants: list[Any]


class _Recording:
    """A pass that can be run again on other tensors of the same shapes."""

    def __init__(self, tape: _Tape, outputs: tuple[Tensor, ...]) -> None:
        made = [tensor for tensor in tape.tensors[tape.inputs :] if tensor is not None]
        self._device = made[0].device
        self._inputs = tape.inputs
        self._steps = tape.steps
        self._outputs = [tape.number(tensor) - tape.inputs for tensor in outputs]
        self._buffers = [_Buffer(tuple(tensor.shape), tensor.dtype) for tensor in made]
        alone = set(self._outputs)
        for index, (call, operands) in enumerate(tape.steps):
            numbers = [o - tape.inputs for o in operands if isinstance(o, _Number) and o >= tape.inputs]
            if not isinstance(call, _Launch):
                alone.update(numbers)  # torch takes tensors, a kernel addresses
            for number in numbers:
                self._buffers[number].used.append(index)
        shared = [buffer for number, buffer in enumerate(self._buffers) if number not in alone and buffer.used]
        self._workspace = place(shared)
        self._direct = self._bind() if _may_launch_directly() else None

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        device = self._device
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=device)
        alone = [
            torch.empty(buffer.shape, dtype=buffer.dtype, device=device) if buffer.offset is None else None
            for buffer in self._buffers
        ]
        given = [None if tensor is None else tensor.data_ptr() for tensor in inputs]
        tensors = [*inputs, *alone]
        if self._direct is None or any(address is not None and address % 16 for address in given) or _hooked():
            self._run(tensors, workspace)
        else:
            self._run_directly(self._direct, tensors, given, workspace.data_ptr())
        return tuple(alone[number] for number in self._outputs)  # type: ignore[misc]

    def _run(self, tensors: list[Tensor | None], workspace: Tensor) -> None:
        """By Triton's own launch."""
        for number, buffer in enumerate(self._buffers, self._inputs):
            if buffer.offset is not None:
                part = workspace[buffer.offset : buffer.offset + buffer.bytes]
                tensors[number] = part.view(buffer.dtype).view(buffer.shape)
        for call, operands in self._steps:
            call(*(tensors[o] if isinstance(o, _Number) else o for o in operands))

    def _run_directly(
        self, bound: _Bound, tensors: list[Tensor | None], given: list[int | None], workspace: int
    ) -> None:
        """By Triton's driver. given: addresses of the inputs."""
        values: list[Any] = [_stream(self._device), *given]
        for buffer, tensor in zip(self._buffers, tensors[self._inputs :], strict=True):
            values.append(workspace + buffer.offset if tensor is None else tensor.data_ptr())  # type: ignore[operator]
        values += tensors
        values += bound.constants
        for run, arguments in bound.steps:
            run(*arguments(values))

    def _bind(self) -> _Bound | None:
        """None where a kernel has nothing that could be called."""
        constants: list[Any] = []
        steps: list[tuple[Callable[..., object], Callable[[list[Any]], tuple[Any, ...]]]] = []
        count = self._inputs + len(self._buffers)

        def at(value: Any) -> int:
            if isinstance(value, _Number):
                return 1 + value
            constants.append(value)
            return 2 * count + len(constants)

        for call, operands in self._steps:
            if not isinstance(call, _Launch):
                steps.append((call, _picker([1 + count + number for number in operands])))
                continue
            kernel, grid = call.compiled, (*call.grid, 1, 1)[:3]
            if kernel is None:
                return None
            # After the metadata of the kernel those of the launch, and the hooks before and after it: none.
            head = (*grid, _Number(-1), kernel.function, kernel.packed_metadata, None, None, None)
            rest = (call.options[name] for name in call.kernel.arg_names[len(operands) :])
            steps.append((kernel.run, _picker([at(value) for value in (*head, *operands, *rest)])))
        return _Bound(steps, constants)


def _picker(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """What takes these places out of a list."""
    chosen = itemgetter(*places)
    return chosen if len(places) > 1 else lambda values: (chosen(values),)


def place(buffers: list[_Buffer]) -> int:
    """Give every buffer an offset such that those in use at the same step do not overlap; the bytes needed in all."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: -buffer.bytes):
        offset = 0
        for other in sorted(placed, key=lambda other: other.offset or 0):
            if other.used[-1] < buffer.used[0] or buffer.used[-1] < other.used[0]:
                continue
            if other.offset is not None and other.offset < offset + buffer.bytes:
                offset = max(offset, _rounded(other.offset + other.bytes))
        buffer.offset = offset
        placed.append(buffer)
    return max((_rounded((buffer.offset or 0) + buffer.bytes) for buffer in placed), default=0)


def _rounded(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _may_launch_directly() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return KNOWN[0] <= version <= KNOWN[1] and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


def _stream(device: torch.device) -> int:
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def _hooked() -> bool:
    """Whether someone wants to be told of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


_local = _Local()
