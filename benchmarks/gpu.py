"""Conditional layers on a GPU beside dense ones: time, error, memory, and one training step of a whole model.

    python benchmarks/gpu.py --out results/gpu --commit "$(git rev-parse --short HEAD)"

Every provider's output is checked before it is timed. Times are medians over replays of a CUDA graph, or of eager calls
for the providers named eager, with the L2 cache flushed before each; rows of a handful are timed as a chain of layers
with weights of their own, so that no layer finds its weights in the cache. The dense layer stores as many neurons.
`--jobs` processes compile all kernels first, side by side.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from fastff import FFF, ops
from fastff.ops import reference, triton_kernels
from fastff.tree import TreeConfig

BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda"
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One layer at one batch. layers: length of the chain for a handful of rows; dense: hidden neurons of the dense
    layer; providers beyond `dense_graph` and `fastff_graph`, which always run."""

    name: str
    rows: int
    dense: int
    tree: dict = field(default_factory=lambda: {"depth": 11})
    features: int = 768
    dtype: torch.dtype = BF16
    train: bool = False
    layers: int = 1
    also: tuple[str, ...] = ()

    @property
    def config(self) -> TreeConfig:
        return TreeConfig(in_features=self.features, out_features=self.features, **self.tree)

    @property
    def swiglu(self) -> bool:
        return self.name.startswith(("8x4", "16x7", "32x6"))


SWIGLU_LEAVES = {"depth": 4, "trees": 8, "leaf_width": 16, "node_output": False, "activation": "swiglu"}
FOREST = {"depth": 7, "trees": 16}
COMPILED = ("dense_compile",)
CASES = [
    *(Case("1x11", rows, 4096, layers=16) for rows in (1, 8)),
    *(Case("1x11", rows, 4096, layers=4) for rows in (64, 512)),
    Case("1x11", 1024, 4096, also=("dense_eager", "fastff_eager", "gather", "masked")),
    Case("1x11", 4096, 4096),
    Case("1x11", 8192, 4096),
    Case("1x11", 16384, 4096, also=("dense_compile", "gather", "masked")),
    Case("1x11", 65536, 4096, also=("dense_compile", "dense_eager", "fastff_eager")),
    Case("1x11", 262144, 4096, also=COMPILED),
    Case("1x11", 4096, 4096, train=True),
    Case("1x11", 16384, 4096, train=True),
    Case("1x11", 65536, 4096, train=True, also=("dense_compile", "dense_eager", "fastff_eager")),
    Case("1x11", 1, 4096, dtype=F32, layers=16),
    Case("1x11", 16384, 4096, dtype=F32),
    Case("1x11", 16384, 4096, dtype=F32, train=True),
    *(
        Case(name, 65536, width, tree, train=train, also=COMPILED)
        for name, tree, width in (("8x4-leaf16-swiglu", SWIGLU_LEAVES, 2048), ("16x7", FOREST, 2720))
        for train in (False, True)
    ),
    Case("16x7", 1, 2720, FOREST, layers=16),
    Case("32x6", 65536, 2710, {"depth": 6, "trees": 32}),
    Case("1x11", 1, 4096, features=1024, layers=16),
    Case("1x11", 16384, 4096, features=1024),
    Case("1x13", 1, 16384, {"depth": 13}, features=4096, layers=8),
    Case("1x13", 16384, 16384, {"depth": 13}, features=4096),
    Case("gpt3-1x15", 1, 49152, {"depth": 15}, features=12288, layers=4),
    *(Case("gpt3-1x15", rows, 49152, {"depth": 15}, features=12288) for rows in (128, 1024, 16384)),
]


