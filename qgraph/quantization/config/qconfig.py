"""`QConfig`, a complete configuration of one site, and `Setting`, a partial one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeAlias

import torch

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.numerics import Format, QType, as_format, qint8, qparams_from_scale
from qgraph.quantization.fake_quantize import FAKE_QUANT_KINDS
from qgraph.quantization.observers import Observer, observer_name

FormatLike: TypeAlias = Format | torch.dtype | str
PORTS = ("input", "weight", "output")


@dataclass(frozen=True)
class Threshold:
    """Largest magnitudes of a site's values: a scale is its threshold divided by the number of negative codes.

    Args:
        output: of the result.
        weight: of the weight; it then has one scale.
        input: of every operand, which is rescaled on its way in.
    """

    output: float | None = None
    weight: float | None = None
    input: float | None = None

    def __post_init__(self) -> None:
        for port in PORTS:
            value = getattr(self, port)
            if value is not None:
                _check_number(value, f"a threshold of {value!r} for the {port}")
                _scale_of(value, qint8, f"the threshold {value} of the {port}")

    def scale(self, port: str, qtype: QType) -> float | None:
        """The scale of a port in a format: threshold / -qmin, or threshold / (qmax + 1) if it is unsigned."""
        value = getattr(self, port)
        return None if value is None else _scale_of(value, qtype, f"the threshold {value} of the {port}")


def _scale_of(threshold: float, qtype: QType, what: str) -> float:
    scale = float(threshold) / (-qtype.qmin if qtype.signed else qtype.qmax + 1)
    try:
        qparams_from_scale(scale, qtype)
    except QuantizationError as error:
        raise QuantizationError(f"{what} is not usable", why=error.what, fix="give a finite number > 0") from error
    return scale


def as_threshold(value: Any) -> Threshold | None:
    """A `Threshold` from a number, which is the result's, or a mapping by port.

    Raises:
        UserError: a port does not exist, or a value is no usable number.
    """
    if value is None or isinstance(value, Threshold):
        return value
    if not isinstance(value, Mapping):
        return Threshold(output=value)
    for port in value:
        if port not in PORTS:
            raise UserError(f"a threshold names the port {port!r}", fix=did_you_mean(str(port), PORTS))
    return Threshold(**value)


@dataclass(frozen=True)
class Setting:
    """A partial configuration: what is None is left to later setters.

    Args:
        output: format of the result.
        weight: format of the weight.
        input: format all operands must have.
        inputs: format of each operand, in order, the residual of a fused operator left out; None takes it as it comes.
        activation_observer, weight_observer: observers, in text form or as classes.
        fixed_scale: scale of the result, never updated.
        threshold: largest magnitudes instead of scales.
        frozen: whether training leaves the scale of the result as calibration found it.
        fake_quant: kind of fake quantization.
        stays_float: True for an operator that is not quantized.
        preference: whether what the target cannot do is changed to the nearest it can, with a note, instead of refused.
    """

    output: Format | None = None
    weight: Format | None = None
    input: Format | None = None
    inputs: tuple[Format | None, ...] | None = None
    activation_observer: str | None = None
    weight_observer: str | None = None
    fixed_scale: float | None = None
    threshold: Threshold | None = None
    frozen: bool | None = None
    fake_quant: str | None = None
    stays_float: bool | None = None
    preference: bool = False

    def __post_init__(self) -> None:
        _normalize(self)

    def given(self) -> dict[str, Any]:
        """The fields it decides. A format implies that the operator is quantized."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "preference"}
        found = {name: value for name, value in found.items() if value is not None}
        if found.keys() & {"output", "weight", "input", "inputs"}:
            found.setdefault("stays_float", False)
        return found


@dataclass(frozen=True)
class QConfig:
    """Formats and observers for one site.

    Args:
        output: format of the result; int32 asks a matrix product for its accumulator.
        weight: format of the weight, for operators that have one.
        input: format the operands must have; None takes them as they come.
        activation_observer: the observer of the result, in text form or as a class.
        weight_observer: the observer of the weight.
        fixed_scale: scale of the result, never updated.
        inputs: as `input`, for each operand in order; it wins over `input`.
        threshold: largest magnitude of the result, or a mapping of ports (input, weight, output), instead of a scale.
        frozen: whether training leaves the scale of the result as calibration found it.
        fake_quant: kind of fake quantization.
    """

    output: Format = qint8
    weight: Format = qint8
    input: Format | None = None
    activation_observer: str = "min_max"
    weight_observer: str = "min_max"
    fixed_scale: float | None = None
    inputs: tuple[Format | None, ...] | None = None
    threshold: Threshold | None = None
    frozen: bool = False
    fake_quant: str = "fake_quant"

    def __post_init__(self) -> None:
        for name in ("output", "weight"):
            if getattr(self, name) is None:
                as_format(getattr(self, name))  # raises
        _normalize(self)

    def given(self) -> dict[str, Any]:
        """Every field: nothing is left to later setters."""
        return {**{entry.name: getattr(self, entry.name) for entry in fields(self)}, "stays_float": False}


