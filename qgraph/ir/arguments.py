"""Reading a node's arguments by the operator's own parameter names, whatever spelling the node uses.

    bound = bind(node)
    bound.operand("input"), bound.option("dim"), bound.module

A canonical node keeps operands positional and gives only options that differ from their default by keyword.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qgraph.errors import InternalError, VerifyError
from qgraph.ir.node_info import info, module_of, submodule_at, where
from qgraph.ir.op import Fixed, Op, QuantRule, Spelling
from qgraph.ir.op_table import CONSTANT, FIELD, INPUT, ITEM, OPAQUE, OPS, OUTPUT, SLICE

# torch takes numpy's names for its own in every function that has them.
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_STRUCTURAL = {"placeholder": INPUT, "get_attr": CONSTANT, "output": OUTPUT}


@dataclass(frozen=True, eq=False)
class Bound:
    """Arguments of one node under the operator's parameter names.

    Args:
        op: the canonical operator.
        values: every parameter that has a value, defaults included; operands are nodes, tuples of nodes or numbers.
        in_place: whether the spelling writes to the first operand.
        module: the module of a `call_module` node; its tensors are not in `values`.
    """

    op: Op
    values: dict[str, Any]
    in_place: bool = False
    module: nn.Module | None = None

    def operand(self, name: str) -> Any:
        """A node, a tuple of nodes, a number, or None where the operand is absent."""
        return self.values.get(name)

    def option(self, name: str) -> Any:
        """The value of an option.

        Raises:
            InternalError: the operator has no such option.
        """
        if name not in self.values:
            raise InternalError(f"operator {self.op} has no option {name!r}")
        return self.values[name]

    def options(self) -> dict[str, Any]:
        """Options that differ from the operator's defaults."""
        return {
            name: self.values[name]
            for name in self.op.options
            if name in self.values and not _same(self.values[name], self.op.default(name))
        }

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Operand name and node, for every operand that is a node."""
        for name in self.op.operands:
            value = self.values.get(name)
            for entry in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(entry, fx.Node):
                    yield name, entry


def classify(
    kind: str,
    target: Any,
    root: nn.Module | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Op:
    """The canonical operator a node means; `OPAQUE` if the table does not know it.

    Args:
        kind: fx's kind of node, such as `call_module`.
        target: the node's target.
        root: the module that holds the target of a `call_module` node.
        args, kwargs: the call's arguments as values, where the spelling alone does not tell.
    """
    if kind in _STRUCTURAL:
        return _STRUCTURAL[kind]
    if kind == "call_module":
        module = None if root is None else submodule_at(root, str(target))
        op = None if module is None else OPS.module(type(module)) or _stub_like(module)
        return op or OPAQUE
    if target is getattr:
        return FIELD
    found = OPS.function(target) if kind == "call_function" else OPS.method(str(target))
    if found is None or (found[1].unless is not None and found[1].unless(args, kwargs or {})):
        return OPAQUE
    indexes_tuple = bool(args) and isinstance(args[0], (tuple, list, dict)) and not isinstance(args[0], torch.Size)
    return ITEM if found[0] is SLICE and indexes_tuple else found[0]


def writes_in_place(kind: str, target: Any) -> bool:
    """Whether this spelling of a function or method writes to its first operand."""
    found = OPS.function(target) if kind == "call_function" else OPS.method(str(target))
    return kind in ("call_function", "call_method") and found is not None and found[2]


def _stub_like(module: nn.Module) -> Op | None:
    """Stubs of torch's own quantization package, recognized by name so that it need not be imported."""
    kind = type(module)
    if kind.__module__.startswith("torch.ao.quantization") and kind.__name__ in ("QuantStub", "DeQuantStub"):
        return OPS.named("quant_stub" if kind.__name__ == "QuantStub" else "dequant_stub")
    return None