def weights_of(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    c = case.config
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        out = torch.empty(shape, device=DEVICE, dtype=case.dtype)
        return out.normal_(0, scale, generator=generator).requires_grad_(case.train)

    return normal(c.shape_of_w_in, c.in_features**-0.5), normal(c.shape_of_w_out, c.active_neurons**-0.5)


class Dense(nn.Module):
    """Linear, activation, Linear without bias; swiglu for the forests, gelu else."""

    def __init__(self, features: int, hidden: int, *, swiglu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.swiglu = swiglu
        make = {"bias": False, "device": DEVICE, "dtype": dtype}
        self.up = nn.Linear(features, hidden * (2 if swiglu else 1), **make)
        self.down = nn.Linear(hidden, features, **make)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.swiglu:
            gate, value = h.chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(h))


def step(call: Callable[..., Tensor], x: Tensor, weights: list[Tensor], grad: Tensor | None) -> Tensor:
    """Forward, and with `grad` backward to x and the weights."""
    y = call(x)
    if grad is not None:
        torch.autograd.grad(y, [x, *weights], grad)
    return y


def provider(name: str, case: Case) -> Call:
    """A function that runs the whole chain of layers once."""
    x = torch.randn(case.rows, case.features, device=DEVICE).to(case.dtype).requires_grad_(case.train)
    grad = torch.randn_like(x) if case.train else None
    layers: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    for index in range(case.layers):
        if name.startswith("dense"):
            dense = Dense(case.features, case.dense, swiglu=case.swiglu, dtype=case.dtype).requires_grad_(case.train)
            layers.append((torch.compile(dense) if name == "dense_compile" else dense, list(dense.parameters())))
        else:
            w_in, w_out = weights_of(case, index)
            layers.append((conditional(name, case, w_in, w_out), [w_in, w_out]))

    def run() -> None:
        for call, weights in layers:
            step(call, x, weights, grad)

    return run


def conditional(name: str, case: Case, w_in: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    config = case.config
    if name == "gather":
        return lambda x: reference.forward(x, w_in, None, w_out, None, config=config).y
    if name == "masked":
        return lambda x: reference.forward_masked(x, w_in, None, w_out, None, config=config).y
    return lambda x: ops.forward(x, w_in, None, w_out, None, config=config, backend="triton").y


def graphed(run: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(run: Call, budget_ms: int = 40) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in microseconds; the L2 cache is flushed before every call."""
    times = triton.testing.do_bench(run, warmup=10, rep=budget_ms, quantiles=[0.5, 0.2, 0.8])
    return tuple(1e3 * t for t in times)


def check(case: Case, rows: int = 512) -> dict[str, float]:
    """Relative errors of outputs (and gradients) against float64, on rows that route alike; share of changed leaves."""
    rows = min(case.rows, rows)
    w_in, w_out = weights_of(case)
    x = torch.randn(rows, case.features, device=DEVICE).to(case.dtype).requires_grad_(case.train)
    routed = ops.forward(x, w_in, None, w_out, None, config=case.config, backend="triton")
    exact = [t.detach().double().requires_grad_(case.train) for t in (x, w_in, w_out)]
    want = reference.forward(exact[0], exact[1], None, exact[2], None, config=case.config)
    same = (routed.leaf == want.leaf).all(1)
    found = {"error": relative(routed.y[same], want.y[same]), "changed": 1 - same.double().mean().item()}
    if case.train:
        grad = torch.randn_like(x) * same[:, None]
        got = torch.autograd.grad(routed.y, [x, w_in, w_out], grad)
        wanted = torch.autograd.grad(want.y, exact, grad.double())
        found["grad_error"] = max(relative(g, w) for g, w in zip(got, wanted, strict=True))
    limit = 1e-5 if case.dtype == F32 else 1e-2
    if not max(found["error"], found.get("grad_error", 0.0)) < limit or not found["changed"] < 0.1:
        raise SystemExit(f"{case}: {found} is beyond {limit}: not timed")
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def saved_bytes(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Memory that a forward keeps for its backward, output included, input not."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = call(x)
    kept = torch.cuda.memory_allocated() - before
    del y
    return kept


def run_case(case: Case, copy_bandwidth: float) -> list[dict[str, object]]:
    found = check(case) if case.rows * case.features <= 2**27 or case.features <= 4096 else check(case, 64)
    lines = []
    for name in ("dense_graph", "fastff_graph", *case.also):
        run = provider(name, case)
        timed = run if name.endswith("eager") or name in ("gather", "masked") else graphed(run)
        p50, p20, p80 = (t / case.layers for t in measure(timed))
        copy_us = 2e6 * case.rows * case.features * case.dtype.itemsize / copy_bandwidth
        conditional_work = not name.startswith(("dense", "masked"))
        lines.append({
            "case": case.name, "features": case.features, "rows": case.rows, "dtype": str(case.dtype)[6:],
            "mode": "forward+backward" if case.train else "forward", "provider": name,
            "dense_neurons": case.dense if not conditional_work else "", "layers_in_chain": case.layers,
            "latency_us_p50": round(p50, 2), "p20": round(p20, 2), "p80": round(p80, 2),
            "tflops": round(flops(case, conditional_work) / p50 / 1e6, 2),
            "copy_bound_fraction": round(copy_us / p50, 3),
            **({k: f"{v:.2e}" for k, v in found.items()} if name.startswith("fastff") else {}),
        })  # fmt: skip
        del run, timed
        torch.cuda.empty_cache()
    best = min(row["latency_us_p50"] for row in lines if str(row["provider"]).startswith("dense"))
    for row in lines:
        row["over_best_dense"] = round(best / row["latency_us_p50"], 2)
    return lines


def flops(case: Case, conditional_work: bool) -> float:
    per_row = case.config.flops_per_row if conditional_work else 2 * case.features * case.dense * (2 + case.swiglu)
    return case.rows * per_row * (3 if case.train else 1)


class Block(nn.Module):
    """Pre-norm transformer block with 12 heads around a given feedforward layer."""

    def __init__(self, width: int, feedforward: nn.Module) -> None:
        super().__init__()
        make = {"bias": False, "device": DEVICE, "dtype": BF16}
        self.norms = nn.ModuleList([nn.LayerNorm(width, device=DEVICE, dtype=BF16) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width, **make), nn.Linear(width, width, **make)
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (12, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feedforward(self.norms[1](x))


def training_steps() -> list[dict[str, object]]:
    """A step (forward, backward, AdamW) of 12 blocks, width 768, sequence 128, batch 256, eager, in bf16."""
    makers = {
        "dense 4096": lambda: Dense(768, 4096, swiglu=False, dtype=BF16),
        "dense 3072": lambda: Dense(768, 3072, swiglu=False, dtype=BF16),
        "fff 1x11 (4095, gate)": lambda: FFF(768, depth=11, gate="boundary", device=DEVICE, dtype=BF16),
    }
    lines = []
    for name, make in makers.items():
        model = nn.Sequential(*(Block(768, make()) for _ in range(12)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        x = torch.randn(256, 128, 768, device=DEVICE).to(BF16)

        def once(model: nn.Module = model, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        once()
        torch.cuda.reset_peak_memory_stats()
        p50, p20, p80 = (t / 1e3 for t in measure(once, 400))
        memory = torch.cuda.max_memory_allocated() / 2**30
        lines.append({"model": name, "step_ms_p50": round(p50, 2), "p20": round(p20, 2), "p80": round(p80, 2),
                      "peak_gib": round(memory, 2)})  # fmt: skip
        del model, optimizer
        torch.cuda.empty_cache()
    return lines


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source))[0] * 1e6


def memory_kept() -> dict[str, int]:
    case = Case("1x11", 65536, 4096, train=True)
    x = torch.randn(case.rows, case.features, device=DEVICE).to(BF16).requires_grad_()
    dense = Dense(768, 4096, swiglu=False, dtype=BF16)
    fff = conditional("fastff", case, *weights_of(case))
    return {"rows": case.rows, "dense_bytes": saved_bytes(dense, x), "fastff_bytes": saved_bytes(fff, x)}


def compile_ahead(jobs: int, argv: list[str]) -> None:
    """Fill the compilers' caches from several processes."""
    command = [sys.executable, __file__, *argv]
    running = [
        subprocess.Popen([*command, "--share", f"{i}/{jobs}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    for process in running:
        process.wait()


def compile_share(cases: list[Case], share: str) -> None:
    index, jobs = map(int, share.split("/"))
    for case in cases[index::jobs]:
        check(case, 64)
        for name in ("fastff_graph", *(n for n in case.also if n == "dense_compile")):
            provider(name, case)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.case in case.name]
    if arguments.share:
        compile_share(cases, arguments.share)
        return
    reason = triton_kernels.why_unavailable()
    if reason is not None:
        raise SystemExit(reason)
    if arguments.jobs > 1:
        compile_ahead(arguments.jobs, ["--case", arguments.case])
    arguments.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
             "commit": arguments.commit, "copy_bytes_per_s": bandwidth}  # fmt: skip
    lines: list[dict[str, object]] = []
    try:
        for case in cases:
            started = time.time()
            lines += run_case(case, bandwidth)
            fast = next(row for row in lines[::-1] if row["provider"] == "fastff_graph")
            print(f"{case.name:18s} d={case.features:5d} rows={case.rows:6d} {fast['dtype']:8s} {fast['mode']:16s} "
                  f"{fast['latency_us_p50']:9.1f} us  {fast['over_best_dense']:6.2f}x the best dense  "
                  f"error {fast['error']} ({time.time() - started:.1f} s)", flush=True)  # fmt: skip
    finally:
        if lines:
            write_csv(arguments.out / "layers.csv", [{**row, **about} for row in lines])
    about["activations"] = memory_kept()
    about["training_step"] = training_steps()
    print(json.dumps(about, indent=1))
    (arguments.out / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def write_csv(path: Path, lines: list[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in lines for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
