"""Models as OpenVINO IR: dense parts as OpenVINO quantises them, conditional layers as fastff's own operations.

A directory written here holds the IR (`openvino_model.xml` and `.bin`, weights included), the libraries with the
operations, the model's configuration and tokenizer, and `fastff_openvino.json`, which says what made it. Any OpenVINO
program reads it after `core.add_extension("DIR/libfastff_openvino.so")`; `read` does both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import fastff
from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS, GATES
from fastff.engine.conditional_layers import routing_weight
from fastff.engine.extension import NAME, extended_core, openvino_extension, openvino_version
from fastff.engine.facts import OPENVINO_FILE
from fastff.errors import CheckpointError
from fastff.io import read_json, replacing_folder, write_json
from fastff.layers import FFF
from fastff.models.carried_files import carry
from fastff.ops.native_conditional import WEIGHTS
from fastff.ops.native_router import GATES as ROUTER_GATES
from fastff.ops.native_router import KINDS

Weights = Literal["int8", "fp32"]
MODEL, RECORD = "openvino_model.xml", OPENVINO_FILE
CONDITIONAL = (FFF, ConditionalFeedforward)
OPERATIONS = ("FastffTrees", "FastffRouted")
CALIBRATION_TEXTS = (
    "The museum opens at nine and closes at half past five, except on Mondays.",
    "She asked whether the last train to the coast had already left.",
    "A function that returns nothing is still useful when it changes what it was given.",
    "Heat the oil, add the onions and stir until they are soft.",
    "Quarterly revenue rose by four percent while costs fell for the third year in a row.",
    "Why does the moon look larger when it is close to the horizon?",
    "The committee postponed its decision because two of its members disagreed about the budget and a third was ill.",
    "Thanks!",
)
_MAX_CALIBRATION_TOKENS = 128

# What stands for a conditional layer while a model is traced; the graph then gets the operation in its place.
torch.library.define("fastff::exported_layer", "(Tensor x, int layer, int out_features) -> Tensor")


def _placeholder(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], out_features)


torch.library.impl("fastff::exported_layer", "CompositeExplicitAutograd", _placeholder)


class _Exported(nn.Module):
    """Stands in a conditional layer's place. layer: its number among those of the model."""

    def __init__(self, layer: int, out_features: int) -> None:
        super().__init__()
        self.layer, self.out_features = layer, out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fastff.exported_layer(x, self.layer, self.out_features)
        return y


class _Output(nn.Module):
    """A Transformers model as a function from token ids and mask to one tensor."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], output: str) -> None:
        super().__init__()
        self.model, self.inputs, self.output = model, tuple(inputs), output

    def forward(self, *tensors: Tensor) -> Tensor:
        y: Tensor = self.model(**dict(zip(self.inputs, tensors, strict=True)))[self.output]
        return y


def check_weights(weights: str) -> None:
    """Raise ValueError for a name that is none."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights {weights!r} is not one of {', '.join(get_args(Weights))}")


def convert(
    module: nn.Module, example: Sequence[Tensor], names: Sequence[str], *, weights: Weights, samples: Any = None
) -> Any:
    """An openvino.Model of a module of positional tensors: dense parts in fp32 or int8 (NNCF's post-training
    quantisation, calibrated on `samples`, dicts of arrays by `names`), conditional layers in fp32 or int8.

    Raises CheckpointError for a router that is not fastff's, BackendUnavailable for OpenVINO or the extension.
    """
    check_weights(weights)
    extension = openvino_extension()
    import openvino as ov
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension))
    layers: list[nn.Module] = []

    def operation(node: Any) -> Any:
        layer = layers[int(node.get_values_from_const_input(1))]
        name, constants, attributes = _described(layer, weights)
        tensors = [ov.opset13.constant(t.detach().float().contiguous().numpy()).output(0) for t in constants]
        return factory.create(name, [node.get_input(0), *tensors], attributes).outputs()

    module = nn.Sequential(module) if isinstance(module, CONDITIONAL) else module  # a layer alone has no parent
    with _replaced(module, layers), torch.no_grad():
        model = ov.convert_model(
            module,
            example_input=tuple(example),
            extension=[ConversionExtension("fastff::exported_layer", operation)],
        )
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape([-1] * len(port.get_partial_shape())))
    model.validate_nodes_and_infer_types()
    return model if weights == "fp32" else _quantised(model, samples)


def _quantised(model: Any, samples: Any) -> Any:
    import nncf

    samples = list(samples)
    ignored = nncf.IgnoredScope(types=list(OPERATIONS), validate=False)
    options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(samples), "ignored_scope": ignored}
    return nncf.quantize(model, nncf.Dataset(samples), **options)


