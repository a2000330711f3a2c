"""Dense layers as ONNX models, in fp32 and int8, for the runtimes that read them."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastff.bench.timed_layers import DenseLayer

MOST_BYTES = 2**31  # of one ONNX model without external data
CALIBRATION_ROWS = 256


def fp32(layer: DenseLayer) -> bytes:
    """The layer as a model from x (rows, features) to y (rows, features)."""
    return bytes(_model(layer).SerializeToString())


def dynamic_int8(layer: DenseLayer) -> bytes:
    """ONNX Runtime's dynamic quantisation: int8 weights, activations quantised at every call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    return _converted(layer, lambda model, out: quantize_dynamic(model, out, weight_type=QuantType.QInt8))


def static_int8(layer: DenseLayer) -> bytes:
    """Quantise and dequantise nodes around each product, int8 weights a channel, calibrated on normal rows."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    rows = torch.randn(CALIBRATION_ROWS, layer.config.features).numpy()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": rows}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    def convert(model: Any, out: str) -> None:
        quantize_static(
            model,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )

    return _converted(layer, convert)


def _converted(layer: DenseLayer, convert: Callable[[Any, str], None]) -> bytes:
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)  # both tools advise a preparation that changes nothing in three nodes
        try:
            out = Path(folder) / "int8.onnx"
            convert(_model(layer), str(out))
        finally:
            root.setLevel(level)
        return out.read_bytes()


def _model(layer: DenseLayer) -> Any:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if layer.config.activation == "swiglu":
        middle = [
            helper.make_node("Split", ["scores"], ["gate", "value"], axis=-1, num_outputs=2),
            helper.make_node("Sigmoid", ["gate"], ["open"]),
            helper.make_node("Mul", ["gate", "open"], ["swish"]),
            helper.make_node("Mul", ["swish", "value"], ["hidden"]),
        ]
    else:
        middle = [helper.make_node("Gelu", ["scores"], ["hidden"])]
    nodes = [
        helper.make_node("MatMul", ["x", "w_in"], ["scores"]),
        *middle,
        helper.make_node("MatMul", ["hidden", "w_out"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(weight.detach().t().contiguous().numpy(), name)
        for name, weight in (("w_in", layer.up.weight), ("w_out", layer.down.weight))
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", layer.config.features]) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "dense", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return model
