"""Fast rescalings, sums and products of codes, borders and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qgraph.numerics import (
    RECIPROCAL,
    EngineSum,
    QType,
    RequantizeRule,
    Rounding,
    ScaleForm,
    ZeroPoint,
    lookup,
    parse_arithmetic,
    parse_qtype,
    parse_quantize_rule,
    qint8,
    qint16,
    quint8,
)
from qgraph.simulator.fast.finish import Finish
from qgraph.simulator.fast.layout import array_of, channels_last, dense, memory, shaped_as
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.pairs import prepare_engine_sum
from qgraph.simulator.fast.term import Term
from qgraph.simulator.kernel import Kernel, KernelCall, NoFastForm, Operand
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace


def _reach(operand: Operand, zero: int) -> int:
    return max(abs(operand.low - zero), abs(operand.high - zero))


def _constants(*values: Any) -> None:
    if any(isinstance(value, Operand) for value in values):
        raise NoFastForm("a factor is computed")


def _codes(operand: Any) -> Operand:
    if not isinstance(operand, Operand):
        raise NoFastForm("an operand is a constant")
    return operand


def _in_float(call: KernelCall) -> bool:
    """Whether the rule of a call rounds its terms to float32.

    Raises:
        NoFastForm: it is the word of an engine's sum.
    """
    rule = parse_arithmetic(call.options["arithmetic"]).rule
    if isinstance(rule, EngineSum):
        raise NoFastForm("an engine's own sum")
    return isinstance(rule, RequantizeRule) and rule.form is ScaleForm.FLOAT


def prepare_requantize(call: KernelCall) -> Kernel:
    """One value, with an offset or without; factors per tensor, along the last dimension, or any."""
    x, multiplier, shift, offset = call.args
    x, zero = _codes(x), call.options.get("x_zero", 0)
    _constants(multiplier, shift, offset)
    if x.dtype is torch.int32 and _in_float(call) and zero:
        raise NoFastForm("int32 codes with a zero point are rounded to float32 after it is subtracted")
    term = Term(multiplier, _reach(x, zero), zero)
    finish = Finish(call.options, [term], shift, offset, accumulates=offset is None)
    constants = [value for value in (multiplier, shift, offset) if value is not None]
    if all(value.numel() == 1 for value in constants):
        return _flat(finish, max(value.dim() for value in constants), len(x.shape))
    width = max(value.numel() for value in constants)
    if all(value.numel() in (1, value.shape[-1] if value.dim() else 1) for value in constants) and x.shape[-1:] == (
        width,
    ):
        rows = Finish(
            call.options,
            [Term(_row(multiplier), term.bound, zero)],
            None if shift is None else _row(shift),
            None if offset is None else _row(offset),
            accumulates=offset is None,
        )
        return lambda x, trace=None: rows.rows(x.reshape(-1, width), None, trace).view(x.shape)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        return finish.any(x, None, trace)

    return run


def _row(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1) if value.dim() else value


def _flat(finish: Finish, rank: int, own: int) -> Kernel:
    if rank > own:
        raise NoFastForm("a factor has more dimensions than the value")

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        full = dense(x)
        if not finish.compiles:
            return shaped_as(finish.flat(memory(full), None, trace), full)
        out = torch.empty_like(full, dtype=finish.storage)
        finish.write_flat(array_of(full), None, array_of(out), trace)
        return out

    return run


def prepare_add(call: KernelCall) -> Kernel:
    """Two values and one shift."""
    if isinstance(parse_arithmetic(call.options["arithmetic"]).rule, EngineSum):
        return prepare_engine_sum(call)
    x, y, multiplier_x, multiplier_y, shift = call.args[:5]
    if isinstance(y, torch.Tensor):
        return _with_constant(call, y)
    x, y = _codes(x), _codes(y)
    _constants(multiplier_x, multiplier_y, shift)
    zeros = call.options.get("x_zero", 0), call.options.get("y_zero", 0)
    if _in_float(call) and torch.int32 in (x.dtype, y.dtype) and any(zeros):
        raise NoFastForm("int32 codes with a zero point are rounded to float32 after it is subtracted")
    terms = [Term(multiplier_x, _reach(x, zeros[0]), zeros[0]), Term(multiplier_y, _reach(y, zeros[1]), zeros[1])]
    finish = Finish(call.options, terms, shift, accumulates=False)
    # float32 addition of two terms is commutative, so the operands may change places in every rule.
    swapped = Finish(call.options, terms[::-1], shift, accumulates=False)
    constants = [value for value in (multiplier_x, multiplier_y, shift) if value is not None]
    return _pairs(finish, swapped, all(value.dim() == 0 for value in constants))


def _with_constant(call: KernelCall, y: torch.Tensor) -> Kernel:
    """A sum whose second operand is a constant, as an operand of known bounds."""
    if not y.numel():
        raise NoFastForm("the constant is empty")
    known = Operand(y.dtype, tuple(y.shape), int(y.min()), int(y.max()), y.device)
    run = prepare_add(KernelCall(call.operator, (call.args[0], known, *call.args[2:]), call.options))
    return lambda x, trace=None: run(x, y, trace=trace)


def prepare_mul(call: KernelCall) -> Kernel:
    """The product of two values."""
    x, y, multiplier, shift = call.args
    x, y = _codes(x), _codes(y)
    _constants(multiplier, shift)
    if torch.int32 in (x.dtype, y.dtype):
        raise NoFastForm("an operand is int32")
    a = Term(multiplier, _reach(x, call.options.get("x_zero", 0)), call.options.get("x_zero", 0))
    b = Term(multiplier, _reach(y, call.options.get("y_zero", 0)), call.options.get("y_zero", 0))
    product = [Term(multiplier, a.bound * b.bound)]
    finish = Finish(call.options, product, shift, factors=(a, b))
    swapped = Finish(call.options, product, shift, factors=(b, a))
    return _pairs(finish, swapped, multiplier.dim() == 0 and (shift is None or shift.dim() == 0))


def _pairs(finish: Finish, swapped: Finish, one_factor: bool) -> Kernel:
    """Chooses by the shapes of a run: one memory, rows against a row or a column, or whatever broadcasts."""

    def run(x: torch.Tensor, y: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        if not one_factor:
            return finish.any(x, y, trace)
        if x.shape == y.shape:
            full = dense(x)
            other = dense(y)
            if full.stride() != other.stride():
                full, other = full.contiguous(), other.contiguous()
            if finish.compiles:
                out = torch.empty_like(full, dtype=finish.storage)
                finish.write_flat(array_of(full), array_of(other), array_of(out), trace)
                return out
            return shaped_as(finish.flat(memory(full), memory(other), trace), full)
        if y.numel() > x.numel():
            return _against_rows(swapped, y, x, trace)
        return _against_rows(finish, x, y, trace)

    return run


def _against_rows(finish: Finish, x: torch.Tensor, y: torch.Tensor, trace: KernelTrace | None) -> torch.Tensor:
    """`y` is smaller than `x`: one entry per row, one row for all, or another shape."""
    shape, rank = x.shape, x.dim()
    if 0 < y.dim() <= rank and x.numel():
        tall = (1,) * (rank - y.dim()) + tuple(y.shape)
        if finish.compiles and tall[-1] == 1 and tall[:-1] == shape[:-1]:
            out = torch.empty(shape, dtype=finish.storage)
            rows, column, codes = (full.contiguous().numpy().reshape(-1, full.shape[-1]) for full in (x, y, out))
            finish.write(rows, column, codes, trace)
            return out
        if tall[-1] == 1 and tall[:-1] == shape[:-1]:
            return finish.rows(x.reshape(-1, shape[-1]), y.reshape(-1, 1), trace).view(shape)
        # The same block for every sample: y's dimensions are 1, then those of x.
        first = next((i for i, size in enumerate(tall) if size != 1), rank)
        if tall[first:] == shape[first:]:
            return finish.rows(x.reshape(-1, y.numel()), y.reshape(1, -1), trace).view(shape)
    return finish.any(x, y, trace)


def prepare_clamp(call: KernelCall) -> Kernel:
    """Bounds within the codes' own dtype."""
    storage = parse_qtype(call.options["format"]).storage
    x, low, high = _codes(call.args[0]), call.options["low"], call.options["high"]
    if storage is not x.dtype:
        raise NoFastForm("the format changes")
    limits = torch.iinfo(storage)
    bounds = max(low, limits.min), min(high, limits.max)
    return lambda x, trace=None: x.clamp(*bounds)


