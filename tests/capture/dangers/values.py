"""Values that decide: branches, sizes, loops, copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from tests.capture.dangers.common import (
    Danger,
    fixed,
    indices,
    nothing_found,
    of,
    one,
    padded,
)


def fixed_tables() -> list[tuple[Any, ...]]:
    rows = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]])
    return [(rows,), (rows * torch.tensor([[1.0], [-1], [1], [1], [1], [1]]),), (-rows,)]


def rows_chosen_by_value(m, x):
    total = torch.zeros(2)
    for row in x.reshape(3, 4)[x.reshape(3, 4)[:, 0] > 0]:
        total = total + row[:2]
    return total


def chunks_of_chosen_rows(m, x):
    chosen = x.reshape(6, 2)[x.reshape(6, 2)[:, 0] > 0]
    return sum(part.sum() * (index + 1) for index, part in enumerate(chosen.split(1)))


def unique_values(m, i):
    return torch.stack([(i == value).sum() for value in i[0].unique()]).max()


def count_by_len(m, x):
    return x * len(x[x > 0])


def index_by_argmax(m, x):
    return x[0, x.mean((0, 2)).argmax()], m.table[x.sum().gt(0).long()]


def one_hot(m, i):
    return F.one_hot(i, 10).float(), F.one_hot(i % 3, num_classes=3).sum(1)


def full_of_a_value(m, x):
    return torch.full((3,), x.max())


def any_finite(m, x):
    if torch.isnan(x).any():
        x = x.nan_to_num()
    return x * 2


def clamp_if_half(m, x):
    """As encoder layers of transformers do against overflow."""
    if x.dtype == torch.float16 and torch.isinf(x).any():
        x = x.clamp(-1e4, 1e4)
    return x * 2


def early_exit(m, x):
    for _ in range(3):
        x = x * 0.5
        if x.abs().max() < 0.1:
            break
    return x


def assert_on_values(m, x):
    assert x.abs().max() < 1e6
    torch._assert(bool((x == x).all()), "no NaN")
    return x * 2


def sorted_by_python(m, x):
    return torch.stack(sorted(x.unbind(1), key=lambda row: float(row.sum())), 1)


def lengths(m, x, mask):
    counts = (~mask).sum(1).tolist()
    return torch.stack([row[:count].mean(0) for row, count in zip(x, counts, strict=True)])


def through_bytes(m, x):
    return torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=torch.float32).view(x.shape) * 2


def printed(m, x):
    text = f"{x.shape} {x}" + repr(x.mean())
    return x * (2 if text else 3)


def deep_copied(m, x):
    return copy.deepcopy(x).mul_(2) + copy.copy(x) + x.clone()


_TABLE_BUFFER = torch.arange(12.0).view(2, 6)
DANGERS = [
    Danger("rows_chosen_by_value", of(rows_chosen_by_value), nothing_found, "data-shaped", fixed_tables),
    Danger("chunks_of_chosen_rows", of(chunks_of_chosen_rows), fixed, "data-shaped", fixed_tables),
    Danger("unique_values", of(unique_values), indices, "data-shaped"),
    Danger("count_by_len", of(count_by_len), one, "data-shaped"),
    Danger("index_by_argmax", of(index_by_argmax, table=_TABLE_BUFFER), one),
    Danger("one_hot", of(one_hot), indices),
    Danger("full_of_a_value", of(full_of_a_value), one),
    Danger("any_finite", of(any_finite), one, "scalar"),
    Danger("clamp_if_half", of(clamp_if_half), one),
    Danger("early_exit", of(early_exit), one, "scalar"),
    Danger("assert_on_values", of(assert_on_values), one, "scalar"),
    Danger("sorted_by_python", of(sorted_by_python), one, "scalar"),
    Danger("lengths", of(lengths), padded, "scalar"),
    Danger("through_bytes", of(through_bytes), one, "numpy"),
    Danger("printed", of(printed), one),
    Danger("deep_copied", of(deep_copied), one),
]
