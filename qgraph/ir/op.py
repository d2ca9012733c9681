"""`Op`: what one canonical operator is, in one record that every part reads.

An entry says how users spell the operator, what its operands and options are, how it is quantized and which
lowering takes it to integers. `qgraph.ir.op_table` holds the entries; `define` adds one from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from qgraph.errors import UserError, did_you_mean

Function = Callable[..., object]


class OpKind(str, Enum):
    """What an operator does to numbers; cost models, colours and reports group by it."""

    INPUT = "input"
    OUTPUT = "output"
    CONSTANT = "constant"
    MATMUL = "matmul"
    ARITHMETIC = "arithmetic"
    TABLE = "table"
    SELECT = "select"
    MOVE = "move"
    REDUCE = "reduce"
    SAMPLE = "sample"
    COMPOSITE = "composite"
    STUB = "stub"
    STRUCTURE = "structure"
    OPAQUE = "opaque"

    def __str__(self) -> str:
        return self.value


class QuantRule(str, Enum):
    """Where an operator's result gets its scale from."""

    OWN = "own"
    """The result is rounded to a scale of its own: the operator's call is a site."""
    SAME = "same"
    """The result holds codes of the first operand, moved or selected: no rounding, no site."""
    PLAIN = "plain"
    """The operator reads codes, and its result is none: a mask of truth values, or indices."""
    FLOAT = "float"
    """The operator has no integer form."""

    def __str__(self) -> str:
        return self.value


