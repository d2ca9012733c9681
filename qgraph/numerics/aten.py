"""Rescaling as torch's own quantized kernels do it (ATen); found by experiment, checked against torch in the tests.

`acc` counts codes from their zero points, `z` is the zero point of the result, `fl` one float32 rounding, `rhe` rounds
half to even. A vector loop and a scalar loop share the elements; the scalar loop adds the zero point before it rounds.

    aten_requantize          dequantize, then torch.quantize_per_tensor; r = fl(1 / sz)
        rhe(fma(fl(sx * acc), r, z))
    aten_cat                 of channels in memory order channels_last; x are raw codes
        rhe(fl(fma(sx, x, fl(sx * -zx)) * r)) + z      the first C // 8 * 8 channels of an operand
        rhe(fl(fl(fl(sx * acc) * r) + z))              the others
    aten_avg_pool            channels_last; m = fl(1 / n), m2 = fl(1 / fl(1 / m))
        rhe(fl(acc * m)) + z                           the first C // 16 * 16 channels
        rhe(fl(fl(acc * m2) + z))                      the others
    aten_adaptive_avg_pool   channels_last
        rhe(fma(acc, m2, z))                           the first C // 8 * 8 channels
        rhe(fl(fl(acc * m2) + z))                      the others
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics.engines import EngineRule, refuse_bias
from qgraph.numerics.factor import Factor
from qgraph.numerics.float_steps import fma32, whole32


class AtenRequantize(EngineRule):
    """From one scale to another through real numbers.

    The stored multiplier is `[2]`: the operand's scale, the reciprocal of the result's.
    """

    name = "aten_requantize"

    def stages(self, source: torch.Tensor, zero: int, result: torch.Tensor) -> torch.Tensor:
        """What is stored, float32, for the scales (float32, 0-d) of operand and result; `zero` of the operand."""
        return torch.stack([source, 1.0 / result])

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        scale, reciprocal = factor.multiplier.unbind(0)
        real = scale * accumulator.to(torch.float32)
        return whole32(fma32(real, reciprocal, torch.full_like(reciprocal, zero)))


class AtenCat(AtenRequantize):
    """An operand of a concatenation of channels, `[N, C, H, W]`. The multiplier also holds the operand's zero point."""

    name = "aten_cat"
    _STEP = 8

    def stages(self, source: torch.Tensor, zero: int, result: torch.Tensor) -> torch.Tensor:
        return torch.stack([source, 1.0 / result, torch.full_like(source, zero)])

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        scale, reciprocal, zero_x = factor.multiplier.unbind(0)
        counted = accumulator.to(torch.float32)
        real = fma32(scale, counted + zero_x, scale * -zero_x)
        body = whole32(real * reciprocal) + zero
        tail = whole32(scale * counted * reciprocal + float(zero))
        return torch.where(_first_channels(accumulator, self._STEP), body, tail)


class AtenPool(EngineRule):
    """An average of windows of `[N, C, H, W]`. The stored multiplier is `[2, ...]`: m and m2, per position or not."""

    step: ClassVar[int]

    def stages(self, counts: torch.Tensor) -> torch.Tensor:
        """What is stored, float32 `[2, ...]`, for the numbers of elements averaged (any float dtype, any shape)."""
        m = 1.0 / counts.to(torch.float32)
        return torch.stack([m, 1.0 / (1.0 / m)])

    def _tail(self, accumulator: torch.Tensor, multiplier: torch.Tensor, zero: int) -> torch.Tensor:
        return whole32(accumulator.to(torch.float32) * multiplier + float(zero))


class AtenAvgPool(AtenPool):
    """torch.nn.functional.avg_pool2d."""

    name = "aten_avg_pool"
    step = 16

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        m, m2 = factor.multiplier.unbind(0)
        body = whole32(accumulator.to(torch.float32) * m) + zero
        return torch.where(_first_channels(accumulator, self.step), body, self._tail(accumulator, m2, zero))


class AtenAdaptiveAvgPool(AtenPool):
    """torch.nn.functional.adaptive_avg_pool2d."""

    name = "aten_adaptive_avg_pool"
    step = 8

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        m2 = factor.multiplier.unbind(0)[1]
        body = whole32(fma32(accumulator.to(torch.float32), m2, torch.full_like(m2, zero)))
        return torch.where(_first_channels(accumulator, self.step), body, self._tail(accumulator, m2, zero))


def _first_channels(values: torch.Tensor, step: int) -> torch.Tensor:
    """Which channels of `[N, C, H, W]` the vector loop takes, bool `[C, 1, 1]`.

    Raises:
        QuantizationError: the values have another rank.
    """
    if values.dim() != 4:
        raise QuantizationError(
            f"a value of shape {list(values.shape)} has no channels in memory order channels_last",
            fix="use this word for four dimensions only",
        )
    channels = values.shape[1]
    return (torch.arange(channels, device=values.device) < channels // step * step).reshape(-1, 1, 1)


ATEN_RULES: dict[str, EngineRule] = {
    rule.name: rule for rule in (AtenRequantize(), AtenCat(), AtenAvgPool(), AtenAdaptiveAvgPool())
}
