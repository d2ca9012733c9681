"""Quantization of captured graphs: configuration, observers, states, and the three steps of a user's road."""

from qgraph.quantization.auto_calibrate import AutoCalibration, SiteChoice, auto_calibrate
from qgraph.quantization.calibrate import calibrate
from qgraph.quantization.config.qconfig import (
    QConfig,
    Setting,
    Threshold,
    get_qconfig,
)
from qgraph.quantization.config.query import (
    SiteQuery,
)
from qgraph.quantization.config.sensitivity import (
    sensitive_op_8bit_weight_16bit_act_calibration_setter,
    sensitive_op_8bit_weight_16bit_act_qat_setter,
    sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter,
    sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter,
)
from qgraph.quantization.config.setters import (
    DefaultQconfigSetter,
    ModuleNameQconfigSetter,
    ModuleTypeQconfigSetter,
    QConfigSetter,
    calibration_8bit_weight_16bit_act_qconfig_setter,
    default_calib_8bit_fake_quant_qconfig,
    default_calib_8bit_weight_32bit_out_fake_quant_qconfig,
    default_calib_16bit_fake_quant_qconfig,
    default_calibration_qconfig_setter,
    default_qat_8bit_fake_quant_qconfig,
    default_qat_qconfig_setter,
    qat_8bit_weight_16bit_act_qconfig_setter,
    qat_8bit_weight_16bit_fixed_act_qconfig_setter,
)
from qgraph.quantization.config.templates import (
    ConvDtypeTemplate,
    MatmulDtypeTemplate,
    ModuleNameTemplate,
    QconfigSetter,
    SensitivityTemplate,
)
from qgraph.quantization.convert import convert, convert_pipeline, freeze
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.improve import SiteGain, correct_bias, equalize
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
from qgraph.quantization.paths import Examples
from qgraph.quantization.plan import Plan, PlanChange, PlannedSite
from qgraph.quantization.prepare import prepare, prepare_pipeline
from qgraph.quantization.reset_scale import reset_scale
from qgraph.quantization.sites import set_fake_quantize
from qgraph.quantization.states import FakeQuantState

__all__ = [
    "AutoCalibration",
    "ClipStdObserver",
    "ConvDtypeTemplate",
    "DefaultQconfigSetter",
    "Examples",
    "FakeQuantState",
    "FakeQuantize",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "MatmulDtypeTemplate",
    "MinMaxObserver",
    "MixObserver",
    "ModuleNameQconfigSetter",
    "ModuleNameTemplate",
    "ModuleTypeQconfigSetter",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "Observer",
    "ObserverSpec",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "Plan",
    "PlanChange",
    "PlannedSite",
    "QConfig",
    "QConfigSetter",
    "QconfigSetter",
    "SensitivityTemplate",
    "Setting",
    "SiteChoice",
    "SiteGain",
    "SiteQuery",
    "Threshold",
    "auto_calibrate",
    "calibrate",
    "calibration_8bit_weight_16bit_act_qconfig_setter",
    "convert",
    "convert_pipeline",
    "correct_bias",
    "default_calib_8bit_fake_quant_qconfig",
    "default_calib_8bit_weight_32bit_out_fake_quant_qconfig",
    "default_calib_16bit_fake_quant_qconfig",
    "default_calibration_qconfig_setter",
    "default_qat_8bit_fake_quant_qconfig",
    "default_qat_qconfig_setter",
    "equalize",
    "freeze",
    "get_qconfig",
    "prepare",
    "prepare_pipeline",
    "qat_8bit_weight_16bit_act_qconfig_setter",
    "qat_8bit_weight_16bit_fixed_act_qconfig_setter",
    "reset_scale",
    "sensitive_op_8bit_weight_16bit_act_calibration_setter",
    "sensitive_op_8bit_weight_16bit_act_qat_setter",
    "sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter",
    "sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter",
    "set_fake_quantize",
]
