"""qgraph: float PyTorch models to bit-exact integer graphs for edge accelerators.

gm = qgraph.trace(model, example_inputs)              # what the model does, as a verified graph
qat = qgraph.prepare(model, example_inputs)           # ready for calibration and training
qgraph.calibrate(qat, loader)
integer = qgraph.convert(qat)                         # integer operators
y = qgraph.Simulator(integer)(x)                      # exactly what the hardware computes
qgraph.save(integer, "model.qgraph")                  # and back: qgraph.load
qgraph.draw(integer, "graph.svg")
"""

from qgraph.analysis import Cause, ConsistencyReport, SiteConsistency, check_consistency, compare_sites
from qgraph.artifact import load, save
from qgraph.capture import PrepareMethod, Tracer, trace
from qgraph.errors import (
    ArtifactError,
    CaptureError,
    DrawError,
    InternalError,
    MissingKernel,
    NumericCheckError,
    PassError,
    QGraphError,
    QuantizationError,
    StateError,
    TargetError,
    UserError,
    VerifyError,
)
from qgraph.export import export_onnx
from qgraph.ir.node_info import ExampleInputs, GraphInfo, NodeInfo, Refusal, graph_info, info
from qgraph.ir.paths import PathModel
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.nn import DeQuantStub, FloatFunctional, QuantStub
from qgraph.numerics import QType, float16, float32, qint4, qint8, qint16, qint32, quint8
from qgraph.pipeline import CheckLevel, Pass, PassContext, PassResult, Pipeline, RewritePass
from qgraph.quantization import (
    DefaultQconfigSetter,
    Examples,
    FakeQuantState,
    MinMaxObserver,
    ModuleNameQconfigSetter,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    calibrate,
    calibration_8bit_weight_16bit_act_qconfig_setter,
    convert,
    convert_pipeline,
    default_calibration_qconfig_setter,
    default_qat_qconfig_setter,
    get_qconfig,
    prepare,
    prepare_pipeline,
    qat_8bit_weight_16bit_act_qconfig_setter,
    set_fake_quantize,
)
from qgraph.simulator import Simulator, SimulatorRun
from qgraph.targets import Target, get_target, list_targets
from qgraph.viz import DumpObserver, draw, draw_diff

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Cause",
    "CheckLevel",
    "ConsistencyReport",
    "DeQuantStub",
    "DefaultQconfigSetter",
    "DrawError",
    "DumpObserver",
    "ExampleInputs",
    "Examples",
    "FakeQuantState",
    "FloatFunctional",
    "GraphInfo",
    "InternalError",
    "MinMaxObserver",
    "MissingKernel",
    "ModuleNameQconfigSetter",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NodeInfo",
    "NumericCheckError",
    "Pass",
    "PassContext",
    "PassError",
    "PassResult",
    "PathModel",
    "PerChannelMinMaxObserver",
    "Pipeline",
    "PrepareMethod",
    "QConfig",
    "QGraphError",
    "QType",
    "QuantStub",
    "QuantizationError",
    "Refusal",
    "RewritePass",
    "Simulator",
    "SimulatorRun",
    "SiteConsistency",
    "Stage",
    "StateError",
    "Target",
    "TargetError",
    "Tracer",
    "UserError",
    "VerifyError",
    "__version__",
    "calibrate",
    "calibration_8bit_weight_16bit_act_qconfig_setter",
    "check_consistency",
    "compare_sites",
    "convert",
    "convert_pipeline",
    "default_calibration_qconfig_setter",
    "default_qat_qconfig_setter",
    "draw",
    "draw_diff",
    "export_onnx",
    "float16",
    "float32",
    "get_qconfig",
    "get_target",
    "graph_info",
    "info",
    "list_targets",
    "load",
    "prepare",
    "prepare_pipeline",
    "print_graph",
    "qat_8bit_weight_16bit_act_qconfig_setter",
    "qint4",
    "qint8",
    "qint16",
    "qint32",
    "quint8",
    "save",
    "set_fake_quantize",
    "trace",
]
