"""One model, several graphs: one per path that its forward takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from qgraph.errors import UserError
from qgraph.ir.evaluate import bind_inputs
from qgraph.ir.node_info import graph_info
from qgraph.ir.op_table import GUARD, OPS


class PathModel(nn.Module):
    """Graphs of one model for several control-flow paths; a call runs the first graph that takes the inputs.

    Shapes, structure and plain values of the inputs decide, as each graph's input guard knows them.

    Args:
        graphs: one per path, in the order of the examples.
    """

    def __init__(self, graphs: Iterable[fx.GraphModule]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(graphs)

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs, in the order of the examples."""
        return tuple(self.paths)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the path for these inputs returns.

        Raises:
            UserError: no graph takes them.
        """
        return self.paths[self.path_of(args, kwargs)](*args, **kwargs)

    def path_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of the first graph that takes these inputs.

        Raises:
            UserError: none does; the message says why each refuses.
        """
        refusals = []
        for number, gm in enumerate(self.graphs):
            reason = refusal(gm, args, kwargs)
            if reason is None:
                return number
            refusals.append(f"path {number}: {reason.what} ({reason.why})")
        raise UserError(
            "these inputs take a path of the model that no graph was captured for",
            why="; ".join(refusals),
            fix="prepare the model with one more example: Examples(..., example) with inputs like these",
        )

    def mapped(self, function: Callable[[fx.GraphModule], fx.GraphModule]) -> PathModel:
        """The same paths with other graphs."""
        return PathModel([function(gm) for gm in self.graphs])

    def extra_repr(self) -> str:
        return f"{len(self.paths)} paths of {graph_info(self.graphs[0]).model}"


def refusal(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> UserError | None:
    """Why a graph does not take these inputs; None if it does."""
    guard = next((module for module in gm.children() if OPS.module(type(module)) is GUARD), None)
    try:
        values = bind_inputs(gm.graph, args, kwargs)
        if guard is not None:
            guard(*values.values())
    except UserError as error:
        return error
    return None
