"""A target: what a device can compute, and exactly how, as data.

Invariants:
- nothing outside the target's file decides formats, rounding, accumulator width or table sizes;
- an operator the file does not name cannot run on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from qgraph.errors import TargetError, did_you_mean
from qgraph.numerics import Arithmetic, Format, QType, QuantizeRule, Scheme, SegmentForm, TwoTables

RECIPROCAL_FACTORS = "float32_reciprocal"
PRODUCT_FACTORS = "float32_product"
FACTORS = ("float32", "float64", RECIPROCAL_FACTORS, PRODUCT_FACTORS)
OPTIONAL = ("groups", "dilation")

TableForm: TypeAlias = int | SegmentForm | TwoTables | None


@dataclass(frozen=True)
class LegalFormats:
    """One line of legal formats: alternatives for each operand, and for the result."""

    operands: tuple[tuple[Format, ...], ...]
    results: tuple[Format, ...]

    def accepts(self, operands: Iterable[Format], result: Format) -> bool:
        """Whether this line allows a combination; further operands follow the last alternative."""
        given = tuple(operands)
        columns = [self.operands[min(i, len(self.operands) - 1)] for i in range(len(given))]
        return result in self.results and all(f in column for f, column in zip(given, columns, strict=True))

    def __str__(self) -> str:
        columns = ["|".join(map(str, column)) for column in (*self.operands, self.results)]
        return f"{', '.join(columns[:-1])} -> {columns[-1]}"


@dataclass(frozen=True)
class OpRule:
    """What a target says of one operator.

    Args:
        unit: the part of the device that runs it.
        legal: legal combinations of formats.
        same_scale: whether the result has scale, zero point and format of the first operand.
        fixed_result: result format to the scale and zero point the device always gives it.
        global_only: an average runs only over all of a channel's positions, with one result each.
        numbers: whether an operand may be a number instead of codes.
        without: options of the operator that the device does not have, of `OPTIONAL`.
        tensorflow_padding: whether windows are padded as TensorFlow's SAME does, or not at all.
        factor_range: the factors the device rescales by: from the first (included) to the second.
    """

    unit: str
    legal: tuple[LegalFormats, ...]
    same_scale: bool = False
    fixed_result: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    global_only: bool = False
    numbers: bool = True
    without: tuple[str, ...] = ()
    tensorflow_padding: bool = False
    factor_range: tuple[float, float] | None = None

    def accepts(self, operands: Iterable[Format], result: Format) -> bool:
        """Whether a combination of operand formats and result format is legal."""
        given = tuple(operands)
        return any(line.accepts(given, result) for line in self.legal)


@dataclass(frozen=True)
class Functions:
    """How entries of function tables are made.

    Args:
        values: precision in which a function sees its input and computes.
        quantize: how its values become codes; None for the target's general rule.
        rescale: whether a change of scale, and any other function of one value and numbers, is a table too.
        own: functions of the engine itself by operator, called as the operator's `scalar_function` is.
        tables: whole tables by operator, one entry per code, from the parameters of operand and result, and options.
    """

    values: torch.dtype = torch.float64
    quantize: QuantizeRule | None = None
    rescale: bool = False
    own: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    tables: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """One level of a device's memory.

    Args:
        bytes: its size.
        bytes_per_cycle: its bandwidth.
    """

    bytes: float
    bytes_per_cycle: float


@dataclass(frozen=True)
class Target:
    """A device.

    Args:
        name: its name.
        description: one line for listings.
        eight_bits: the format that stands for 8 bits where the user named none.
        activations: format of a result to how its range becomes scale and zero point.
        weights: the same for weights.
        weight_per_channel: whether weights have a scale per output channel.
        bias: format of a bias.
        residual: whether a convolution or linear adds another value before it rescales.
        many_groups: a convolution of more groups takes the step `many_groups` instead of `product`; None if none does.
        quantize_rule: how real numbers become codes.
        bound_rule: how the bounds of clamps and activations become codes.
        factors: how scales become one factor: precision, and whether it divides; `op.factors` for single operators.
        tables: form of a function table by input format: None for one entry per code, a number of even intervals, or
            segments.
        functions: how entries of function tables are made.
        weight_bits: fractional bits of bilinear interpolation weights.
        integer_positions: whether positions of resizing are integers in units of these bits; else float32 as in torch.
        arithmetic: named steps and how they accumulate and rescale; `op.step` for a step of one operator,
            `step.format` and `op.step.format` for operands of one format.
        ops: operator name to its rule.
        units: unit to operand formats to work per cycle.
        memories: levels by name; `ddr` is the one every value passes.
        clock_hz: cycles per second.
    """

    name: str
    description: str
    eight_bits: QType
    activations: Mapping[str, Scheme]
    weights: Mapping[str, Scheme]
    weight_per_channel: bool
    bias: Format
    residual: bool
    many_groups: int | None
    quantize_rule: QuantizeRule
    bound_rule: QuantizeRule
    factors: Mapping[str, str]
    tables: Mapping[str, TableForm]
    weight_bits: int
    integer_positions: bool
    arithmetic: Mapping[str, Arithmetic]
    ops: Mapping[str, OpRule]
    units: Mapping[str, Mapping[str, float]]
    memories: Mapping[str, Memory]
    clock_hz: float
    functions: Functions = Functions()
    origin: str = field(default="", compare=False)

    @property
    def bytes_per_cycle(self) -> float:
        """Bandwidth of the memory every value passes."""
        return self.memories["ddr"].bytes_per_cycle

    def activation_scheme(self, qtype: QType) -> Scheme:
        """How a result's range becomes scale and zero point.

        Raises:
            TargetError: the target has no results in this format.
        """
        return self._scheme(self.activations, qtype, "result")

    def weight_scheme(self, qtype: QType) -> Scheme:
        """How a weight's range becomes a scale.

        Raises:
            TargetError: the target has no weights in this format.
        """
        return self._scheme(self.weights, qtype, "weight")

    def _scheme(self, schemes: Mapping[str, Scheme], qtype: QType, what: str) -> Scheme:
        if str(qtype) not in schemes:
            raise TargetError(
                f"target {self.name} has no {what} in {qtype}", where=self.origin, fix=f"use {', '.join(schemes)}"
            )
        return schemes[str(qtype)]

    def rule(self, op: str) -> OpRule | None:
        """What the target says of an operator; None if it cannot run it."""
        return self.ops.get(op)

    def step(self, name: str, op: str = "", source: QType | None = None) -> Arithmetic:
        """The arithmetic of a named step, of an operator and an operand's format where the target tells them apart.

        Raises:
            TargetError: the target does not define it.
        """
        for key in (f"{op}.{name}.{source}", f"{op}.{name}", f"{name}.{source}", name):
            if key in self.arithmetic:
                return self.arithmetic[key]
        if name == "rescale":
            return self.step("product", op, source)
        raise TargetError(
            f"target {self.name} defines no arithmetic for {name!r}",
            where=self.origin,
            fix=did_you_mean(name, self.arithmetic),
        )

    def factor(self, op: str, *scales: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`s1 * s2 * ... / s` for an operator, each step in the target's precision; float64.

        Args:
            op: the operator's name.
            scales: of the operands, and any further factors; float32 or float64, broadcastable.
            result: scale of the result, times any further divisors.
        """
        word = self.factors.get(f"{op}.factors", self.factors["factors"])
        dtype = torch.float64 if word == "float64" else torch.float32
        result = result.double() if word == PRODUCT_FACTORS else result
        total = scales[0].to(dtype)
        for scale in scales[1:]:
            total = total * scale.to(dtype)
        divisor = result if word == PRODUCT_FACTORS else result.to(dtype)
        return (total * (1.0 / divisor) if word == RECIPROCAL_FACTORS else total / divisor).double()

    def table_form(self, source: QType) -> TableForm:
        """Form of a function table for this input format, as in `tables`.

        Raises:
            TargetError: the target has no tables for the format.
        """
        if str(source) not in self.tables:
            raise TargetError(f"target {self.name} has no function tables for {source}", where=self.origin)
        return self.tables[str(source)]

    def nearest_legal(self, op: str, operands: Iterable[Format], result: Format) -> str:
        """The legal lines of an operator, those sharing most formats with the request first."""
        rule = self.rule(op)
        if rule is None:
            return f"{self.name} has no {op}"
        wanted = [*operands, result]

        def common(line: LegalFormats) -> int:
            columns = [*line.operands, line.results]
            return sum(f in column for f, column in zip(wanted, columns, strict=False))

        return "; ".join(str(line) for line in sorted(rule.legal, key=common, reverse=True)[:2])