def _normalize(config: QConfig | Setting) -> None:
    """Names and torch dtypes are as good as formats, classes as good as names."""
    changed: dict[str, Any] = {}
    for name in ("output", "weight", "input"):
        if getattr(config, name) is not None:
            changed[name] = as_format(getattr(config, name))
    given: Any = config.inputs
    if given is not None:
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise UserError(f"inputs is {given!r}", fix="give a list with one format, or None, per operand")
        changed["inputs"] = tuple(None if one is None else as_format(one) for one in given)
    for name in ("activation_observer", "weight_observer"):
        if getattr(config, name) is not None:
            changed[name] = observer_name(getattr(config, name))
    changed["threshold"] = as_threshold(config.threshold)
    for name, value in changed.items():
        object.__setattr__(config, name, value)
    _check_flags(config)
    _check_scale(config)


def _check_flags(config: QConfig | Setting) -> None:
    if config.fake_quant is not None and config.fake_quant not in FAKE_QUANT_KINDS:
        raise QuantizationError(
            f"no kind of fake quantization is named {config.fake_quant!r}",
            fix=did_you_mean(str(config.fake_quant), FAKE_QUANT_KINDS),
        )
    if not isinstance(config.frozen, (bool, type(None))):
        raise UserError(f"frozen is {config.frozen!r}", fix="give True or False")


def _check_scale(config: QConfig | Setting) -> None:
    if config.fixed_scale is None:
        return
    _check_number(config.fixed_scale, f"a fixed scale of {config.fixed_scale!r}")
    qparams_from_scale(config.fixed_scale, qint8)
    if config.threshold is not None and config.threshold.output is not None:
        raise QuantizationError(
            "a site has a fixed scale and a threshold", why="the threshold is another scale", fix="give one of them"
        )


def _check_number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise QuantizationError(f"{what} is no number", fix="give a float")


def get_qconfig(
    observer: str | type[Observer] = "min_max",
    in_dtype: FormatLike | None = None,
    weight_dtype: FormatLike = qint8,
    out_dtype: FormatLike = qint8,
    fix_scale: float | bool | None = None,
    *,
    threshold: float | Mapping[str, float] | None = None,
) -> QConfig:
    """A `QConfig` from formats, torch dtypes or names such as `"int16"` and `"qint16"`.

    Args:
        observer: of the result.
        in_dtype, weight_dtype, out_dtype: formats of operands, weight and result.
        fix_scale: a scale for the result; True keeps the one calibration found while training.
        threshold: largest magnitude of the result, or by port, instead of a scale.

    Raises:
        UserError: a format or observer does not exist, or a number is not usable.
    """
    return QConfig(
        output=as_format(out_dtype),
        weight=as_format(weight_dtype),
        input=None if in_dtype is None else as_format(in_dtype),
        activation_observer=observer_name(observer),
        fixed_scale=None if isinstance(fix_scale, bool) else fix_scale,
        threshold=as_threshold(threshold),
        frozen=fix_scale is True,
    )


def as_setting(value: Any, what: str) -> QConfig | Setting:
    """A configuration a user gave for something: None means that it stays float.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return Setting(stays_float=True)
    if isinstance(value, (QConfig, Setting)):
        return value
    raise UserError(
        f"the configuration for {what} is a {type(value).__module__}.{type(value).__qualname__}".replace(
            "builtins.", ""
        ),
        fix="give QConfig or get_qconfig(...), or None to keep it in float",
    )


def require_integer(value: Format, where: str) -> QType:
    """`value` as an integer format.

    Raises:
        QuantizationError: it is a float format.
    """
    if not isinstance(value, QType):
        raise QuantizationError(
            f"format {value} is not available for this site",
            where=where,
            why="only int8 and int16 are lowered so far",
            fix="use qint8 or qint16",
        )
    return value
