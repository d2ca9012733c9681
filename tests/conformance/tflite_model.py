"""TFLite models from lists of tensors and operators, run on LiteRT's reference kernels.

The flatbuffer is written with the schema module inside ai-edge-litert, so no TensorFlow is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_ENUMS = {"padding": "Padding", "fusedActivationFunction": "ActivationFunctionType"}
# Operators whose table of options is not named after them; "NONE" have none.
_OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "PADV2": "PadV2Options",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MEAN": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    **dict.fromkeys(("RELU", "RELU6", "LOGISTIC", "TANH", "PRELU", "ELU", "LOG", "RSQRT", "SQRT"), "NONE"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor. `data` makes it a constant; scales may be one per slice of `axis`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: np.ndarray | None = None
    zero: int = 0
    axis: int = 0
    data: np.ndarray | None = None


@dataclass(frozen=True)
class Op:
    """One operator: its builtin name, tensor names, and fields of its options, enumerations by name."""

    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def build(tensors: Sequence[Tensor], ops: Sequence[Op], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The flatbuffer of a model with one subgraph.

    Raises:
        KeyError: a tensor or an option does not exist.
    """
    number = {tensor.name: position for position, tensor in enumerate(tensors)}
    assert len(number) == len(tensors), "names of tensors must be unique"
    schema = _schema()
    model = schema.ModelT()
    model.version = 3
    model.buffers = [schema.BufferT()]  # buffer 0 is the empty one by convention
    model.operatorCodes = []
    graph = schema.SubGraphT()
    graph.tensors = [_tensor(tensor, model.buffers) for tensor in tensors]
    graph.operators = [_operator(op, number, model.operatorCodes) for op in ops]
    graph.inputs = [number[name] for name in inputs]
    graph.outputs = [number[name] for name in outputs]
    model.subgraphs = [graph]
    builder = importlib.import_module("flatbuffers").Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def run(model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor of the model by name after one invocation of the reference kernels, without delegates."""
    litert = importlib.import_module("ai_edge_litert.interpreter")
    made = litert.Interpreter(
        model_content=model,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
        num_threads=1,
    )
    made.allocate_tensors()
    for detail in made.get_input_details():
        made.set_tensor(detail["index"], feeds[detail["name"]])
    made.invoke()
    return {detail["name"]: made.get_tensor(detail["index"]) for detail in made.get_tensor_details()}


def _schema() -> Any:
    return importlib.import_module("ai_edge_litert.schema_py_generated")  # imported late: the package is optional


def _tensor(tensor: Tensor, buffers: list[Any]) -> Any:
    schema = _schema()
    made = schema.TensorT()
    made.name = tensor.name
    made.shape = np.array(tensor.shape, np.int32)
    made.type = getattr(schema.TensorType, tensor.dtype.upper())
    made.buffer = 0
    made.hasRank = True
    if tensor.data is not None:
        assert (tensor.data.shape, tensor.data.dtype.name) == (tuple(tensor.shape), tensor.dtype), tensor.name
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(tensor.data).tobytes(), np.uint8)
        made.buffer = len(buffers)
        buffers.append(buffer)
    if tensor.scale is not None:
        scale = np.atleast_1d(np.asarray(tensor.scale, np.float32))
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale = scale
        made.quantization.zeroPoint = np.full(scale.shape, tensor.zero, np.int64)
        made.quantization.quantizedDimension = tensor.axis
    return made


def _operator(op: Op, number: Mapping[str, int], codes: list[Any]) -> Any:
    schema = _schema()
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, op.code)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = 1
    made = schema.OperatorT()
    made.opcodeIndex = len(codes)
    codes.append(code)
    made.inputs = [number[name] for name in op.inputs]
    made.outputs = [number[name] for name in op.outputs]
    table = _OPTIONS.get(op.code) or op.code.title().replace("_", "") + "Options"
    made.builtinOptionsType = getattr(schema.BuiltinOptions, table)
    if table == "NONE":
        assert not op.options, f"{op.code} has no options"
        return made
    made.builtinOptions = getattr(schema, table + "T")()
    for name, value in op.options.items():
        if not hasattr(made.builtinOptions, name):
            raise KeyError(f"{table} has no field {name!r}; it has {sorted(vars(made.builtinOptions))}")
        setattr(
            made.builtinOptions,
            name,
            getattr(getattr(schema, _ENUMS[name]), value) if isinstance(value, str) else value,
        )
    return made
