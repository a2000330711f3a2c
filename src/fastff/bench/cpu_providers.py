"""Ways to compute a feedforward layer on the CPU, each in its library's fastest form.

A provider turns layers into functions, one a layer, that the harness calls with inputs in the provider's own form
(numpy, bf16, ...): nothing is converted inside the timed call. Weights are packed or frozen beforehand. Providers of
one `family` share a process and its pool of threads.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastff
from fastff.bench import onnx_models
from fastff.bench.timed_layers import DenseLayer, activate, dense, train_step
from fastff.bench.workloads import DenseConfig, Subject, weights_of
from fastff.config import Quantization
from fastff.engine.extension import openvino_core
from fastff.ops import reference
from fastff.ops.library import library
from fastff.ops.packed import PackedLayer

Call = Callable[[Any], Any]
Make = Callable[[Sequence[Any], int], list[Call]]  # layers and rows a call to a function a layer

CHUNK_BYTES = 2**26  # of weights gathered, or scores masked, at once
# Relative, against float64; something wrong errs by 1 and more. torch's dynamic int8 has one scale for all rows of a
# call and errs by 0.09 where hidden values have long tails (swiglu).
ERROR_LIMITS = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-1}


def _same(x: Tensor) -> Any:
    return x


def _nothing() -> str | None:
    return None


def _no_compiler() -> str | None:
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"


def _no_mkl() -> str | None:
    return None if torch.backends.mkl.is_available() else "this build of torch has no MKL"


def _no_onednn() -> str | None:
    return None if torch.backends.mkldnn.is_available() else "this build of torch has no oneDNN"


@dataclass(frozen=True)
class Provider:
    """dense: computes a DenseConfig, else a tree. copies: memory beside the fp32 weights, in their bytes,
    with what building needs for a moment. keeps: matrices of hidden values that each layer holds between calls.
    per_rows: made for one number of rows. trains: has a backward. needs: packages. missing: what else
    is not there, if anything."""

    name: str
    family: str
    dense: bool
    precision: str
    make: Make
    copies: float
    keeps: float = 0.0
    _: KW_ONLY
    inputs: Callable[[Tensor], Any] = _same
    output: Callable[[Any], Tensor] = _same
    per_rows: bool = False
    trains: bool = False
    needs: tuple[str, ...] = ()
    missing: Callable[[], str | None] = _nothing

    def why_not(self, subject: Subject) -> str | None:
        """The reason why this provider cannot compute this layer here, None if it can."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if self.needs and weights_of(subject) * 4 > onnx_models.MOST_BYTES:
            return f"{weights_of(subject) * 4} bytes of weights are more than one ONNX model holds"
        return self.missing()

    def computes(self, subject: Subject, training: bool) -> bool:
        """Whether this is a provider of such a layer at all."""
        return self.dense == isinstance(subject, DenseConfig) and (self.trains or not training)


def modules(layers: Sequence[nn.Module], rows: int) -> list[Call]:
    """PyTorch eager, dense or conditional: the module itself. In training mode, its forward and backward."""
    return [train_step(layer, list(layer.parameters())) if layer.training else layer for layer in layers]


