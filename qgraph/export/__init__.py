"""Prepared graphs as files of other tools."""

from qgraph.export.onnx import ONNXRUNTIME_OPTIONS, export_onnx

__all__ = ["ONNXRUNTIME_OPTIONS", "export_onnx"]