@contextmanager
def _replaced(module: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Within the context, placeholders stand for the conditional layers of `module`, which are put into `layers`."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, CONDITIONAL)
    ]
    for index, (parent, name, child) in enumerate(found):
        setattr(parent, name, _Exported(index, child.config.out_features))
        layers.append(child)
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def _described(layer: Any, weights: Weights) -> tuple[str, list[Tensor], dict[str, Any]]:
    """The operation of a layer: its name, its weights in the order of its inputs, its attributes."""
    if isinstance(layer, FFF) and layer.router is not None:
        layer = layer.joined()
    c = layer.config
    common = {
        "activation": ACTIVATIONS.index(c.activation),
        "weights": WEIGHTS[None if weights == "fp32" else weights],
        "b_in": layer.b_in is not None,
        "b_out": layer.b_out is not None,
    }
    first, last = [layer.w_in, layer.w_out], [b for b in (layer.b_in, layer.b_out) if b is not None]
    if isinstance(layer, FFF):
        gate = 0 if c.gate is None else 1 + GATES.index(c.gate)
        own = {"depth": c.depth, "trees": c.trees, "leaf_width": c.leaf_width, "node_output": c.node_output}
        return OPERATIONS[0], [*first, *last], {**common, **own, "gate": gate, "tau": c.tau}
    router = c.router
    if router is None:
        raise CheckpointError(
            f"a layer with the router {type(layer.router).__name__} cannot be exported: only fastff's"
        )
    balance = layer.router.balance
    own = {name: getattr(router, name) for name in ("trees", "candidates", "chosen", "depth", "tau")}
    own |= {"kind": KINDS.index(router.kind), "gate": ROUTER_GATES.index(router.gate)}
    own |= {"bias": layer.router.bias is not None, "balance": balance is not None}
    weight = routing_weight(layer, layer.router)
    routing = [t for t in (weight, layer.router.bias, balance) if t is not None]
    return OPERATIONS[1], [*first, *routing, *last], {**common, **own}


def export(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    output: str,
    weights: Weights,
    texts: Sequence[str] | None = None,
    source: str | None = None,
) -> None:
    """Write a Transformers model in evaluation mode to the directory `out`, replacing what is there.

    output: the field of the model's output that the IR returns: "last_hidden_state" or "logits". texts: what int8
    activations are calibrated on (default: a few plain sentences; without a tokenizer, random ids). source: the
    directory or hub model whose files of sentence-transformers are taken along.
    """
    import openvino as ov

    check_weights(weights)
    samples = list(_samples(model, tokenizer, texts or CALIBRATION_TEXTS))
    names = list(samples[0])
    example = tuple(torch.as_tensor(value) for value in samples[0].values())
    converted = convert(
        _Output(model, names, output).eval(), example, names, weights=weights, samples=(dict(s) for s in samples)
    )
    converted.outputs[0].get_tensor().set_names({output})
    extension = openvino_extension()
    with replacing_folder(out) as folder:
        ov.save_model(converted, folder / MODEL, compress_to_fp16=False)
        for library in extension.parent.iterdir():
            shutil.copyfile(library, folder / library.name)
        model.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        record = {"openvino": openvino_version(), "fastff": fastff.__version__, "weights": weights}
        if source is not None:
            carry(source, folder)
        write_json(folder / RECORD, {**record, "inputs": names, "output": output})


def _samples(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, _MAX_CALIBRATION_TOKENS)
    for index, text in enumerate(texts):
        if tokenizer is None:
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(model.config.vocab_size, (1, longest), generator=generator)
            yield {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        else:
            found = tokenizer([text], truncation=True, max_length=longest, return_tensors="np")
            yield {name: value.astype("int64") for name, value in found.items()}


def read(folder: str | Path, **properties: Any) -> Callable[..., Any]:
    """The model of a directory that `export` wrote, compiled for this CPU by the installed OpenVINO: called with token
    ids and mask as arrays, by name, it returns an array. properties: OpenVINO's, such as INFERENCE_NUM_THREADS=1.

    Raises FileError or CheckpointError for a directory that is none, BackendUnavailable for OpenVINO.
    """
    folder = Path(folder)
    record = read_json(folder / RECORD, needs={"inputs": list, "output": str}, remedy="export the model again")
    if not (folder / MODEL).is_file():
        raise CheckpointError(f"{folder} has {RECORD}, but no {MODEL}: export the model again")
    compiled = extended_core().compile_model(folder / MODEL, "CPU", properties)
    names = record["inputs"]

    def run(**tensors: Any) -> Any:
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the model's inputs are {', '.join(names)}: {', '.join(missing)} is missing")
        return compiled({name: tensors[name] for name in names})[0]

    return run


__all__ = ["MODEL", "NAME", "RECORD", "convert", "export", "read"]
