"""Quantization of captured graphs: configuration, observers, states, and the three steps of a user's road."""

from qgraph.quantization.auto_calibrate import AutoCalibration, SiteChoice, auto_calibrate
from qgraph.quantization.calibrate import calibrate
from qgraph.quantization.convert import convert, convert_pipeline, freeze
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.observers import (
    ClipStdObserver,
    FixedScaleObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    MSEObserver,
    Observer,
    ObserverSpec,
    PercentileObserver,
    PerChannelMinMaxObserver,
)
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
from qgraph.quantization.reset_scale import reset_scale
from qgraph.quantization.sites import set_fake_quantize
from qgraph.quantization.states import FakeQuantState

__all__ = [
    "AutoCalibration",
    "ClipStdObserver",
    "DefaultQconfigSetter",
    "FakeQuantState",
    "FakeQuantize",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MixObserver",
    "ModuleNameQconfigSetter",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "Observer",
    "ObserverSpec",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "QConfig",
    "QConfigSetter",
    "SiteChoice",
    "auto_calibrate",
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
    "reset_scale",
    "set_fake_quantize",
]
