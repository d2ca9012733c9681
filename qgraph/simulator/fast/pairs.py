"""Sums of two 8-bit operands as engines define them: one entry per pair of codes, computed by the rule itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qgraph.numerics import AddFactors, EngineSum, QType, Zeros, parse_arithmetic, parse_qtype, qint32
from qgraph.numerics.engine_sums import MlasAdd
from qgraph.simulator.fast.layout import channels_last, memory, shaped_as
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.kernel import Kernel, KernelCall, NoFastForm, Operand
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace

_CODES = 256


def prepare_engine_sum(call: KernelCall) -> Kernel:
    """Two values of 8 bits; factors are single numbers.

    Raises:
        NoFastForm: codes have more bits, or something else than the operands is computed.
    """
    x, y, *rest = call.args
    if not isinstance(x, Operand) or not isinstance(y, Operand) or any(isinstance(value, Operand) for value in rest):
        raise NoFastForm("a factor is computed, or an operand is a constant")
    if x.dtype.itemsize != 1 or y.dtype.itemsize != 1 or rest[0].numel() != 1 or rest[1].numel() != 1:
        raise NoFastForm("an operand of an engine's sum has more than 8 bits, or there are several factors")
    rule = parse_arithmetic(call.options["arithmetic"]).rule
    assert isinstance(rule, EngineSum)
    tables = [_Table(call, rule, (x.dtype, y.dtype), regular=regular) for regular in (True, False)]
    loop = _fused_loop(call, rule) if isinstance(rule, MlasAdd) and x.device.type == "cpu" else None

    def run(x: torch.Tensor, y: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        count = rule.regular(x.shape, y.shape)
        if x.shape != y.shape:
            if not rule.broadcasts:
                return REFERENCE["add"](x, y, *rest, **call.options, trace=trace)
            return tables[count == 0].of(x, y, trace)
        full, other = (channels_last(x), channels_last(y)) if x.dim() == 4 else (x.contiguous(), y.contiguous())
        a, b, out = memory(full), memory(other), torch.empty(x.numel(), dtype=tables[0].storage, device=x.device)
        if loop is not None and count:
            loop(a, b, out, trace)
            return shaped_as(out, full)
        for table, part in zip(tables, (slice(0, count), slice(count, None)), strict=True):
            table.fill(a[part], b[part], out[part], trace)
        return shaped_as(out, full)

    return run


class _Table:
    """Results for all pairs of codes: entry `256 x + y`, both read as unsigned.

    Args:
        regular: whether of elements that `EngineSum.regular` counts, or of the others.
    """

    def __init__(
        self, call: KernelCall, rule: EngineSum, dtypes: tuple[torch.dtype, torch.dtype], *, regular: bool
    ) -> None:
        options, qtype = call.options, parse_qtype(call.options["format"])
        x, y = (torch.arange(_CODES).to(torch.uint8).view(dtype) for dtype in dtypes)
        stored = [None if value is None else value.cpu() for value in (*call.args[2:], None)]
        zeros = Zeros(*(options.get(name, 0) for name in ("x_zero", "y_zero", "zero")))
        assert stored[0] is not None
        assert stored[1] is not None
        factors = AddFactors(stored[0], stored[1], stored[2], stored[3])
        sums = rule.elements(x.view(-1, 1), y.view(1, -1), factors, zeros, regular=regular).reshape(-1)
        device = call.args[2].device
        self.storage = qtype.storage
        self.entries = sums.clamp(options["low"], options["high"]).to(self.storage).to(device)
        self.saturates = _leaves(sums, qtype, options["low"], options["high"]).to(device)

    def of(self, x: torch.Tensor, y: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        """Results for operands that broadcast."""
        first, second = (codes.view(torch.uint8).to(torch.int32) for codes in (x, y))
        index = first * _CODES + second
        flat = index.reshape(-1)
        if trace is not None:
            trace.saturated += int(torch.count_nonzero(self.saturates.index_select(0, flat)))
        return self.entries.index_select(0, flat).view(index.shape)

    def fill(self, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, trace: KernelTrace | None) -> None:
        """Results for `x` and `y` `[n]` into `out`."""
        if loops() is not None and x.device.type == "cpu":
            first, second = (codes.numpy().view(np.uint8) for codes in (x, y))
            loops().look_up_pairs(first, second, self.entries.numpy(), out.numpy())
            if trace is not None:
                trace.saturated += loops().count_pairs(first, second, self.saturates.numpy())
        else:
            out.copy_(self.of(x, y, trace))


def _leaves(sums: torch.Tensor, qtype: QType, low: int, high: int) -> torch.Tensor:
    """Which sums leave the format; the bound of an activation clips on purpose."""
    below = (sums < qtype.qmin) & (low == qtype.qmin)
    return below | ((sums > qtype.qmax) & (high == qtype.qmax))


def _fused_loop(call: KernelCall, rule: MlasAdd) -> Any:
    """MLAS' two fused multiply-adds as a compiled loop, if they stay in 32 bits."""
    compiled, options = loops(), call.options
    if compiled is None:
        return None
    ratios = call.args[2].reshape(()).to(torch.float32), call.args[3].reshape(()).to(torch.float32)
    fixed = rule.fixed(ratios, Zeros(*(options.get(name, 0) for name in ("x_zero", "y_zero", "zero"))))
    a, b, start = float(ratios[0]), float(ratios[1]), float(fixed)
    if not _CODES * (abs(a) + abs(b)) + abs(start) < qint32.qmax:
        return None
    qtype, ratios_and_start = parse_qtype(options["format"]), [np.float32(value) for value in (a, b, start)]
    low, high = options["low"], options["high"]
    below, above = low - (low == qtype.qmin), high + (high == qtype.qmax)

    def loop(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, trace: KernelTrace | None) -> None:
        if trace is None:
            compiled.sum_fused(x.numpy(), y.numpy(), *ratios_and_start, np.float32(low), np.float32(high), out.numpy())
            return
        # One more code beyond each end of the format shows what did not fit.
        wide = np.empty(out.shape, np.int16 if out.dtype.itemsize == 1 else np.int32)
        compiled.sum_fused(x.numpy(), y.numpy(), *ratios_and_start, np.float32(below), np.float32(above), wide)
        trace.saturated += compiled.bound(wide, low, high, out.numpy())

    return loop
