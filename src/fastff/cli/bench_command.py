"""`fastff bench`."""

from __future__ import annotations

from fastff.bench.options import BenchOptions
from fastff.cli.console import console


def bench(options: BenchOptions | None = None) -> int:
    """Time conditional layers beside the fastest dense layers that this machine can run.

    Every output is checked before it is timed. Run the same command again to resume an interrupted run.
    """
    options = options or BenchOptions()
    options.refuse_what_the_device_ignores()
    if options.device == "cuda":
        from fastff.bench.gpu_command import bench_gpu

        return bench_gpu(options.gpu_settings(), options.out_or_default(), console)
    from fastff.bench.cpu_command import bench_cpu

    return bench_cpu(options.cpu_settings(), options.out, console, replace=options.replace)
