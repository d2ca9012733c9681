"""Quantization numerics on plain tensors: formats, parameters, rounding, rescaling, tables.

Imports torch only; knows nothing of graphs. Every function states its arithmetic exactly, because the
simulator, fake quantization and the written specification must agree bit for bit.
"""

from qgraph.numerics.arithmetic import Arithmetic, parse_arithmetic
from qgraph.numerics.aten import AtenCat, AtenPool, AtenRequantize
from qgraph.numerics.aten_functions import TwoTables, has_two_tables, two_tables
from qgraph.numerics.engine_softmax import EngineSoftmax
from qgraph.numerics.engine_sums import AddFactors, EngineSum, Zeros, in_vector_loop
from qgraph.numerics.engines import EngineRule, Fbgemm, MeanRule, OneDnn
from qgraph.numerics.factor import Factor
from qgraph.numerics.formats import (
    FloatFormat,
    Format,
    QType,
    as_format,
    float16,
    float32,
    parse_format,
    parse_qtype,
    qint4,
    qint8,
    qint16,
    qint32,
    quint8,
)
from qgraph.numerics.onednn import one_column_is_wrong
from qgraph.numerics.pairs import dispatches_pairs, pair_sums, pairs_may_saturate
from qgraph.numerics.qparams import QParams, Scheme, choose_qparams, qparams_from_scale
from qgraph.numerics.quantize import (
    RECIPROCAL,
    QuantizeRule,
    ZeroPoint,
    bias_codes,
    dequantize,
    fake_quantize,
    parse_quantize_rule,
    quantize,
)
from qgraph.numerics.requantize import (
    RequantizeRule,
    Rule,
    ScaleForm,
    encode_common_shift,
    encode_fixed_point,
    parse_rule,
)
from qgraph.numerics.rounding import Overflow, Rounding, round_float, rounding_shift_right
from qgraph.numerics.segment_tables import SegmentForm, SegmentTable, build_segments, lookup_segments
from qgraph.numerics.tables import ScalarFunction, build_steps, build_table, check_intervals, lookup

__all__ = [
    "RECIPROCAL",
    "AddFactors",
    "Arithmetic",
    "AtenCat",
    "AtenPool",
    "AtenRequantize",
    "EngineRule",
    "EngineSoftmax",
    "EngineSum",
    "Factor",
    "Fbgemm",
    "FloatFormat",
    "Format",
    "MeanRule",
    "OneDnn",
    "Overflow",
    "QParams",
    "QType",
    "QuantizeRule",
    "RequantizeRule",
    "Rounding",
    "Rule",
    "ScalarFunction",
    "ScaleForm",
    "Scheme",
    "SegmentForm",
    "SegmentTable",
    "TwoTables",
    "ZeroPoint",
    "Zeros",
    "as_format",
    "bias_codes",
    "build_segments",
    "build_steps",
    "build_table",
    "check_intervals",
    "choose_qparams",
    "dequantize",
    "dispatches_pairs",
    "encode_common_shift",
    "encode_fixed_point",
    "fake_quantize",
    "float16",
    "float32",
    "has_two_tables",
    "in_vector_loop",
    "lookup",
    "lookup_segments",
    "one_column_is_wrong",
    "pair_sums",
    "pairs_may_saturate",
    "parse_arithmetic",
    "parse_format",
    "parse_qtype",
    "parse_quantize_rule",
    "parse_rule",
    "qint4",
    "qint8",
    "qint16",
    "qint32",
    "qparams_from_scale",
    "quantize",
    "quint8",
    "round_float",
    "rounding_shift_right",
    "two_tables",
]
