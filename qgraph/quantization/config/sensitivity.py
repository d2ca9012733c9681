"""Sensitivity tables and the setters they drive.

A table has the columns op_name, sensitive_type (`activation` or `weight`), op_type, a metric, and quant_dtype. An
activation row stands for the result of a site, a weight row for its weight.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from qgraph.errors import UserError, did_you_mean
from qgraph.numerics import Format, qint16
from qgraph.quantization.config.qconfig import Setting
from qgraph.quantization.config.query import SiteQuery

KINDS = ("activation", "weight")
_FIXED = ("op_name", "sensitive_type", "op_type", "quant_dtype")
_FIX = "give rows (op_name, sensitive_type, op_type, metric, quant_dtype), dicts, or a .csv or .json file of them"


@dataclass(frozen=True)
class SensitiveRow:
    """One row: how much the output suffers when only this is quantized."""

    site: str
    kind: str
    metric: float


def read_table(table: Any) -> tuple[SensitiveRow, ...]:
    """The rows of a table, the most sensitive first; rows of equal metric keep their order.

    Args:
        table: rows, dicts, or the path of a .csv or .json file of dicts.

    Raises:
        UserError: the file cannot be read, or a row lacks a column.
    """
    rows = _read_file(Path(table)) if isinstance(table, (str, Path)) else table
    if isinstance(rows, Mapping) or not isinstance(rows, Sequence) or not rows:
        raise UserError(f"a sensitivity table is a {type(rows).__name__} without rows", fix=_FIX)
    found = [_row(row, index) for index, row in enumerate(rows)]
    return tuple(sorted(found, key=lambda row: -row.metric))


def _read_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".json":
            return json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the sensitivity table {path} cannot be read", why=f"{type(error).__name__}: {error}", fix=_FIX
        ) from error
    raise UserError(f"the sensitivity table {path} is neither .csv nor .json", fix=_FIX)


def _row(row: Any, index: int) -> SensitiveRow:
    if isinstance(row, Mapping):
        row = _values(row, index)
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) < 4:
        raise UserError(f"row {index} of the sensitivity table is {row!r}", fix=_FIX)
    site, kind, metric = row[0], row[1], _number(row[3])
    if kind not in KINDS:
        raise UserError(
            f"row {index} of the sensitivity table has sensitive_type {kind!r}", fix=did_you_mean(str(kind), KINDS)
        )
    if metric is None or not math.isfinite(metric):
        raise UserError(f"row {index} of the sensitivity table has the metric {row[3]!r}", fix="give a finite number")
    return SensitiveRow(str(site), kind, metric)


def _values(row: Mapping[Any, Any], index: int) -> tuple[Any, ...]:
    """A dict as a row; the metric is the column with none of the fixed names."""
    metrics = [name for name in row if name not in _FIXED]
    if "op_name" not in row or "sensitive_type" not in row or len(metrics) != 1:
        raise UserError(
            f"row {index} of the sensitivity table has the columns {sorted(map(str, row))}",
            why="it needs op_name, sensitive_type and one metric",
            fix=_FIX,
        )
    return (row["op_name"], row["sensitive_type"], row.get("op_type"), row[metrics[0]], row.get("quant_dtype"))


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def most_sensitive(
    rows: Sequence[SensitiveRow], ratio: float | None, topk: int | None
) -> tuple[Sequence[SensitiveRow], Sequence[SensitiveRow]]:
    """The rows a ratio (rounded up) or a number picks, and the others; all of them if both are None.

    Raises:
        UserError: both are given, or one is out of range.
    """
    if ratio is not None and topk is not None:
        raise UserError("a sensitivity setting has a ratio and a topk", fix="give one of them")
    count = len(rows)
    if topk is not None:
        if isinstance(topk, bool) or not isinstance(topk, int) or not 0 <= topk <= len(rows):
            raise UserError(f"topk is {topk!r}", fix=f"give a whole number from 0 to {len(rows)}, the table's rows")
        count = topk
    if ratio is not None:
        share = _number(ratio)
        if share is None or not 0 <= share <= 1:
            raise UserError(f"ratio is {ratio!r}", fix="give a number from 0 to 1")
        count = math.ceil(Fraction(str(ratio)) * len(rows))  # 0.1 of 30 rows is 3, whatever binary says
    return rows[:count], rows[count:]


@dataclass(frozen=True)
class SensitivityQconfigSetter:
    """Gives rows of a table other formats; what the target cannot do becomes the nearest it can, with a note.

    Args:
        formats: format by site and kind (`activation` or `weight`).
        label: how its decisions are cited.
    """

    formats: Mapping[tuple[str, str], Format]
    label: str

    @property
    def name(self) -> str:
        return self.label

    def decide(self, query: SiteQuery) -> Setting | None:
        output, weight = (self._format(query, kind) for kind in KINDS)
        if output is None and weight is None:
            return None
        return Setting(output=output, weight=weight, preference=True)

    def _format(self, query: SiteQuery, kind: str) -> Format | None:
        return next((self.formats[name, kind] for name in query.names if (name, kind) in self.formats), None)

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        known = {name for query in queries for name in query.names}
        return list(dict.fromkeys(site for site, _ in self.formats if site not in known))


def _by_site(rows: Sequence[SensitiveRow], value: Format) -> dict[tuple[str, str], Format]:
    return {(row.site, row.kind): value for row in rows}


def sensitivity_setter(
    table: Any,
    label: str,
    *,
    ratio: float | None = None,
    topk: int | None = None,
    kinds: Sequence[str] = KINDS,
    low: Format | None = None,
    high: Format = qint16,
) -> SensitivityQconfigSetter:
    """A setter that gives the most sensitive rows of some kinds `high`, and the others `low` unless it is None.

    Raises:
        UserError: the table or the numbers cannot be used.
    """
    chosen, others = most_sensitive([row for row in read_table(table) if row.kind in kinds], ratio, topk)
    formats = _by_site(chosen, high)
    if low is not None:
        formats = {**_by_site(others, low), **formats}
    return SensitivityQconfigSetter(formats, label)


def sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(
    table: Any, ratio: float | None = None, topk: int | None = None
) -> SensitivityQconfigSetter:
    """The most sensitive rows of a table in int16, for calibration; a default follows it in the setters.

    Raises:
        UserError: the table or the numbers cannot be used.
    """
    label = "sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter"
    return sensitivity_setter(table, label, ratio=ratio, topk=topk)


def sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(
    table: Any, ratio: float | None = None, topk: int | None = None
) -> SensitivityQconfigSetter:
    """The same rows, for training.

    Raises:
        UserError: the table or the numbers cannot be used.
    """
    label = "sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter"
    return sensitivity_setter(table, label, ratio=ratio, topk=topk)


sensitive_op_8bit_weight_16bit_act_calibration_setter = sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter
sensitive_op_8bit_weight_16bit_act_qat_setter = sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter
