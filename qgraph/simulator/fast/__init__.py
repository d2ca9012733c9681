"""Fast kernels: the bits of the reference kernels, by oneDNN, `_int_mm` and exact floating point.

A kernel is prepared for one call of a graph. It packs the weights, and chooses the fastest way that is proven exact for
every input within the bounds of the codes; a call without such a way runs the reference kernel.
"""

from qgraph.simulator.fast.elementwise import KERNELS as ELEMENTWISE
from qgraph.simulator.fast.functions import FUNCTIONS
from qgraph.simulator.fast.products import KERNELS as PRODUCTS
from qgraph.simulator.fast.windows import KERNELS as WINDOWS
from qgraph.simulator.kernel import PreparedKernel

KERNELS: dict[str, PreparedKernel] = {
    name: PreparedKernel(prepare) for name, prepare in {**PRODUCTS, **ELEMENTWISE, **WINDOWS}.items()
}

__all__ = ["FUNCTIONS", "KERNELS"]