def bind(node: fx.Node) -> Bound:
    """The node's arguments under its operator's parameter names.

    Raises:
        VerifyError: the arguments do not fit the operator's signature.
    """
    op = info(node).op
    if node.op == "call_module":
        return _bind_module(node, op)
    if op.target is None and not op.functions and not op.methods:
        return Bound(op, {})
    spelling, in_place = _spelling(node, op)
    names = spelling.names(node.args) if callable(spelling.names) else spelling.names
    names = names or tuple(op.signature.parameters)
    args = _packed(list(node.args), names, spelling)
    if len(args) > len(names):
        raise VerifyError(f"{op} takes {len(names)} arguments, got {len(args)}", where=where(node))
    named = {_own_name(name, op, spelling): value for name, value in node.kwargs.items()}
    given = dict(spelling.fixed) | dict(zip(names, args, strict=False)) | named
    given = {name: value for name, value in given.items() if name not in spelling.ignored}
    if spelling.swapped:
        first, second = op.operands[:2]
        given[first], given[second] = given.get(second), given.get(first)
    return Bound(op, _complete(node, op, given), in_place)


def _own_name(keyword: str, op: Op, spelling: Spelling) -> str:
    """The operator's name of a keyword argument."""
    if keyword in op.signature.parameters or keyword in spelling.ignored:
        return keyword
    return spelling.renamed.get(keyword) or _NUMPY_NAMES.get(keyword, keyword)


def _spelling(node: fx.Node, op: Op) -> tuple[Spelling, bool]:
    found = OPS.method(str(node.target)) if node.op == "call_method" else OPS.function(node.target)
    if found is None or found[0] is not op:
        # An operator the node was told to be, such as `item` for an indexed tuple: its own parameters apply.
        return Spelling(), False
    return found[1], found[2]


def _packed(args: list[Any], names: tuple[str, ...], spelling: Spelling) -> list[Any]:
    if spelling.packed is None:
        return args
    position = names.index(spelling.packed)
    rest = args[position:]
    if not rest or (len(rest) == 1 and isinstance(rest[0], (list, tuple))):
        return args
    return [*args[:position], tuple(rest)]


def _complete(node: fx.Node, op: Op, given: dict[str, Any]) -> dict[str, Any]:
    parameters = op.signature.parameters
    unknown = [name for name in given if name not in parameters]
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in given and parameter.default is inspect.Parameter.empty
    ]
    if unknown or missing:
        problem = f"unknown argument {unknown}" if unknown else f"missing argument {missing}"
        raise VerifyError(f"{op}: {problem}", where=where(node), why=node.format_node() or "")
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in given}
    return {**given, **defaults}


def _bind_module(node: fx.Node, op: Op) -> Bound:
    module = module_of(node)
    inputs = op.called_with or tuple(name for name in op.operands if name not in op.parameters)
    if len(node.args) > len(inputs) and inputs:
        raise VerifyError(f"{op} as a module takes {len(inputs)} arguments, got {len(node.args)}", where=where(node))
    values = dict(zip(inputs, node.args, strict=False)) | dict(node.kwargs)
    renamed = op.modules.get(type(module), {})
    for name in op.options:
        if name in inputs and name in values:
            continue
        attribute = renamed.get(name, name)
        default = op.default(name)
        value: Any = attribute.value if isinstance(attribute, Fixed) else getattr(module, attribute, default)
        if value is not inspect.Parameter.empty:
            values[name] = value
    for name in inputs:
        if name in op.operands:
            values.setdefault(name, None)
    return Bound(op, values, module=module)


def quant_rule(node: fx.Node) -> QuantRule:
    """Where this call's result gets its scale from."""
    rule = info(node).op.quant
    return rule if isinstance(rule, QuantRule) else rule(bind(node).values)


def coded_operands(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """Name and node of the operands that hold codes in an integer graph: all but masks and indices."""
    bound = bind(node)
    return [(name, value) for name, value in bound.nodes() if name not in bound.op.plain]


def weight_of(node: fx.Node) -> torch.Tensor | None:
    """The weight tensor of a convolution or linear module node; None for functional spellings."""
    if node.op != "call_module":
        return None
    weight = getattr(module_of(node), "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _same(value: object, default: object) -> bool:
    if value is default:
        return True
    if isinstance(value, (tuple, list)) and isinstance(default, int):  # (1, 1) is the option's scalar 1
        return all(entry == default and isinstance(entry, int) for entry in value)
    return type(value) is type(default) and bool(value == default)
