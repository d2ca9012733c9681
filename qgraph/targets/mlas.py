"""Nonlinear functions as onnxruntime computes them on CPUs: float32 polynomials with fused multiply-adds.

Coefficients are those of MLAS, onnxruntime's kernel library (`core/mlas/lib`: `logistic.cpp`, `tanh.cpp`,
`compute.cpp`, `erf.cpp`); logistic and tanh are Eigen's. Every function takes and gives float32 tensors of any
shape. NaN becomes minus infinity, because onnxruntime quantizes both to the lowest code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from qgraph.numerics.float_steps import fma32

_LOG2_E = 1.44269504088896341
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = -6.93145752e-1, -1.42860677e-6
_ROUND_TO_WHOLE = 12582912.0  # 1.5 * 2**23: adding it leaves no bits below 1

_LOGISTIC_P = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
_LOGISTIC_Q = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_EXP_P = tuple(
    float.fromhex(digits)
    for digits in (
        "0x1.694000p-10",
        "0x1.125edcp-7",
        "0x1.555b5ap-5",
        "0x1.555450p-3",
        "0x1.fffff6p-2",
        "0x1p0",
        "0x1p0",
    )
)
_ERF_SMALL = (-5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1, -3.76124859e-1, 1.28379151e-1)
_ERF_LARGE = (
    1.72948930e-5,
    -3.83208680e-4,
    3.88393435e-3,
    -2.42545605e-2,
    1.06777847e-1,
    6.34846687e-1,
    1.28717512e-1,
)
_ERF_EXP = (1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0)
_ERF_BOUND, _ERF_SPLIT = 3.925, 0.921875


def sigmoid(values: torch.Tensor) -> torch.Tensor:
    """The logistic function; QLinearSigmoid and Sigmoid."""
    clamped = values.clamp(-18.0, 18.0)
    square = clamped * clamped
    odd = _polynomial(square, _LOGISTIC_P) * clamped
    return (odd / _polynomial(square, _LOGISTIC_Q) + 0.5).clamp(min=0.0)


def silu(values: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`, two operators in ONNX."""
    return values * sigmoid(values)


def tanh(values: torch.Tensor) -> torch.Tensor:
    """Tanh."""
    clamped = values.clamp(-9.0, 9.0)
    square = clamped * clamped
    return _polynomial(square, _TANH_P) * clamped / _polynomial(square, _TANH_Q)


def exp(values: torch.Tensor) -> torch.Tensor:
    """Exp."""
    clamped = values.clamp(-103.9720840454, 88.7762626647950)
    return _exp(clamped, _EXP_P)


def erf(values: torch.Tensor) -> torch.Tensor:
    """Erf."""
    size = values.abs().clamp(max=_ERF_BOUND)
    small = fma32(_polynomial(size * size, _ERF_SMALL), size, size)
    beyond = torch.where(size > _ERF_SPLIT, size, 0.0)
    power = -fma32(_polynomial(beyond, _ERF_LARGE), beyond, beyond)
    large = 1.0 - _exp(power.clamp(min=-88.3762626647949), _ERF_EXP)
    return torch.copysign(torch.where(size > _ERF_SPLIT, large, small), values)


def gelu(values: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Gelu, both forms."""
    if approximate == "none":
        return 0.5 * values * (erf(values * math.sqrt(0.5)) + 1.0)
    slope = math.sqrt(2.0 / math.pi)
    cubic = values.new_tensor(0.044715 * slope) * values * values
    return 0.5 * values * (1.0 + tanh(values * (cubic + slope)))


def hardsigmoid(values: torch.Tensor) -> torch.Tensor:
    """HardSigmoid with alpha = 1/6, beta = 1/2."""
    return (values * (1.0 / 6.0) + 0.5).clamp(0.0, 1.0)


def hardswish(values: torch.Tensor) -> torch.Tensor:
    """HardSwish."""
    return values * hardsigmoid(values)


def leaky_relu(values: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """QLinearLeakyRelu and LeakyRelu."""
    return torch.where(values >= 0.0, values, values * negative_slope)


def sqrt(values: torch.Tensor) -> torch.Tensor:
    """Sqrt, rounded correctly (torch.sqrt in float32 is not, on every CPU)."""
    return values.double().sqrt().float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def rsqrt(values: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Add, Sqrt and Reciprocal, each rounded correctly."""
    root = (values + eps).double().sqrt().float()
    return (1.0 / root).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _exp(values: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """`2**m * p(x - m * ln 2)`, m the whole number next to `x / ln 2`."""
    shift = values.new_tensor(_ROUND_TO_WHOLE)
    whole = fma32(values, values.new_tensor(_LOG2_E), shift) - shift
    rest = fma32(whole, values.new_tensor(_MINUS_LN2_HIGH), values)
    rest = fma32(whole, values.new_tensor(_MINUS_LN2_LOW), rest)
    return torch.ldexp(_polynomial(rest, coefficients).double(), whole.double()).float()


def _polynomial(values: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Horner's scheme, highest power first."""
    total = torch.full_like(values, coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma32(total, values, values.new_tensor(coefficient))
    return total


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    function.__name__: function
    for function in (sigmoid, silu, tanh, exp, erf, gelu, hardsigmoid, hardswish, leaky_relu, sqrt, rsqrt)
}
