"""The canonical operators: one entry each, with every spelling that means it.

To add an operator, add an entry to the section it belongs to (or call `OPS.define` from your own package), then its
lowering and kernels; `docs/adding_an_operator.md` shows where. Reports, patterns, checks, lowering and costs read this
table and need no change.
"""

from qgraph.ir.op_table.arithmetic import *
from qgraph.ir.op_table.comparison import *
from qgraph.ir.op_table.composites import *
from qgraph.ir.op_table.define import OPS as OPS
from qgraph.ir.op_table.functions import *
from qgraph.ir.op_table.indexing import *
from qgraph.ir.op_table.movement import *
from qgraph.ir.op_table.products import *
from qgraph.ir.op_table.reductions import *
from qgraph.ir.op_table.resampling import *
from qgraph.ir.op_table.selection import *
from qgraph.ir.op_table.structure import *
from qgraph.ir.op_table.tables import *
