"""A frozen graph on onnxruntime's CPU kernels: the engine of the target onnxruntime.

The graph goes through `export_onnx`, so that the exporter is checked as well. In the form "qoperator" onnxruntime
computes what the file says at every optimization level; every site's codes are made an output.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qgraph.export import ONNXRUNTIME_OPTIONS, export_onnx
from qgraph.export.walk import Form

# int32 sums wrap.
OVERFLOW = True

SUPPORTED = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "linear", "matmul", "add", "sub", "mul", "cat", "stack", "quant_stub", "item"),
        *("sigmoid", "silu", "tanh", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "exp", "reciprocal", "rsqrt"),
        *("sqrt", "erf", "floor", "ceil", "round", "sign"),
        *("relu", "relu6", "clamp", "max_pool1d", "max_pool2d"),
        *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"),
        *("reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "slice"),
        *("select", "split", "chunk", "narrow", "pad"),
    }
)


def available() -> str | None:
    """Why onnxruntime cannot be asked here; None if it can."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_vnni_supported():
        return "the processor has no AVX512-VNNI, where products of uint8 and int8 saturate at 16 bits"
    return None


def run(
    frozen: fx.GraphModule, inputs: tuple[torch.Tensor, ...], *, form: Form = "qoperator", optimized: bool = True
) -> dict[str, torch.Tensor]:
    """The codes of every quantized site.

    Args:
        frozen: what `freeze` returned, for the target onnxruntime.
        inputs: the model's inputs.
        form: form of the ONNX file.
        optimized: whether onnxruntime may change the graph; in the form "qdq" outputs at every site keep it from
            doing so.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(frozen, Path(folder) / "model.onnx", form=form)
        model = onnx.load(file)
    sites = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "qgraph.sites"))
    types = {value.name: value for value in model.graph.value_info}
    given = {value.name for value in model.graph.output}
    model.graph.output.extend(types[name] for name in dict.fromkeys(sites.values()) if name not in given)
    found = outputs(model.SerializeToString(), inputs, optimized=optimized, wanted=list(sites.values()))
    return dict(zip(sites, found, strict=True))


def outputs(
    model: bytes | str, inputs: tuple[torch.Tensor, ...], *, optimized: bool, wanted: list[str] | None = None
) -> list[torch.Tensor]:
    """What onnxruntime computes.

    Args:
        model: an ONNX file, or its content.
        inputs: in the order of the model's inputs.
        optimized: whether onnxruntime may change the graph.
        wanted: names of outputs; all of them if None.
    """
    session = session_of(model, optimized=optimized)
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(wanted, feed)]


def session_of(model: bytes | str, *, optimized: bool, saved: str = "") -> Any:
    """A session with the options the export asks for; the optimized graph is written to `saved`."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = saved
    for name, value in ONNXRUNTIME_OPTIONS.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