# --- borders --------------------------------------------------------------------------------------------------------


def prepare_quantize(call: KernelCall) -> Kernel:
    """The reference's steps, in place; images come out channels_last."""
    scale, options = call.args[1], call.options
    qtype, zero = parse_qtype(options["format"]), int(options.get("zero", 0))
    rule = parse_quantize_rule(options.get("rounding", str(RECIPROCAL)))
    if not isinstance(scale, torch.Tensor) or scale.dim() or qtype.bits > 16 or rule.rounding is not Rounding.HALF_EVEN:
        raise NoFastForm("only one scale per tensor, rounding to even and results of up to 16 bits are fast")
    if zero and rule.zero is not ZeroPoint.AFTER:
        raise NoFastForm("the zero point is added before rounding")
    factor = scale if rule.divides else 1.0 / scale
    steps, single = torch.div if rule.divides else torch.mul, np.float32

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        compiles = x.dtype is torch.float32 and x.device.type == "cpu" and loops() is not None
        if trace is not None and not compiles:
            REFERENCE["quantize"](x, scale, **options, trace=trace)
        if compiles:
            full = dense(x.detach())
            out = torch.empty(full.numel(), dtype=qtype.storage)
            bounds = (single(zero), single(qtype.qmin), single(qtype.qmax))
            loops().quantize(memory(full).numpy(), single(factor), rule.divides, *bounds, out.numpy())
            if trace is not None:
                trace.saturated += loops().unquantizable(memory(full).numpy(), single(factor), rule.divides, *bounds)
            codes = shaped_as(out, full)
            return _interleaved(codes) if x.dim() == 4 else codes
        image = channels_last(x) if x.dim() == 4 else x
        scaled = steps(image.to(torch.float32), factor).round_().nan_to_num_(0.0, float("inf"), float("-inf"))
        if zero:
            scaled.add_(zero)
        return scaled.clamp_(qtype.qmin, qtype.qmax).to(qtype.storage)

    return run


