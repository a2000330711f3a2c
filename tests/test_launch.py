"""Recorded passes, on the CPU: a kernel that stands in for a compiled one works on addresses as the driver would."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest
import torch

pytest.importorskip("triton", reason="the launcher needs the package triton")

from fastff.ops.triton_kernels import launch
from fastff.ops.triton_kernels.launch import apply, new, replay

COUNT = 8


def floats(address):
    return (ctypes.c_float * COUNT).from_address(address)


class Kernel:
    """out = a + step * b + BIAS; b may be None. `calls` says by which way each launch came."""

    arg_names = ("a_ptr", "b_ptr", "out_ptr", "step", "BIAS")
    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def run(a, b, out, step, *, BIAS, num_warps):  # noqa: N803
            self.calls.append("triton")
            out.copy_(a + BIAS + (0 if b is None else step * b))
            return self

        return run

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (x, y, z, stream, function, metadata) == (3, 1, 1, 11, self.function, self.packed_metadata)
        assert launch_metadata is enter is leave is None
        a, b, out, step, bias = arguments
        self.calls.append("driver")
        for i in range(COUNT):
            floats(out)[i] = floats(a)[i] + bias + (0 if b is None else step * floats(b)[i])


class Uncompiled(Kernel):
    """As in Triton's interpreter."""

    def __getitem__(self, grid):
        run = super().__getitem__(grid)
        return lambda *operands, **options: run(*operands, **options) and None


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    launch._recordings.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "_stream", lambda device: 11)
    yield
    launch._recordings.cache_clear()


def step(kernel, a, b, out, step=2.0):
    launch.launch(kernel, (3,), a, b, out, step, BIAS=1.0, num_warps=4)


def make_pass(kernel):
    """(2 (2a + b + 1) + 3 + b, halves of it): two temporaries, one output of a kernel, one of torch."""

    def run(a, b):
        first, second, y, half = (new(a, COUNT) for _ in range(4))
        step(kernel, b if b is not None else a, a, first)
        step(kernel, first, first, second, 1.0)
        step(kernel, second, b, y, 1.0)
        apply(lambda y, half: torch.div(y, 2, out=half), y, half)
        return y, half

    return run


def expected(a, b):
    first = (a if b is None else b) + 1 + 2 * a
    y = 2 * first + 1 + 1 + (0 if b is None else b)
    return y, y / 2


def inputs(seed):
    return tuple(torch.randn(2, COUNT, generator=torch.Generator().manual_seed(seed)).unbind())


def check(kernel, a, b, key="key"):
    got = replay(key, make_pass(kernel), a, b)
    assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(got, expected(a, b), strict=True))
    calls, kernel.calls = kernel.calls, []
    return set(calls)


def test_later_runs_compute_on_their_own_tensors_and_pass_triton_by():
    kernel = Kernel()
    assert [check(kernel, *inputs(seed)) for seed in range(3)] == [{"triton"}, {"driver"}, {"driver"}]


def test_outputs_are_not_overwritten_by_the_next_run():
    kernel = Kernel()
    runs = [replay("key", make_pass(kernel), *inputs(seed)) for seed in range(3)]
    for seed, got in enumerate(runs):
        assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(got, expected(*inputs(seed)), strict=True))


def test_an_absent_input_stays_absent():
    kernel = Kernel()
    assert [check(kernel, inputs(seed)[0], None) for seed in range(2)] == [{"triton"}, {"driver"}]


def test_another_key_is_recorded_anew():
    kernel = Kernel()
    assert [check(kernel, *inputs(0), key=key) for key in "abab"] == [{"triton"}, {"triton"}, {"driver"}, {"driver"}]


@pytest.mark.parametrize("which", [0, 1])
def test_addresses_that_the_kernel_was_not_compiled_for_go_through_triton(which):
    def unaligned(tensor):
        moved = torch.empty(COUNT + 1)[1:].copy_(tensor)
        assert moved.data_ptr() % 16 == 4
        return moved

    kernel = Kernel()
    crooked = [unaligned(t) if i == which else t for i, t in enumerate(inputs(5))]
    assert check(kernel, *crooked) == {"triton"}
    assert check(kernel, *inputs(1)) == {"triton"}  # the run before could not be recorded
    assert check(kernel, *crooked) == {"triton"}
    assert check(kernel, *inputs(2)) == {"driver"}


def test_one_tensor_in_two_places_is_not_recorded_as_one():
    kernel, (a, _) = Kernel(), inputs(0)
    check(kernel, a, a)
    assert check(kernel, *inputs(1)) == {"triton"}
    assert check(kernel, a, a) == {"driver"}
    assert check(kernel, *inputs(2)) == {"driver"}


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_not_passed_by(hook):
    kernel, chain = Kernel(), getattr(launch.triton.knobs.runtime, hook)
    check(kernel, *inputs(0))
    chain.add(print)
    try:
        assert check(kernel, *inputs(1)) == {"triton"}
    finally:
        chain.remove(print)
    assert check(kernel, *inputs(2)) == {"driver"}


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "4.0.0+git12"])
def test_a_triton_whose_driver_was_not_checked_launches_by_itself(monkeypatch, version):
    monkeypatch.setattr(launch.triton, "__version__", version)
    kernel = Kernel()
    assert [check(kernel, *inputs(seed)) for seed in range(2)] == [{"triton"}, {"triton"}]


def test_kernels_that_were_not_compiled_are_launched_by_triton():
    kernel = Uncompiled()
    assert [check(kernel, *inputs(seed)) for seed in range(2)] == [{"triton"}, {"triton"}]


def test_a_pass_that_fails_is_not_recorded():
    kernel = Kernel()

    def fail(a, b):
        step(kernel, a, b, new(a, COUNT))
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        replay("key", fail, *inputs(0))
    assert [check(kernel, *inputs(seed)) for seed in range(2)] == [{"triton"}, {"driver"}]


def test_threads_record_apart():
    kernels, errors = [Kernel() for _ in range(8)], []

    def work(number):
        try:
            for seed in range(20):
                check(kernels[number], *inputs(seed), key=number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_buffers_in_use_at_once_do_not_overlap():
    dice, shared = random.Random(0), 0
    for _ in range(200):
        buffers = []
        for _ in range(dice.randint(0, 12)):
            first = dice.randint(0, 8)
            used = list(range(first, first + dice.randint(1, 4)))
            buffers.append(launch._Buffer((dice.choice([0, 1, 100, 3000]),), torch.int32, used))
        total = launch.place(buffers)
        assert all(b.offset % launch.ALIGNMENT == 0 and b.offset + b.bytes <= total for b in buffers)
        for index, one in enumerate(buffers):
            for other in buffers[:index]:
                together = one.used[0] <= other.used[-1] and other.used[0] <= one.used[-1]
                apart = one.offset + one.bytes <= other.offset or other.offset + other.bytes <= one.offset
                assert apart or not together
        shared += sum(b.bytes for b in buffers) > total
    assert shared > 50  # memory is used again
