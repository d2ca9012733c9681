"""Quantization of captured graphs: configuration, observers, states, and the three steps of a user's road."""

from qgraph.quantization.calibrate import calibrate
from qgraph.quantization.convert import convert, convert_pipeline, freeze
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    Observer,
    PerChannelMinMaxObserver,
)
from qgraph.quantization.paths import Examples
from qgraph.quantization.prepare import prepare, prepare_pipeline
from qgraph.quantization.qconfig import (
    DefaultQconfigSetter,
    ModuleNameQconfigSetter,
    QConfig,
    QConfigSetter,
    calibration_8bit_weight_16bit_act_qconfig_setter,
    default_calibration_qconfig_setter,
    default_qat_qconfig_setter,
    get_qconfig,
    qat_8bit_weight_16bit_act_qconfig_setter,
)
from qgraph.quantization.sites import set_fake_quantize
from qgraph.quantization.states import FakeQuantState

__all__ = [
    "DefaultQconfigSetter",
    "Examples",
    "FakeQuantState",
    "FakeQuantize",
    "MinMaxObserver",
    "ModuleNameQconfigSetter",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "Observer",
    "PerChannelMinMaxObserver",
    "QConfig",
    "QConfigSetter",
    "calibrate",
    "calibration_8bit_weight_16bit_act_qconfig_setter",
    "convert",
    "convert_pipeline",
    "default_calibration_qconfig_setter",
    "default_qat_qconfig_setter",
    "freeze",
    "get_qconfig",
    "prepare",
    "prepare_pipeline",
    "qat_8bit_weight_16bit_act_qconfig_setter",
    "set_fake_quantize",
]
