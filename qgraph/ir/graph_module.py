"""The module that holds a graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from qgraph.ir.evaluate import bind_inputs


class CheckedGraphModule(fx.GraphModule):
    """A `GraphModule` that names the input when it is called with too many, missing or unknown ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            bind_inputs(self.graph, args, kwargs)
            raise
