"""The demo that `qgraph demo` runs."""

from qgraph.demo.story import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
