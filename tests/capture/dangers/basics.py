"""Each of the known ways for a capture to go wrong, once."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tests.capture.dangers.common import (
    Danger,
    image,
    of,
    one,
)


def inplace_on_view(m, x):
    y = x * 2
    y[:, 0].add_(1)
    y[:, 1:3].mul_(3)
    return y


def inplace_on_transposed_view(m, x):
    y = x * 2
    y.transpose(1, 2).add_(torch.ones(6, 1))
    return y


def inplace_augmented_slice(m, x):
    y = x * 2
    y[..., 0] += 1
    y[..., 1:] *= x[..., 1:]
    return y


def inplace_on_input(m, x):
    x.add_(1)
    return x * 2


def setitem_into_zeros(m, x):
    out = torch.zeros(x.shape[0], 4, 6)
    out[:, :2] = x[:, :2]
    out[:, 3] = x[:, 0] * 2
    return out


class PlainAttributeAccumulates(nn.Module):
    def __init__(self):
        super().__init__()
        self.total = torch.zeros(1)

    def forward(self, x):
        self.total = self.total + x.sum()
        return x + self.total


class BufferUpdate(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x * self.count


def shape_control_flow(m, x):
    if x.shape[-1] > 4:
        x = x[..., :4]
    for i in range(x.size(1)):
        x = x + i
    return x.reshape(x.shape[0], -1)


def item_scale(m, x):
    return x * x.abs().max().item()


def data_branch(m, x):
    return x * 2 if x.sum() > 0 else x - 1


def nonzero_values(m, x):
    return x.flatten()[torch.nonzero(x.flatten() > 0)[:, 0]].sum()


def nonzero_shape(m, x):
    return x * torch.nonzero(x > 0).shape[0]


def arange_positions(m, x):
    return x + torch.arange(x.shape[1], device=x.device).view(1, -1, 1)


def from_numpy_constant(m, x):
    return x + torch.from_numpy(np.arange(6, dtype=np.float32))


def numpy_round_trip(m, x):
    return torch.from_numpy(np.round(x.numpy())) + x


@torch.jit.script
def _scripted(a: torch.Tensor) -> torch.Tensor:
    return a * 2 + 1


def scripted_function(m, x):
    return _scripted(x) + x


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def autograd_function(m, x):
    return _Double.apply(x) + 1


def sdpa(m, x):
    return F.scaled_dot_product_attention(x, x, x)


def einsum(m, x):
    return torch.einsum("bij,bkj->bik", x, x)


def dict_output(m, x):
    return {"a": x + 1, "b": [x * 2, None], "c": (x, {"d": x.mean()})}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    label: str = "x"


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def nested_input(m, batch, scale):
    return batch["image"] * scale + batch["points"][0].mean() - batch["points"][1]


def nested_example(size=2):
    return ({"image": torch.randn(size, 3), "points": [torch.randn(size, 5), torch.randn(size, 1)]}, 0.5)


def dataclass_input(m, batch):
    return batch.logits + batch.hidden[0]


def none_input(m, x, mask):
    return x if mask is None else x * mask


def functional_weight(m, x):
    return F.linear(x, m.weight.t() @ m.weight)


def module_made_in_forward(m, x):
    return nn.Softmax(dim=-1)(nn.Flatten()(x))


class _Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


def parametrized() -> nn.Module:
    return nn.Sequential(parametrize.register_parametrization(nn.Linear(6, 6), "weight", _Symmetric()))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    return model


def vmapped(m, x):
    return torch.vmap(lambda a: a * 2 + a.mean())(x)


def checkpointed(m, x):
    return checkpoint(lambda a: torch.relu(a) * 2, x, use_reentrant=False)


def autocast_region(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.linear(x).float()


def iterate_and_unpack(m, x):
    first, *rest = x.unbind(1)
    for row in rest:
        first = first + row
    a, b = x.chunk(2, dim=-1)
    return first[:, :3] + a[:, 0] - b[:, 1]


def random_in_forward(m, x):
    return x + torch.rand_like(x)


def multi_output_max(m, x):
    values, index = x.max(dim=-1)
    return values * 2, index, x.topk(2).values


def tensor_as_size(m, x):
    return x[:, : int(torch.tensor(3))] + torch.zeros(torch.tensor(6))


def tensor_index(m, x):
    index = torch.tensor([0, 2, 1])
    y = x.clone()
    y[:, index] = x[:, [3, 1, 0]] * 2
    return y


class MyConv(nn.Conv2d):
    """A subclass of a torch module that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


def mask_all_shortcut(m, x, mask):
    return x if mask.all() else x.masked_fill(~mask, 0.0)


def mask_example(size=2):
    return torch.randn(size, 4), torch.ones(size, 4, dtype=torch.bool)


