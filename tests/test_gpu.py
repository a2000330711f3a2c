"""What only a CUDA device can show: graphs, streams, several devices, the compiler and autocast there.

Values and gradients of the kernels are held by test_triton.py, which runs on a device too.
"""

from __future__ import annotations

import pytest
import torch

import fastff
from conftest import make_layer, make_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device"),
]
SHAPES = {
    "tree": {"depth": 6},
    "leaves": {"depth": 3, "trees": 4, "leaf_width": 4, "node_output": False, "activation": "swiglu"},
}


def layer_on(device: str, shape: str, **changes: object) -> fastff.FFF:
    return make_layer(64, **{**SHAPES[shape], "gate": "boundary", "bias": True, **changes}).float().to(device)


def rows_on(device: str, count: int, seed: int = 1) -> torch.Tensor:
    return make_rows(count, 64, seed=seed, dtype=torch.float32).to(device)


@pytest.mark.parametrize("count", [1, 40, 20000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_computes_what_its_input_holds_at_replay(shape, count):
    layer, x = layer_on("cuda", shape).eval(), rows_on("cuda", count)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(rows_on("cuda", count, seed=2))
        graph.replay()
        assert torch.equal(y, layer(x))


def test_two_streams_do_not_disturb_each_other():
    layers = [layer_on("cuda", shape).eval() for shape in SHAPES]
    rows = [rows_on("cuda", 30000, seed) for seed in (1, 2)]
    with torch.no_grad():
        want = [layer(x) for layer, x in zip(layers, rows, strict=True)]
        torch.cuda.synchronize()
        for _ in range(5):
            got = []
            for layer, x in zip(layers, rows, strict=True):
                with torch.cuda.stream(torch.cuda.Stream()):
                    got.append(layer(x))
            torch.cuda.synchronize()
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recorded_pass_is_launched_without_triton_and_computes_the_same(shape, monkeypatch):
    from triton.runtime.jit import JITFunction

    from fastff.ops.triton_kernels import launch

    if not launch._may_launch_directly():
        pytest.skip("this Triton launches by itself")
    layer, x = layer_on("cuda", shape), rows_on("cuda", 3000)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    want = step()
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked to launch"))
    assert all(torch.equal(a, b) for a, b in zip(step(), want, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_at_an_odd_address_compute_the_same(shape):
    layer, x = layer_on("cuda", shape).eval(), rows_on("cuda", 3000)
    odd = torch.empty(3000 * 64 + 1, device="cuda")[1:].view(3000, 64).copy_(x)
    assert odd.data_ptr() % 16 == 4
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(layer(odd), layer(x), atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_tensors_device_counts_not_the_current_one():
    first, second = (layer_on(f"cuda:{index}", "tree") for index in range(2))
    with torch.cuda.device(0):
        x = rows_on("cuda:1", 5000).requires_grad_()
        y = second(x)
        y.square().sum().backward()
    assert y.device == x.grad.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), first(x.detach().to("cuda:0")).cpu())


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_without_graph_breaks(shape):
    layer, x = layer_on("cuda", shape), rows_on("cuda", 3000)
    compiled = torch.compile(layer, fullgraph=True)
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    # The kernels are the same; the compiler may order what surrounds them otherwise. Sums over 3000 rows in fp32.
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_runs_the_kernels_in_bfloat16(shape):
    layer, x = layer_on("cuda", shape), rows_on("cuda", 3000)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    want = layer(x)
    close = (y.float() - want).norm(dim=1) <= 0.05 * want.norm(dim=1)
    assert close.float().mean() > 0.8  # the others took another turn
    y.float().square().sum().backward()
    assert layer.w_in.grad.isfinite().all()
