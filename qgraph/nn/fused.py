"""Convolutions and linears with the steps that hardware does in the same pass: add, then an activation.

    y = activation(op(x, weight, bias) + residual)

One class per torch class, so that weights keep their names and `isinstance` checks keep working. Epilogues work in
place on the result of the matrix product, which nobody else holds.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn


class Activation(str, Enum):
    """The activation at the end of a fused operator."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"

    def __str__(self) -> str:
        return self.value


class Fused(nn.Module):
    """What all fused classes share: the epilogue and the quantized weight."""

    activation: Activation
    adds: bool
    weight_fake_quant: nn.Module | None
    bias_fake_quant: nn.Module | None

    def quantized_weight(self) -> torch.Tensor:
        """The weight as the operator uses it, shape and dtype of `weight`."""
        weight = cast(nn.Parameter, self.weight)
        return weight if self.weight_fake_quant is None else cast(torch.Tensor, self.weight_fake_quant(weight))

    def quantized_bias(self) -> torch.Tensor | None:
        """The bias as the operator uses it, shape and dtype of `bias`."""
        bias = cast("nn.Parameter | None", self.bias)
        if self.bias_fake_quant is None or bias is None:
            return bias
        return cast(torch.Tensor, self.bias_fake_quant(bias))

    def finish(self, product: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Adds `residual` (shape of `product`) and applies the activation, writing to `product`."""
        if residual is not None:
            # A constant residual of batch 1 broadcasts, which an in-place sum allows one way only.
            product = product.add_(residual) if residual.shape == product.shape else product + residual
        if self.activation is Activation.RELU:
            return product.relu_()
        if self.activation is Activation.RELU6:
            return F.relu6(product, inplace=True)
        return product

    def extra_repr(self) -> str:
        extra = [f"activation={self.activation}"] if self.activation is not Activation.NONE else []
        extra += ["adds=True"] if self.adds else []
        return ", ".join([super().extra_repr(), *extra])


class FusedConv1d(Fused, nn.Conv1d):
    """`nn.Conv1d` with an optional residual `[N, C, L]` and activation."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[N, C_in, L_in]` to `[N, C_out, L_out]`."""
        product = self._conv_forward(x, self.quantized_weight(), self.quantized_bias())
        return self.finish(product, residual)


class FusedConv2d(Fused, nn.Conv2d):
    """`nn.Conv2d` with an optional residual `[N, C, H, W]` and activation."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[N, C_in, H_in, W_in]` to `[N, C_out, H_out, W_out]`."""
        product = self._conv_forward(x, self.quantized_weight(), self.quantized_bias())
        return self.finish(product, residual)


class FusedConv3d(Fused, nn.Conv3d):
    """`nn.Conv3d` with an optional residual `[N, C, D, H, W]` and activation."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[N, C_in, D_in, H_in, W_in]` to `[N, C_out, D_out, H_out, W_out]`."""
        product = self._conv_forward(x, self.quantized_weight(), self.quantized_bias())
        return self.finish(product, residual)


class _FusedTransposed(Fused):
    """Transposed convolutions differ from each other only in the function they call."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[N, C_in, *in]` to `[N, C_out, *out]`."""
        weight = self.quantized_weight()
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        product = function(
            x,
            weight,
            self.quantized_bias(),
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )
        return self.finish(product, residual)


class FusedConvTranspose1d(_FusedTransposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` with an optional residual and activation."""


class FusedConvTranspose2d(_FusedTransposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` with an optional residual and activation."""


class FusedConvTranspose3d(_FusedTransposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` with an optional residual and activation."""


class FusedLinear(Fused, nn.Linear):
    """`nn.Linear` with an optional residual and activation."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[*, in_features]` to `[*, out_features]`."""
        product = F.linear(x, self.quantized_weight(), self.quantized_bias())
        return self.finish(product, residual)


FUSED_CLASSES: dict[type[nn.Module], type[Fused]] = {
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
    nn.ConvTranspose1d: FusedConvTranspose1d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.ConvTranspose3d: FusedConvTranspose3d,
    nn.Linear: FusedLinear,
}

_Module = TypeVar("_Module", bound=nn.Module)


def clone_module(module: _Module) -> _Module:
    """A module of its own with the *same* parameters and buffers: weights stay tied, children are shared."""
    clone = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        clone.__dict__[table] = copy.copy(module.__dict__[table])
    return clone


def as_fused(module: nn.Module) -> Fused:
    """A fused twin of a torch convolution or linear, or a clone of a fused one; parameters are shared.

    Raises:
        TypeError: the class has no fused form.
    """
    if isinstance(module, Fused):
        return clone_module(module)
    if type(module) not in FUSED_CLASSES:
        raise TypeError(f"{type(module).__name__} has no fused form")
    fused_class = FUSED_CLASSES[type(module)]
    fused = fused_class.__new__(fused_class)
    fused.__dict__.update(clone_module(module).__dict__)
    # Straight into the dictionary: `nn.Module.__setattr__` looks through every table first.
    fused.__dict__.update(activation=Activation.NONE, adds=False, weight_fake_quant=None, bias_fake_quant=None)
    return fused
