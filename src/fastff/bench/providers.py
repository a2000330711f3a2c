"""Ways to compute a feedforward layer. Each builds a callable and says what it needs.

A provider takes the layers' weights and returns `call(layer, x) -> y` on torch tensors; the harness checks y before it
times anything. Dense providers compute `gelu(x @ w_in.T) @ w_out` with `dense_neurons` neurons, each in its library's
fastest fp32 form: packed or frozen weights, one thread pool, no conversion of inputs inside the timed call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastff
from fastff.ops import native
from fastff.tree import TreeConfig

Call = Callable[[int, Tensor], Tensor]
DenseWeights = Sequence[tuple[Tensor, Tensor]]  # (neurons, in_features), (out_features, neurons) of each layer


def missing(name: str) -> str | None:
    """The reason why a provider cannot run here, None if it can."""
    package = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(name)
    for needed in (package, "onnx" if package else None):
        if needed and importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    return None


def dense(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The dense layer: (rows, in_features) to (rows, out_features)."""
    return F.linear(F.gelu(F.linear(x, w_in)), w_out)


def torch_eager(weights: DenseWeights) -> Call:
    return lambda layer, x: dense(x, *weights[layer])


def torch_compile(weights: DenseWeights) -> Call:
    compiled = torch.compile(dense, dynamic=False)
    return lambda layer, x: compiled(x, *weights[layer])


def _onnx_model(w_in: Tensor, w_out: Tensor) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w_in"], ["scores"]),
        helper.make_node("Gelu", ["scores"], ["values"]),
        helper.make_node("MatMul", ["values", "w_out"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(w_in.t().contiguous().numpy(), "w_in"),
        numpy_helper.from_array(w_out.t().contiguous().numpy(), "w_out"),
    ]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", w_in.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", w_out.shape[0]])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def onnxruntime(weights: DenseWeights) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    sessions = [
        ort.InferenceSession(_onnx_model(*pair), options, providers=["CPUExecutionProvider"]) for pair in weights
    ]
    return lambda layer, x: torch.from_numpy(sessions[layer].run(None, {"x": x.numpy()})[0])


def openvino(weights: DenseWeights) -> Call:
    import openvino as ov

    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")
    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # its default would use bf16 on a CPU that has it
    }
    requests = [
        core.compile_model(core.read_model(_onnx_model(*pair)), "CPU", options).create_infer_request()
        for pair in weights
    ]

    def call(layer: int, x: Tensor) -> Tensor:
        result = requests[layer].infer({0: x.numpy()}, share_inputs=True, share_outputs=False)
        return torch.from_numpy(result[0])

    return call


DENSE: dict[str, Callable[[DenseWeights], Call]] = {
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def fastff_module(layers: Sequence[fastff.FFF]) -> Call:
    return lambda layer, x: layers[layer](x)


def fastff_kernel(layers: Sequence[fastff.FFF]) -> Call:
    """The C function on packed weights, its output preallocated: what an embedder of the C core pays, plus ctypes."""
    infer, threads = native.library().fastff_infer_f32, torch.get_num_threads()
    packs = [native.PackedLayer(layer.config) for layer in layers]
    for pack, layer in zip(packs, layers, strict=True):
        pack(torch.zeros(1, layer.in_features), layer._parameters)
    outputs: dict[int, tuple[Tensor, int]] = {}

    def call(layer: int, x: Tensor) -> Tensor:
        rows = len(x)
        if rows not in outputs:
            fresh = torch.empty(rows, layers[0].out_features)
            outputs[rows] = fresh, fresh.data_ptr()
        y, address = outputs[rows]
        infer(packs[layer].address, x.data_ptr(), address, rows, threads)
        return y

    return call


def gather_bmm(layers: Sequence[fastff.FFF]) -> Call:
    """The published "high-level simulation" of conditional multiplication: gather the path's weights, then bmm."""

    def call(layer: int, x: Tensor) -> Tensor:
        fff = layers[layer]
        w_in, w_out, depth = fff.w_in[0], fff.w_out[0], fff.config.depth
        node = torch.zeros(x.shape[0], dtype=torch.int64)
        nodes, scores = [], []
        for _ in range(depth + 1):
            score = torch.bmm(w_in[node].unsqueeze(1), x.unsqueeze(2)).view(-1)
            nodes.append(node)
            scores.append(score)
            node = 2 * node + 1 + (score > 0)
        values = F.gelu(torch.stack(scores, 1))
        return torch.bmm(values.unsqueeze(1), w_out[torch.stack(nodes, 1)]).squeeze(1)

    return call


CONDITIONAL: dict[str, Callable[[Sequence[fastff.FFF]], Call]] = {
    "fastff": fastff_module,
    "fastff C": fastff_kernel,
    "torch gather+bmm": gather_bmm,
}


def applies(name: str, config: TreeConfig) -> bool:
    """Whether a conditional provider can compute this layer."""
    plain = config.trees == 1 and config.node_output and config.leaf_width == 1 and not config.gate and not config.bias
    return name.startswith("fastff") or (plain and config.activation == "gelu")


class TrainStep(nn.Module):
    """Forward and backward of one layer: `call(layer, x)` is x's gradient for an upstream gradient of ones."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def call(self, layer: int, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        self.layers[layer](x).backward(torch.ones_like(x))
        for parameter in self.layers[layer].parameters():
            parameter.grad = None
        if x.grad is None:
            raise RuntimeError("the layer gave x no gradient")
        return x.grad


class DenseLayer(nn.Module):
    """The dense layer as a module, for training steps."""

    def __init__(self, w_in: Tensor, w_out: Tensor) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.w_in, self.w_out)


def _eager_step(weights: DenseWeights, layers: Sequence[fastff.FFF]) -> Call:
    return TrainStep([DenseLayer(*pair) for pair in weights]).call


def _compiled_step(weights: DenseWeights, layers: Sequence[fastff.FFF]) -> Call:
    compiled: list[Any] = [torch.compile(DenseLayer(*pair), dynamic=False) for pair in weights]
    return TrainStep(compiled).call


def _fastff_step(weights: DenseWeights, layers: Sequence[fastff.FFF]) -> Call:
    return TrainStep(list(layers)).call


# Forward and backward; those named as in DENSE are dense.
TRAIN: dict[str, Callable[[DenseWeights, Sequence[fastff.FFF]], Call]] = {
    "torch eager": _eager_step,
    "torch.compile": _compiled_step,
    "fastff": _fastff_step,
}
