"""Order by value where values are rounded: of equal ones the first comes first, as in integers.

torch leaves the order of equal values open, and rounding makes many values equal.
"""

from __future__ import annotations

import torch
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op_table import ARGSORT, OPS, TOP_INDICES
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.states import FakeQuantState

_ROUNDED = (FakeQuantState.QAT, FakeQuantState.VALIDATION)


class _Ordering(nn.Module):
    """Args:
    source: the site whose values are put in order.
    """

    def __init__(self, source: FakeQuantize) -> None:
        super().__init__()
        self._source = [source]  # in a list: the site is no part of this module

    def rounded(self) -> bool:
        """Whether the values lie on a grid now."""
        return self._source[0].state in _ROUNDED


class Argsort(_Ordering):
    """`torch.argsort`, stable where values are rounded."""

    def __init__(self, source: FakeQuantize, dim: int, descending: bool, stable: bool) -> None:
        super().__init__(source)
        self.dim, self.descending, self.stable = dim, descending, stable

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Indices (int64) that put `values` (any shape) in order along `dim`."""
        return QF.argsort(values, self.dim, self.descending, self.stable or self.rounded())


class TopIndices(_Ordering):
    """The indices of `torch.topk`, equal values in order where values are rounded."""

    def __init__(self, source: FakeQuantize, k: int, dim: int, largest: bool, sorted: bool) -> None:
        super().__init__(source)
        self.k, self.dim, self.largest, self.sorted = k, dim, largest, sorted

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Indices (int64) of the `k` extreme `values` (any shape) along `dim`."""
        if not self.rounded():
            return QF.top_indices(values, self.k, self.dim, self.largest, self.sorted)
        return QF.argsort(values, self.dim, self.largest, True).narrow(self.dim, 0, self.k)


ORDERINGS: dict[object, type[Argsort] | type[TopIndices]] = {ARGSORT: Argsort, TOP_INDICES: TopIndices}
for _op, _module in ((ARGSORT, Argsort), (TOP_INDICES, TopIndices)):
    OPS.add_module(_op, _module)
