"""What a translator of one call sees: its operands as names of ONNX values, and ways to add nodes.

A translator is a function `Call -> name`, or `-> list of names` for calls with several results. The same translator
serves real numbers and, for operators that only move or select, codes: `call.read` gives the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import fx

from qgraph.errors import UserError
from qgraph.export.writer import MAIN, Dims, OnnxWriter
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.node_info import info, where
from qgraph.ir.values import TensorSpec
from qgraph.numerics import QParams

if TYPE_CHECKING:
    from qgraph.export.walk import Walk

Result: TypeAlias = "str | list[str]"
Translator: TypeAlias = "Callable[[Call], Result]"
FLOAT: dict[str, Translator] = {}
"""Translators on real numbers by operator; those in `MOVES` serve codes too."""
MOVES: set[str] = set()
_Translator = TypeVar("_Translator", bound="Callable[[Call], str | list[str]]")


def translates(*names: str, moves: bool = False) -> Callable[[_Translator], _Translator]:
    """Registers a translator for operators."""

    def register(function: _Translator) -> _Translator:
        FLOAT.update(dict.fromkeys(names, function))
        MOVES.update(names if moves else ())
        return function

    return register


@dataclass
class Value:
    """One tensor (or number) of the graph on its way to ONNX.

    Args:
        site: where it was computed.
        dtype: of the real value.
        dims: sizes; None where the size depends on the batch.
        real: name of the real value; None until somebody asks for it.
        codes: name of its codes, if it is quantized.
        qparams: what the codes mean.
        number: whether it is a number, a 0-d int64 tensor in ONNX.
    """

    site: str
    dtype: torch.dtype
    dims: Dims
    real: str | None = None
    codes: str | None = None
    qparams: QParams | None = None
    number: bool = False


@dataclass
class Call:
    """One call of the graph.

    Args:
        node: the call.
        walk: the export it is part of.
        on_codes: whether its operands are read as codes.
        late: an activation to apply on the codes' grid, behind the rounding.
        then: a move to apply to the result, codes or reals.
    """

    node: fx.Node
    walk: Walk
    on_codes: bool = False
    late: Callable[[str], str] | None = None
    then: Callable[[str], str] | None = None
    bound: Bound = field(init=False)

    def __post_init__(self) -> None:
        self.bound = bind(self.node)

    @property
    def writer(self) -> OnnxWriter:
        """The model in the making."""
        return self.walk.writer

    @property
    def site(self) -> str:
        """The call's site."""
        return info(self.node).site

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.writer.opset

    def option(self, name: str) -> Any:
        """A plain option of the call.

        Raises:
            UserError: it is computed in the forward.
        """
        value = self.bound.option(name)
        if any(isinstance(v, fx.Node) for v in (value if isinstance(value, (tuple, list)) else (value,))):
            raise self.unsupported(f"its {name} is computed in the forward")
        return value

    def value(self, name: str) -> Value:
        """A computed operand."""
        return self.value_of(self.bound.operand(name))

    def value_of(self, node: Any) -> Value:
        """The value of a node among the operands.

        Raises:
            UserError: it is no tensor.
        """
        found = self.walk.values.get(node)
        if not isinstance(found, Value):
            raise self.unsupported("an operand is no tensor")
        return found

    def dims(self, name: str = "") -> Dims:
        """Sizes of an operand, or of the result."""
        return self.value(name).dims if name else self.walk.dims_of(self.node)

    def rank(self, name: str = "input") -> int:
        """Number of dimensions of an operand."""
        return len(self.dims(name))

    def axis(self, option: str = "dim", name: str = "input", extra: int = 0) -> int:
        """An option that names a dimension, not negative."""
        return int(self.option(option)) % (self.rank(name) + extra)

    def read(self, name: str) -> str:
        """The ONNX name of an operand: its codes if this call runs on codes, else its real value."""
        return self.read_of(self.bound.operand(name), name)

    def read_of(self, operand: Any, role: str) -> str:
        """As `read`, of any argument; numbers become constants of the call's dtype."""
        if not isinstance(operand, fx.Node):
            if not isinstance(operand, (int, float)):
                raise self.unsupported(f"its operand {role} is {operand!r}")
            return self.constant(role, torch.tensor(operand, dtype=self.number_dtype()))
        value = self.value_of(operand)
        if value.number and self.number_dtype().is_floating_point:
            return self.emit("Cast", self.walk.real(value), to=self.writer.element_type(torch.float32))
        return self.walk.codes(value) if self.on_codes else self.walk.real(value)

    def number_dtype(self) -> torch.dtype:
        """Dtype in which numbers among the operands take part: that of the first tensor."""
        for _, node in self.bound.nodes():
            value = self.walk.values.get(node)
            if isinstance(value, Value) and not value.number:
                return value.dtype
        return torch.float32

    def emit(self, kind: str, *inputs: str, results: int = 1, domain: str = MAIN, **attributes: Any) -> str:
        """Adds a node with one result and gives its name."""
        return self.emit_many(kind, *inputs, results=results, domain=domain, **attributes)[0]

    def emit_many(self, kind: str, *inputs: str, results: int, domain: str = MAIN, **attributes: Any) -> list[str]:
        """Adds a node with several results."""
        names = [f"{self.site}.{kind.lower()}" for _ in range(results)]
        return self.writer.emit(kind, inputs, names, domain=domain, note=self.walk.note(self.node), **attributes)

    def constant(self, role: str, tensor: torch.Tensor) -> str:
        """An initializer of this call."""
        return self.writer.constant(f"{self.site}.{role}", tensor)

    def integers(self, role: str, values: Sequence[Any]) -> str:
        """A vector of integers, some of which may be numbers computed in the graph."""
        if not any(isinstance(value, fx.Node) for value in values):
            return self.constant(role, torch.tensor([int(value) for value in values], dtype=torch.int64))
        parts = []
        for position, value in enumerate(values):
            if isinstance(value, fx.Node):
                axes = self.constant("axes_of_number", torch.tensor([0]))
                parts.append(self.emit("Unsqueeze", self.walk.real(self.value_of(value)), axes))
            else:
                parts.append(self.constant(f"{role}{position}", torch.tensor([int(value)], dtype=torch.int64)))
        return self.emit("Concat", *parts, axis=0)

    def reduced(self, kind: str, value: str, axes: Sequence[int], *, keep: bool, axes_input: int) -> str:
        """A reduction; its axes are an input from opset `axes_input` on, an attribute before."""
        if self.opset >= axes_input:
            return self.emit(kind, value, self.integers("axes", axes), keepdims=int(keep))
        return self.emit(kind, value, axes=list(axes), keepdims=int(keep))

    def unsupported(self, why: str) -> UserError:
        """The error for a call without an ONNX form."""
        record = info(self.node)
        module = f", module {record.module}" if record.module else ""
        return UserError(
            f"{record.op} cannot be exported to ONNX",
            where=f"{where(self.node)}{module}",
            why=why,
            fix="write the model without it, or export the part of the model before it",
        )


def spec_dtype(node: fx.Node) -> torch.dtype:
    """Dtype of a node's value; int64 of a number."""
    spec = info(node).value
    return spec.dtype if isinstance(spec, TensorSpec) else torch.int64
