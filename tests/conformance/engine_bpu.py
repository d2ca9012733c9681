"""The plain-integer oracle as an engine: it walks the integer graph and computes every operator in Python numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info
from qgraph.ir.stage import Stage
from tests.oracle.arithmetic import Counts
from tests.oracle.operators import call

STAGE = Stage.INTEGER
OVERFLOW = True
SUPPORTED: frozenset[str] | None = None
STORAGE = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}


def available() -> str | None:
    """The oracle needs nothing."""
    return None


def run(integer: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The value of every site of an integer graph."""
    values: dict[str, torch.Tensor] = {}

    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = integer_name(node.target)
        return call_node(integer, node, args, kwargs) if name is None else oracle(name, args, kwargs)

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and node.op != "get_attr":
            values[info(node).site] = value

    with torch.no_grad():
        evaluate(integer, inputs, {}, call=compute, observe=keep)
    return values


def oracle(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    """One operator; the result's dtype is the one its format, its table or its operand says."""
    arguments = [numbers(value) if isinstance(value, torch.Tensor) else value for value in args]
    result = call(name, arguments, options, Counts())
    flat = [result[()]] if result.ndim == 0 else list(result.reshape(-1))
    return torch.tensor(flat, dtype=_storage(name, args, options)).reshape(result.shape)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    array = np.empty(tuple(tensor.shape), dtype=object)
    array[...] = np.array(tensor.tolist(), dtype=object)
    return array


def _storage(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> torch.dtype:
    if name == "dequantize":
        return torch.float32
    if name == "lookup":
        return args[1].dtype  # type: ignore[no-any-return]
    return STORAGE[options["format"]] if "format" in options else args[0].dtype