def _interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[N, C, H, W]` in channels_last."""
    if codes.is_contiguous(memory_format=torch.channels_last) or not codes.is_contiguous():
        return channels_last(codes)
    n, c, h, w = codes.shape
    out = torch.empty(n, h, w, c, dtype=codes.dtype)
    loops().interleave(codes.view(n, c, h * w).numpy(), out.view(n, h * w, c).numpy())
    return out.permute(0, 3, 1, 2)


def prepare_dequantize(call: KernelCall) -> Kernel:
    """Reals of codes, contiguous: the float operators behind may rely on it."""
    x, scale = _codes(call.args[0]), call.args[1]
    axis, zero = call.options["axis"], call.options.get("x_zero", 0)
    if not isinstance(scale, torch.Tensor) or (x.dtype is torch.int32 and zero):
        raise NoFastForm("the scale is computed, or int32 codes have a zero point")
    shape = [-1 if dim == axis % len(x.shape) else 1 for dim in range(len(x.shape))] if scale.dim() else []
    factor = scale.reshape(shape)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        reals = x.contiguous().to(torch.float32)
        return (reals.sub_(zero) if zero else reals).mul_(factor)

    return run


# --- tables ---------------------------------------------------------------------------------------------------------


def prepare_lookup(call: KernelCall) -> Kernel:
    """Every table becomes one entry per bit pattern of the codes; pairs of bytes are looked up together."""
    x, table = _codes(call.args[0]), call.args[1]
    source = parse_qtype(call.options["source"])
    if not isinstance(table, torch.Tensor) or x.dtype is not source.storage or source.bits not in (8, 16):
        raise NoFastForm("the table is computed, or codes are stored in another width")
    return _by_code(source, lambda codes: lookup(codes, table.cpu(), source).to(table.dtype).to(table.device))


def prepare_expanded(call: KernelCall) -> Kernel:
    """Segment tables and steps, computed by the reference for every code there is."""
    x, constants = _codes(call.args[0]), call.args[1:]
    source = next((qtype for qtype in (qint8, quint8, qint16) if qtype.storage is x.dtype), None)
    if source is None or any(isinstance(value, Operand) for value in constants):
        raise NoFastForm("the table is computed, or codes have more than 16 bits")
    form = call.options.get("source")
    if form is not None and parse_qtype(form) != source:
        raise NoFastForm("codes are stored in another width")
    return _by_code(
        source, lambda codes: REFERENCE[call.operator](codes.to(source.storage), *constants, **call.options)
    )


def _by_code(source: QType, function: Callable[[torch.Tensor], torch.Tensor]) -> Kernel:
    """A function of codes as a table with one entry per bit pattern."""
    entries = function(torch.arange(source.qmin, source.qmax + 1)).roll(source.qmin)
    unsigned = torch.uint8 if source.bits == 8 else torch.uint16
    pairs = _pairs_of(entries) if source.bits == 8 and entries.element_size() <= 4 else None
    if loops() is not None and entries.device.type == "cpu":
        return _compiled_lookup(np.uint8 if source.bits == 8 else np.uint16, entries)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        full = dense(x)
        return shaped_as(_looked_up(memory(full), unsigned, entries, pairs), full)

    return run


def _compiled_lookup(kind: Any, entries: torch.Tensor) -> Kernel:
    table = entries.numpy()

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        full = dense(x)
        out = torch.empty_like(full, dtype=entries.dtype)
        loops().look_up(array_of(full).view(kind), table, array_of(out))
        return out

    return run


def _pairs_of(entries: torch.Tensor) -> torch.Tensor:
    """Entries of two neighbouring bytes in one, for bytes in the order of memory (little endian)."""
    first, second = entries.repeat(256), entries.repeat_interleave(256)
    wide = {1: torch.int16, 2: torch.int32, 4: torch.int64}[entries.element_size()]
    return torch.stack([first, second], 1).view(wide).reshape(-1)


def _looked_up(
    codes: torch.Tensor, unsigned: torch.dtype, entries: torch.Tensor, pairs: torch.Tensor | None
) -> torch.Tensor:
    if pairs is not None and codes.numel() % 2 == 0 and codes.storage_offset() % 2 == 0:
        index = codes.view(torch.uint16).to(torch.int32)
        return pairs.index_select(0, index).view(entries.dtype)
    return entries.index_select(0, codes.view(unsigned).to(torch.int32))


KERNELS = {
    "requantize": prepare_requantize,
    "add": prepare_add,
    "mul": prepare_mul,
    "clamp": prepare_clamp,
    "quantize": prepare_quantize,
    "dequantize": prepare_dequantize,
    "lookup": prepare_lookup,
    "lookup_segments": prepare_expanded,
    "lookup_steps": prepare_expanded,
}
