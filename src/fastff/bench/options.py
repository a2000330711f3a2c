"""What a user may ask of `fastff bench`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from fastff.bench import cpu_run, gpu_run

DEFAULT_OUT = Path("bench-results")
ONLY_ON = {"quick": "cpu", "replace": "cpu", "max_run_seconds": "cuda", "jobs": "cuda", "tune": "cuda"}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of one benchmark. Raises ValueError for values that cannot be."""

    out: Path | None = None
    """Directory of the results, and of what an interrupted run left. Default: print only; on a GPU bench-results."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure."""
    only: tuple[str, ...] = ()
    """Measure only KIND=VALUE[,VALUE]: layer, provider, rows, visits or threads. On a GPU, cells whose name has this
    text. May be repeated."""
    cell_seconds: float | None = None
    """Timed seconds of each provider and case."""
    quick: bool = False
    """Measure a small part of the table, in a few minutes (CPU)."""
    replace: bool = False
    """Replace matching results in --out and keep the others (CPU)."""
    max_run_seconds: float | None = None
    """Stop after this many seconds, the most important cases first (GPU)."""
    jobs: int = 1
    """Processes that compile kernels ahead of the measurements (GPU)."""
    tune: bool = False
    """Search faster block sizes first, and keep them (GPU)."""

    def __post_init__(self) -> None:
        for name in ("cell_seconds", "max_run_seconds", "jobs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value} is not above 0")

    def refuse_what_the_device_ignores(self) -> None:
        """Raises ValueError for an option that does nothing with the device."""
        for field in fields(self):
            device = ONLY_ON.get(field.name, self.device)
            if device != self.device and getattr(self, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise ValueError(f"--{name} does nothing with --device {self.device}: it is for {device}")

    def out_or_default(self) -> Path:
        return self.out or DEFAULT_OUT

    def cpu_settings(self) -> cpu_run.Settings:
        """Raises ValueError for an unknown choice, or for --replace without results to replace in."""
        from fastff.bench.cpu_command import settings_of

        if self.replace and (self.out is None or not (self.out / "layer-cpu.json").is_file()):
            raise ValueError(f"--replace needs --out with a layer-cpu.json: {self.out} holds none")
        return settings_of(quick=self.quick, only=self.only, seconds=self.cell_seconds)

    def gpu_settings(self) -> gpu_run.Settings:
        from fastff.bench.gpu_run import Settings

        return Settings(
            seconds=self.max_run_seconds,
            cell_seconds=Settings.cell_seconds if self.cell_seconds is None else self.cell_seconds,
            jobs=self.jobs,
            tune=self.tune,
            only=self.only,
        )