def python_random(m, x):
    import random

    return x * random.random()


def transposed_properties(m, x):
    return x.mT @ x + x[0].T @ x[0]


def squeezes_and_len(m, x):
    return x.unsqueeze(0).squeeze(0).reshape(len(x), -1)


def tolist_constant(m, x):
    return x + sum(torch.tensor([1, 2]).tolist())


def tolist_of_input(m, x):
    return x + sum(x[0, 0].tolist())


def fill_and_zero(m, x):
    y = x.clone()
    y.zero_()
    y[0].fill_(2.0)
    return y + x


def copy_in_place(m, x):
    y = torch.empty(1, 4, 6).expand(x.shape).clone()
    y.copy_(x * 2)
    return y


def tied_calls(m, x):
    return F.linear(m.linear(x), m.linear.weight)


def mha(m, x):
    out, weights = m.attention(x, x, x)
    return out, weights


DANGERS = [
    Danger("inplace_on_view", of(inplace_on_view), one),
    Danger("inplace_on_transposed_view", of(inplace_on_transposed_view), one),
    Danger("inplace_augmented_slice", of(inplace_augmented_slice), one),
    Danger("inplace_on_input", of(inplace_on_input), one),
    Danger("setitem_into_zeros", of(setitem_into_zeros), one),
    Danger("plain_attribute_accumulates", PlainAttributeAccumulates, one, "state"),
    Danger("buffer_update", BufferUpdate, one, "state"),
    Danger("shape_control_flow", of(shape_control_flow), one),
    Danger("item_scale", of(item_scale), one, "scalar"),
    Danger("data_branch", of(data_branch), one, "scalar"),
    Danger("nonzero_values", of(nonzero_values), one),
    Danger("nonzero_shape", of(nonzero_shape), one, "data-shaped"),
    Danger("arange_positions", of(arange_positions), one),
    Danger("from_numpy_constant", of(from_numpy_constant), one),
    Danger("numpy_round_trip", of(numpy_round_trip), one, "numpy"),
    Danger("scripted_function", of(scripted_function), one),
    Danger("scripted_module", lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))), one),
    Danger("autograd_function", of(autograd_function), one),
    Danger("sdpa", of(sdpa), one),
    Danger("multihead_attention", of(mha, attention=nn.MultiheadAttention(6, 2, batch_first=True)), one),
    Danger(
        "transformer_encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        one,
    ),
    Danger("einsum", of(einsum), one),
    Danger("dict_output", of(dict_output), one),
    Danger("dataclass_output", of(lambda m, x: Output(x * 2, (x, x + 1))), one),
    Danger("namedtuple_output", of(lambda m, x: Pair(x * 2, x.sort().values)), one),
    Danger("return_type_output", of(lambda m, x: x.max(dim=1)), one),
    Danger("nested_input", of(nested_input), nested_example),
    Danger(
        "dataclass_input", of(dataclass_input), lambda size=2: (Output(torch.randn(size, 3), (torch.randn(size, 3),)),)
    ),
    Danger("none_input", of(none_input), lambda size=2: (torch.randn(size, 3), None)),
    Danger("shared_module", of(lambda m, x: m.linear(m.linear(x)), linear=nn.Linear(6, 6)), one),
    Danger("tied_weight", of(tied_calls, linear=nn.Linear(6, 6)), one),
    Danger("functional_weight", of(functional_weight, weight=nn.Parameter(torch.randn(6, 6))), one),
    Danger("module_made_in_forward", of(module_made_in_forward), one),
    Danger("parametrized_weight", parametrized, one),
    Danger("forward_hook", hooked, one),
    Danger("vmap", of(vmapped), one),
    Danger("checkpoint", of(checkpointed), one),
    Danger("autocast_region", of(autocast_region, linear=nn.Linear(6, 6)), one, "autocast"),
    Danger("iterate_and_unpack", of(iterate_and_unpack), one),
    Danger("random_in_forward", of(random_in_forward), one, "random"),
    Danger("python_random", of(python_random), one, "random"),
    Danger("multi_output_max", of(multi_output_max), one),
    Danger("tensor_as_size", of(tensor_as_size), one),
    Danger("tensor_index", of(tensor_index), one),
    Danger("leaf_subclass", lambda: MyConv(3, 4, 3), image),
    Danger("mask_all_shortcut", of(mask_all_shortcut), mask_example, "scalar"),
    Danger("transposed_properties", of(transposed_properties), one),
    Danger("squeezes_and_len", of(squeezes_and_len), one),
    Danger("tolist_constant", of(tolist_constant), one),
    Danger("tolist_of_input", of(tolist_of_input), one, "scalar"),
    Danger("fill_and_zero", of(fill_and_zero), one),
    Danger("copy_in_place", of(copy_in_place), one),
]
