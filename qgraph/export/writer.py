"""Collects the parts of an ONNX model and writes the file: nodes, initializers, unique names.

Nothing here knows of quantization. The `onnx` package is imported when a model is written, not before.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qgraph.errors import InternalError, UserError

MAIN, MICROSOFT = "", "com.microsoft"
Dims = tuple["int | str | None", ...]


def onnx_package(module: str = "onnx") -> Any:
    """A module of the `onnx` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "ONNX files need the package onnx, which cannot be imported",
            why=f"{type(error).__name__}: {error}",
            fix='install it: pip install "qgraph-fx[onnx]"',
        ) from error


class OnnxWriter:
    """One ONNX graph in the making.

    Args:
        opset: version of the standard operators.
    """

    def __init__(self, opset: int) -> None:
        self.onnx = onnx_package()
        self.helper = onnx_package("onnx.helper")
        self.numpy_helper = onnx_package("onnx.numpy_helper")
        self.opset = opset
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.described: list[Any] = []
        self.initializers: dict[str, tuple[torch.Tensor, Any]] = {}
        self.uses_microsoft = False
        self._names: set[str] = set()

    def free(self, name: str) -> str:
        """`name`, with a number if it is taken; taken from now on."""
        found, count = name, 0
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._names.add(found)
        return found

    def emit(
        self,
        kind: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        *,
        domain: str = MAIN,
        note: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Adds a node; names of results are made free, empty names are inputs left out."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        results = [self.free(name) for name in outputs]
        options = {name: value for name, value in attributes.items() if value is not None}
        node = self.helper.make_node(kind, given, results, name=results[0], domain=domain or None, **options)
        node.doc_string = note
        self.nodes.append(node)
        self.uses_microsoft |= domain == MICROSOFT
        return results

    def constant(self, name: str, value: torch.Tensor) -> str:
        """An initializer; equal ones of one name are kept once."""
        tensor = value.detach().cpu().contiguous()
        known = self.initializers.get(name)
        if known is not None:
            if known[0].dtype == tensor.dtype and torch.equal(known[0], tensor):
                return name
            name = self.free(name)
        elif name in self._names:
            name = self.free(name)
        self._names.add(name)
        self.initializers[name] = (tensor, self.numpy_helper.from_array(tensor.numpy(), name))
        return name

    def input(self, name: str, dtype: torch.dtype, dims: Dims) -> str:
        """A graph input."""
        name = self.free(name)
        self.inputs.append(self.helper.make_tensor_value_info(name, self.element_type(dtype), list(dims)))
        return name

    def output(self, name: str, dtype: torch.dtype, dims: Dims) -> None:
        """Makes the value `name` a graph output."""
        self.outputs.append(self.helper.make_tensor_value_info(name, self.element_type(dtype), list(dims)))

    def describe(self, name: str, dtype: torch.dtype, dims: Dims) -> None:
        """States type and sizes of a value between, which onnx cannot infer behind operators that are not its own."""
        self.described.append(self.helper.make_tensor_value_info(name, self.element_type(dtype), list(dims)))

    def element_type(self, dtype: torch.dtype) -> int:
        """ONNX's number of a dtype.

        Raises:
            UserError: ONNX files of this exporter do not hold it.
        """
        names = {
            torch.float32: "FLOAT",
            torch.float64: "DOUBLE",
            torch.int8: "INT8",
            torch.uint8: "UINT8",
            torch.int16: "INT16",
            torch.int32: "INT32",
            torch.int64: "INT64",
            torch.bool: "BOOL",
        }
        if dtype not in names:
            raise UserError(f"values of {dtype} are not exported", fix=f"use {', '.join(map(str, names))}")
        return int(getattr(self.onnx.TensorProto, names[dtype]))

    def model(self, name: str, metadata: Mapping[str, str], producer: str) -> Any:
        """The finished model, checked, with the shapes onnx can infer.

        Raises:
            InternalError: onnx finds it malformed.
        """
        tensors = [proto for _, proto in self.initializers.values()]
        graph = self.helper.make_graph(self.nodes, name, self.inputs, self.outputs, tensors, value_info=self.described)
        main = self.helper.make_opsetid(MAIN, self.opset)
        opsets = [main, self.helper.make_opsetid(MICROSOFT, 1)] if self.uses_microsoft else [main]
        ir_version = self.helper.find_min_ir_version_for([main])
        model = self.helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name=producer)
        self.helper.set_model_props(model, dict(metadata))
        try:
            self.onnx.checker.check_model(model)
            return onnx_package("onnx.shape_inference").infer_shapes(model, check_type=True, data_prop=True)
        except Exception as error:  # onnx raises classes of its own, without a common base
            raise InternalError("onnx refuses the exported model", why=str(error)) from error


def save_atomically(data: bytes, path: Path) -> None:
    """Writes a file completely or not at all.

    Raises:
        UserError: it cannot be written; what stood there before is unchanged.
    """
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(
            f"{path} cannot be written",
            why=f"{type(error).__name__}: {error}",
            fix="give the path of a file in an existing folder that you may write to",
        ) from error