def torch_compile(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
    torch._dynamo.reset()  # each number of rows is compiled for itself and counts against a limit
    compiled = torch.compile(dense, dynamic=False)

    def call(layer: DenseLayer) -> Call:
        up, down = layer.up.weight, layer.down.weight
        run = lambda x: compiled(x, up, down, layer.config.activation)  # noqa: E731
        return train_step(run, [up, down]) if layer.training else run

    return [call(layer) for layer in layers]


def torch_packed(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
    """MKL's products on weights packed for this number of rows: what torch.compile emits for frozen weights."""

    def call(layer: DenseLayer) -> Call:
        activation, mkl = layer.config.activation, torch.ops.mkl
        up, down = layer.up.weight.detach(), layer.down.weight.detach()
        packed_up, packed_down = (mkl._mkl_reorder_linear_weight(w, rows) for w in (up, down))

        def run(x: Tensor) -> Tensor:
            hidden = activate(mkl._mkl_linear(x, packed_up, up, None, rows), activation)
            return cast(Tensor, mkl._mkl_linear(hidden, packed_down, down, None, rows))

        return run

    return [call(layer) for layer in layers]


def torch_bf16(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
    """oneDNN's fused products on bf16 weights packed for this number of rows; bf16 rows in and out."""

    def call(layer: DenseLayer) -> Call:
        gelu, linear = layer.config.activation == "gelu", torch.ops.mkldnn._linear_pointwise
        up, down = (
            torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), rows)
            for weight in (layer.up.weight, layer.down.weight)
        )

        def run(x: Tensor) -> Tensor:
            scores = linear(x, up, None, "gelu" if gelu else "none", [], "none" if gelu else "")
            return cast(Tensor, linear(scores if gelu else activate(scores, "swiglu"), down, None, "none", [], ""))

        return run

    return [call(layer) for layer in layers]


def torch_int8(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
    """PyTorch's dynamic quantisation of linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package that has no faster form of it
        from torch.ao.quantization import quantize_dynamic

        quantised = [quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8) for layer in layers]
        for layer in quantised:
            layer(torch.zeros(1, layer.config.features))  # warns once about its own deprecated parts
        return quantised


@functools.cache
def _share_one_arena() -> None:
    """For all sessions of this process: one each would hold gigabytes of hidden values at thousands of rows."""
    import onnxruntime as ort

    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(where, None)


def onnxruntime_calls(model: Callable[[DenseLayer], bytes]) -> Make:
    """ONNX Runtime on the model that each layer becomes."""

    def make(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
        import onnxruntime as ort

        _share_one_arena()
        options = ort.SessionOptions()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1

        def call(layer: DenseLayer) -> Call:
            run = ort.InferenceSession(model(layer), options, providers=["CPUExecutionProvider"]).run
            return lambda x: run(None, {"x": x})[0]

        return [call(layer) for layer in layers]

    return make


def openvino_calls(model: Callable[[DenseLayer], bytes]) -> Make:
    """OpenVINO likewise."""

    def make(layers: Sequence[DenseLayer], rows: int) -> list[Call]:
        core = openvino_core()
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # its default would use bf16 on a CPU that has it
        }

        def call(layer: DenseLayer) -> Call:
            request = core.compile_model(core.read_model(model(layer)), "CPU", options).create_infer_request()
            return lambda x: request.infer({0: x}, share_inputs=True, share_outputs=False)[0]

        return [call(layer) for layer in layers]

    return make


def _fastff_kernel(quantization: str | None) -> Make:
    """The C function on packed weights, its output preallocated: what an embedder of the C core pays, plus ctypes."""

    def make(layers: Sequence[fastff.FFF], rows: int) -> list[Call]:
        infer, threads = library().fastff_infer_f32, torch.get_num_threads()
        y = torch.empty(rows, layers[0].out_features)
        address = y.data_ptr()

        def call(layer: fastff.FFF) -> Call:
            pack = PackedLayer(layer.config, quantization)
            pack.infer(torch.zeros(1, layer.in_features), layer._parameters)
            packed = pack.address

            def run(x: Tensor, _alive: PackedLayer = pack) -> Tensor:
                infer(packed, x.data_ptr(), address, rows, threads)
                return y

            return run

        return [call(layer) for layer in layers]

    return make


def _quantised(precision: Quantization) -> Make:
    """The module with quantised weights; its parameters are those of the fp32 module."""
    return lambda layers, rows: [copy.copy(layer).quantize(precision) for layer in layers]


def _in_chunks(call: Callable[[Tensor], Tensor], rows: int) -> Call:
    return lambda x: call(x) if len(x) <= rows else torch.cat([call(part) for part in x.split(rows)])


def gather_bmm(layers: Sequence[fastff.FFF], rows: int) -> list[Call]:
    """The published "high-level simulation" of conditional multiplication: gather the path's weights, then bmm."""

    def call(layer: fastff.FFF) -> Call:
        c = layer.config
        gathered = 4 * c.trees * (c.leaf_in_rows * c.in_features + (c.active_neurons // c.trees) * c.out_features)
        run = lambda x: reference.forward(x, layer._weights(), config=c).y  # noqa: E731
        return _in_chunks(run, max(1, CHUNK_BYTES // gathered))

    return [call(layer) for layer in layers]


def masked_dense(layers: Sequence[fastff.FFF], rows: int) -> list[Call]:
    """All neurons, then a mask: how the published model computes its layer."""

    def call(layer: fastff.FFF) -> Call:
        c = layer.config
        run = lambda x: reference.forward_masked(x, layer._weights(), config=c).y  # noqa: E731
        return _in_chunks(run, max(1, CHUNK_BYTES // (4 * c.trees * c.in_rows)))

    return [call(layer) for layer in layers]


def _numpy(x: Tensor) -> Any:
    return x.numpy()


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16()


_ONNX: dict[str, Any] = {"inputs": _numpy, "output": torch.from_numpy}
_RUNTIME, _VINO = ("onnxruntime", "onnx"), ("openvino", "onnx")
_STATIC = (*_VINO, "onnxruntime")  # whose tool writes the quantised model
_FP32 = onnx_models.fp32
PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("torch eager", "torch", True, "fp32", modules, 0, trains=True),
        Provider(
            "torch.compile", "torch", True, "fp32", torch_compile, 0,
            per_rows=True, trains=True, missing=_no_compiler,
        ),
        Provider("torch packed", "torch", True, "fp32", torch_packed, 1, per_rows=True, missing=_no_mkl),
        Provider(
            "torch bf16", "torch", True, "bf16", torch_bf16, 0.75,
            inputs=_bf16, output=Tensor.float, per_rows=True, missing=_no_onednn,
        ),
        Provider("torch int8", "torch", True, "int8", torch_int8, 1.25),
        Provider("onnxruntime", "onnxruntime", True, "fp32", onnxruntime_calls(_FP32), 2, needs=_RUNTIME, **_ONNX),
        Provider(
            "onnxruntime int8", "onnxruntime", True, "int8", onnxruntime_calls(onnx_models.dynamic_int8), 1,
            needs=_RUNTIME, **_ONNX,
        ),
        Provider("openvino", "openvino", True, "fp32", openvino_calls(_FP32), 2, 1.5, needs=_VINO, **_ONNX),
        Provider(
            "openvino int8", "openvino", True, "int8", openvino_calls(onnx_models.static_int8), 1, 1.5,
            needs=_STATIC, **_ONNX,
        ),
        Provider("fastff", "fastff", False, "fp32", modules, 1, trains=True),
        Provider("fastff bf16", "fastff", False, "bf16", _quantised("bf16"), 0.8),
        Provider("fastff int8", "fastff", False, "int8", _quantised("int8"), 0.55),
        Provider("fastff C", "fastff", False, "fp32", _fastff_kernel(None), 1, per_rows=True),
        Provider("fastff C bf16", "fastff", False, "bf16", _fastff_kernel("bf16"), 0.8, per_rows=True),
        Provider("fastff C int8", "fastff", False, "int8", _fastff_kernel("int8"), 0.55, per_rows=True),
        Provider("torch gather+bmm", "torch", False, "fp32", gather_bmm, 0),
        Provider("torch masked", "torch", False, "fp32", masked_dense, 0),
    )
}  # fmt: skip