class ShapeRule(str, Enum):
    """How a result's shape follows from the operands'."""

    SAME = "same"
    """Shape and dtype of the first operand, whatever the options."""
    BROADCAST = "broadcast"
    """The operands broadcast against each other."""
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to write an operator.

    Args:
        names: the spelling's parameters in order, under the operator's names; a function of the positional arguments
            where it has overloads; None to use the operator's own.
        packed: the parameter that may take all remaining positional arguments, as in `x.permute(0, 2, 1)`.
        fixed: options this spelling implies unless they are given, such as `dim0=0` of `x.t()`.
        ignored: parameters of the spelling without a meaning for the result (`inplace`, `_stacklevel`).
        renamed: keywords of the spelling that differ from the operator's, such as `axis0` for `dim0`.
        swapped: whether the spelling takes the first two operands in the other order (`__rsub__`).
        unless: recognizes calls that mean something else by their arguments, such as `x.view(torch.int32)`.
    """

    names: tuple[str, ...] | Callable[[tuple[Any, ...]], tuple[str, ...]] | None = None
    packed: str | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    swapped: bool = False
    unless: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Fixed:
    """An option that every module of a class has, such as the mode of a reflecting pad."""

    value: object


@dataclass(frozen=True, eq=False)
class Op:
    """One canonical operator. Compared and hashed by identity; named once in the process.

    Args:
        name: canonical name, as printed.
        kind: what it does to numbers.
        signature: its parameters with defaults; those in `operands` are values of the graph.
        operands: parameters that take tensors, in order.
        target: the function a canonical graph calls; None for operators that stay modules.
        functions: further functions that mean this operator, with their spelling where it differs.
        methods: tensor methods that mean it.
        in_place: methods or functions that mean it and write to their first operand.
        modules: module classes that mean it, each with the attributes that hold options under another name, or
            their fixed values.
        parameters: operands held by the module as parameters or buffers.
        plain: operands that are no codes: masks of truth values and indices, which pass as they are.
        called_with: what a call of the module takes, in order; None for the operands that are no `parameters`.
        quant: where the result gets its scale from; a function of the arguments where it depends on options.
        lowering: name of the lowering that takes it to integers; None for none.
        positions: operands that say where another operand is read; what computes them needs 16 bits.
        refusal: why the operator has no integer form, where that is more than a gap.
        decomposition: name of the decomposition into simpler operators; None for none.
        scalar_function: for tables: the float64 function of the value and the options.
        commutative: whether the first two operands may be swapped.
        shape: how the result's shape follows from the operands', where that is simple.
        canonical: options in their one form, from all values, where users write the same thing in several ways.
    """

    name: str
    kind: OpKind
    signature: inspect.Signature
    operands: tuple[str, ...] = ()
    target: Function | None = None
    functions: Mapping[Function, Spelling] = field(default_factory=dict)
    methods: Mapping[str, Spelling] = field(default_factory=dict)
    in_place: Mapping[Function | str, Spelling] = field(default_factory=dict)
    modules: Mapping[type[nn.Module], Mapping[str, str | Fixed]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    called_with: tuple[str, ...] | None = None
    quant: QuantRule | Callable[[Mapping[str, Any]], QuantRule] = QuantRule.FLOAT
    lowering: str | None = None
    positions: tuple[str, ...] = ()
    refusal: str | None = None
    decomposition: str | None = None
    scalar_function: Callable[..., torch.Tensor] | None = None
    commutative: bool = False
    shape: ShapeRule = ShapeRule.OTHER
    canonical: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __deepcopy__(self, memo: dict[int, object]) -> Op:
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """Parameters that are not operands."""
        return tuple(name for name in self.signature.parameters if name not in self.operands)

    def default(self, name: str) -> Any:
        """Default of an option; `inspect.Parameter.empty` if it must be given."""
        return self.signature.parameters[name].default


def _check_fields(op: Op) -> None:
    """Refuses an entry whose fields contradict each other or have the wrong type."""
    if not isinstance(op.signature, inspect.Signature):
        raise UserError(
            f"the signature of the operator {op.name!r} is {op.signature!r}",
            fix="give inspect.signature(lambda input: None), with the operator's parameters",
        )
    for field_name in ("functions", "methods", "in_place", "modules"):
        if not isinstance(getattr(op, field_name), Mapping):
            raise UserError(
                f"{field_name} of the operator {op.name!r} is a {type(getattr(op, field_name)).__name__}",
                fix="give a dictionary, such as modules={nn.Mish: {}} or functions={torch.sinc: Spelling()}",
            )
    if op.lowering is None or op.kind is OpKind.STUB:  # what leaves the integers is lowered to real numbers
        return
    if op.quant is QuantRule.FLOAT:
        raise UserError(
            f"the operator {op.name!r} has a lowering, and quant says that it has no integer form",
            fix="say where its result gets its scale from, such as quant=QuantRule.OWN",
        )
    if not op.operands:
        raise UserError(
            f"the operator {op.name!r} has a lowering and no operands",
            fix='name the parameters that are values of the graph, such as operands=("input",)',
        )


class OpTable:
    """All known operators, found by name or by any spelling."""

    def __init__(self) -> None:
        self._by_name: dict[str, Op] = {}
        self._functions: dict[Function, tuple[Op, Spelling, bool]] = {}
        self._methods: dict[str, tuple[Op, Spelling, bool]] = {}
        self._modules: dict[type[nn.Module], Op] = {}

    def define(self, op: Op) -> Op:
        """Adds an operator.

        Raises:
            UserError: its name or one of its spellings is taken, a field has the wrong type, an operand is no parameter
                of its signature, or it has a lowering and no operand or no rule for its scale.
        """
        _check_fields(op)
        for operand in op.operands:
            if operand not in op.signature.parameters:
                raise UserError(
                    f"the operator {op.name!r} has no parameter {operand!r}",
                    why=f"its signature has {', '.join(op.signature.parameters) or 'none'}",
                    fix="name operands as the signature does",
                )
        if not set(op.plain) <= set(op.operands):
            raise UserError(
                f"{', '.join(set(op.plain) - set(op.operands))} of the operator {op.name!r} is plain and no operand",
                fix="name masks and indices among its operands too",
            )
        if op.name in self._by_name:
            raise UserError(f"an operator named {op.name!r} is defined already", fix="choose another name")
        functions = {**op.functions}
        if op.target is not None:
            functions.setdefault(op.target, Spelling())
        for function, spelling in functions.items():
            self._add(self._functions, function, (op, spelling, False))
        for method, spelling in op.methods.items():
            self._add(self._methods, method, (op, spelling, False))
        for target, spelling in op.in_place.items():
            if isinstance(target, str):
                self._add(self._methods, target, (op, spelling, True))
            else:
                self._add(self._functions, target, (op, spelling, True))
        for module in op.modules:
            self._add(self._modules, module, op)
        self._by_name[op.name] = op
        return op

    def add_module(self, op: Op, module: type[nn.Module]) -> None:
        """One more module class that means `op`, for classes the table's own module cannot import.

        Raises:
            UserError: it means another already.
        """
        self._add(self._modules, module, op)

    def _add(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        if key in table:
            owner = table[key] if isinstance(table[key], Op) else table[key][0]
            raise UserError(f"the spelling {key!r} means {owner.name!r} already")
        table[key] = value

    def named(self, name: str) -> Op:
        """The operator called `name`.

        Raises:
            UserError: there is none.
        """
        if name not in self._by_name:
            raise UserError(f"no operator is named {name!r}", fix=did_you_mean(name, self._by_name))
        return self._by_name[name]

    def function(self, target: object) -> tuple[Op, Spelling, bool] | None:
        """Operator, spelling and whether it writes in place, of a function; None if unknown."""
        try:
            return self._functions.get(target)  # type: ignore[call-overload,no-any-return]
        except TypeError:  # unhashable callables are no known function
            return None

    def method(self, name: str) -> tuple[Op, Spelling, bool] | None:
        """Operator, spelling and whether it writes in place, of a tensor method; None if unknown."""
        return self._methods.get(name)

    def module(self, cls: type[nn.Module]) -> Op | None:
        """Operator of exactly this module class; subclasses may compute anything and are not matched."""
        return self._modules.get(cls)

    def __iter__(self) -> Iterator[Op]:
        return iter(self._by_name.values())
