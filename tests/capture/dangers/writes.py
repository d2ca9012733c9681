"""Indexing and writing in place."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.dangers.common import (
    Danger,
    image,
    indices,
    of,
    one,
    padded,
)


def view_of_view(m, x):
    y = x * 2
    y[:, 1:][:, 0].add_(5)
    y[:, :2][..., 3:][:, 0] = 7.0
    return y


def view_chain_through_reshape(m, x):
    y = x * 2
    y.view(x.shape[0], -1)[:, 3:9].mul_(2)
    y.transpose(1, 2)[:, 0].sub_(1)
    y.unsqueeze(1).squeeze(1)[:, 0, 0] = 3.0
    return y


def written_twice_through_a_slice(m, x):
    y = x * 2
    row = y[:, 0]
    row.add_(1)
    part = row[:, 1:4]
    row.mul_(2)
    part -= 3
    return y, row, part


def pure_until_a_view_is_written(m, x):
    y = m.linear(x).relu_()
    y += 1
    y.view(-1)[0:3].mul_(2)
    return y


def written_in_a_list(m, x):
    parts = [x * scale for scale in (1, 2)]
    for part in parts:
        part[..., 0] += parts[0][..., 1]
    return torch.stack(parts)


def write_through_the_older_view(m, x):
    y = x * 2
    first, second = y[:, :2], y[:, 1:3]
    first.add_(1)
    second.mul_(2)
    first.sub_(x[:, :2])
    return y, first, second


def chunks_written(m, x):
    y = x * 2
    a, b = y.chunk(2, -1)
    a.relu_()
    b += a
    return y, torch.cat([b, a], -1)


def splits_written(m, x):
    y = x + 1
    for position, part in enumerate(y.split([1, 2, 3], dim=-1)):
        part.mul_(position + 2)
    return y


def unbound_written(m, x):
    y = x + 1
    rows = y.unbind(1)
    rows[1].copy_(rows[0] * 2)
    rows[2][:] = 5.0
    return y


def select_and_narrow_written(m, x):
    y = x + 1
    y.select(1, 0).zero_()
    y.narrow(2, 1, 2).fill_(3.0)
    y.diagonal(dim1=1, dim2=2).add_(10)
    return y


def set_item_then_view(m, x):
    y = x * 2
    y[:, 0] = 0.0
    view = y[:, 1]
    view += 1
    return y


def set_item_then_size(m, x):
    y = torch.zeros(x.shape[0], 5, 6)
    y[:, 1:] = x
    return y.view(x.shape[0], -1), y[: x.shape[0] - 1].sum()


def results_thrown_away(m, x):
    y = x * 2
    y.relu_()
    y.add_(1)
    F.leaky_relu(y, 0.1, inplace=True)
    torch.sigmoid_(y)
    z = y
    y += x
    return z


def aliasing_outputs(m, x):
    y = x * 2
    view = y[:, 0]
    flat = y.view(x.shape[0], -1)
    y.add_(1)
    return y, view, flat, x


def write_after_reading(m, x):
    y = x * 2
    before = y + 0
    half = y[:, :2]
    mean = half.mean(1)
    y.mul_(-1)
    return before, half, mean, y


def writes_in_a_loop(m, x):
    out = torch.empty(x.shape[0], 8, 6)
    for step in range(4):
        out[:, 2 * step] = x[:, step]
        out[:, 2 * step + 1] = out[:, 2 * step].roll(1, -1)
    return out


def accumulated_in_place(m, x):
    total = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        total += x[:, step]
        total[:, step] = total[:, step] * 2
    return total


def comparison_in_place(m, x):
    y = x * 2
    y.gt_(0)
    z = x.clone()
    z.logical_not_()
    return y * 2, z


def metadata_in_place(m, x):
    y = x * 2
    y.unsqueeze_(1).squeeze_(1).transpose_(1, 2)
    z = x[0] * 1
    z.t_()
    return y + 1, z


def cast_in_place(m, i):
    y = i.float()
    y += i
    y.mul_(torch.tensor(0.5, dtype=torch.float64))
    z = i.clone()
    z += torch.ones_like(i, dtype=torch.int16)
    return y, z


def shifted_in_place(m, x):
    y = x * 2
    y[:, 1:] = y[:, :-1].clone()
    y[:, [0, 2]] = y[:, [2, 0]]
    return y


def index_writes(m, x):
    y = torch.zeros_like(x)
    top = x.topk(2, -1)
    y.scatter_(-1, top.indices, top.values)
    y.scatter_add_(-1, top.indices, torch.ones_like(top.values))
    y.index_add_(1, torch.tensor([0, 0, 3]), x[:, :3], alpha=0.5)
    y.index_put_((torch.tensor([0]), torch.tensor([1, 2])), torch.tensor(9.0), accumulate=True)
    y.index_fill_(2, torch.tensor([5]), 1.0)
    return y, y.gather(-1, top.indices.flip(-1))


def mask_writes(m, x, mask):
    y = x.clone()
    y.masked_fill_(mask[..., None], float("-inf"))
    z = x * 1
    z[mask] = 0.0
    z[~mask] += 1
    w = x.masked_scatter(mask[..., None].expand_as(x), torch.ones_like(x))
    return y.softmax(1), z, w


def in_place_on_input_view(m, x):
    x[:, 0] = 0.0
    first = x[:, 1]
    first += 1
    return x.sum(-1), first


def out_arguments(m, x):
    out = torch.empty(0)
    torch.mul(x, 2, out=out)
    y = torch.empty_like(x)
    torch.add(x, 1, out=y[:, :])
    values, index = torch.empty(0), torch.empty(0, dtype=torch.long)
    torch.max(y, dim=-1, out=(values, index))
    return out, y, values, index


def out_argument_is_an_operand(m, x):
    y = x * 2
    torch.add(y, x, out=y)
    view = y[:, :2]
    torch.mul(view, 3, out=view)
    return y


def copied_layout(m, x):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    y.copy_(x)
    return y.permute(0, 2, 3, 1).view(x.shape[0], -1)


def swapped_names(m, x):
    a, b = x * 1, x * 2
    a, b = b, a
    a += b
    b = a
    b *= 2
    return a - b, a


def constant_written(m, x):
    table = torch.from_numpy(np.zeros(6, dtype=np.float32))
    table += x[0, 0]
    return x + table


def foreach(m, x):
    parts = [part.clone() for part in x.chunk(3, -1)]
    torch._foreach_mul_(parts, 2.0)
    torch._foreach_add_(parts, 1.0)
    return torch.cat(parts, -1)


DANGERS = [
    Danger("view_of_view", of(view_of_view), one),
    Danger("view_chain_through_reshape", of(view_chain_through_reshape), one),
    Danger("written_twice_through_a_slice", of(written_twice_through_a_slice), one),
    Danger("pure_until_a_view_is_written", of(pure_until_a_view_is_written, linear=nn.Linear(6, 6)), one),
    Danger("written_in_a_list", of(written_in_a_list), one),
    Danger("write_through_the_older_view", of(write_through_the_older_view), one),
    Danger("chunks_written", of(chunks_written), one),
    Danger("splits_written", of(splits_written), one),
    Danger("unbound_written", of(unbound_written), one),
    Danger("select_and_narrow_written", of(select_and_narrow_written), one),
    Danger("set_item_then_view", of(set_item_then_view), one),
    Danger("set_item_then_size", of(set_item_then_size), one),
    Danger("results_thrown_away", of(results_thrown_away), one),
    Danger("aliasing_outputs", of(aliasing_outputs), one),
    Danger("write_after_reading", of(write_after_reading), one),
    Danger("writes_in_a_loop", of(writes_in_a_loop), one),
    Danger("accumulated_in_place", of(accumulated_in_place), one),
    Danger("comparison_in_place", of(comparison_in_place), one),
    Danger("metadata_in_place", of(metadata_in_place), one),
    Danger("cast_in_place", of(cast_in_place), indices),
    Danger("shifted_in_place", of(shifted_in_place), one),
    Danger("index_writes", of(index_writes), one),
    Danger("mask_writes", of(mask_writes), padded),
    Danger("in_place_on_input_view", of(in_place_on_input_view), one),
    Danger("out_arguments", of(out_arguments), one),
    Danger("out_argument_is_an_operand", of(out_argument_is_an_operand), one),
    Danger("copied_layout", of(copied_layout), image),
    Danger("swapped_names", of(swapped_names), one),
    Danger("constant_written", of(constant_written), one),
    Danger("foreach", of(foreach), one),
]
