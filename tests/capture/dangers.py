"""Small models, each with one thing that makes graph capture go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    """A model, its example inputs, and the flag its capture must raise (None: it must be exact)."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[Any, ...]]
    flag: str | None = None


class Function(nn.Module):
    """A forward given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            if isinstance(child, torch.Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)
        self._function = function

    def forward(self, *inputs: Any) -> Any:
        return self._function(self, *inputs)


def one() -> tuple[torch.Tensor]:
    return (torch.randn(2, 4, 6),)


def image() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, 8, 8),)


def inplace_add(m, x):
    y = x * 2
    y += 1
    return y * x


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


def python_constant_tensor(m, x):
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1)


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


def nested_example():
    return ({"image": torch.randn(2, 3), "points": [torch.randn(2, 5), torch.randn(2, 1)]}, 0.5)


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


def out_argument(m, x):
    buffer = torch.empty_like(x)
    torch.add(x, 1, out=buffer)
    return buffer * 2


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


def data_attribute(m, x):
    return x.data * 2


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


def mask_example():
    return torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool)


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
    y = torch.empty(2, 4, 6).expand(x.shape).clone() if x.shape[0] == 2 else torch.empty_like(x)
    y.copy_(x * 2)
    return y


def tied_calls(m, x):
    return F.linear(m.linear(x), m.linear.weight)


def mha(m, x):
    out, weights = m.attention(x, x, x)
    return out, weights


CASES = [
    Case("inplace_add", lambda: Function(inplace_add), one),
    Case("inplace_on_view", lambda: Function(inplace_on_view), one),
    Case("inplace_on_transposed_view", lambda: Function(inplace_on_transposed_view), one),
    Case("inplace_augmented_slice", lambda: Function(inplace_augmented_slice), one),
    Case("inplace_on_input", lambda: Function(inplace_on_input), one),
    Case("setitem_into_zeros", lambda: Function(setitem_into_zeros), one),
    Case("plain_attribute_accumulates", PlainAttributeAccumulates, one, "state"),
    Case("buffer_update", BufferUpdate, one, "state"),
    Case("shape_control_flow", lambda: Function(shape_control_flow), one),
    Case("item_scale", lambda: Function(item_scale), one, "scalar"),
    Case("data_branch", lambda: Function(data_branch), one, "scalar"),
    Case("nonzero_values", lambda: Function(nonzero_values), one),
    Case("nonzero_shape", lambda: Function(nonzero_shape), one, "data-shaped"),
    Case("arange_positions", lambda: Function(arange_positions), one),
    Case("python_constant_tensor", lambda: Function(python_constant_tensor), one),
    Case("from_numpy_constant", lambda: Function(from_numpy_constant), one),
    Case("numpy_round_trip", lambda: Function(numpy_round_trip), one, "numpy"),
    Case("scripted_function", lambda: Function(scripted_function), one),
    Case("scripted_module", lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))), one),
    Case("autograd_function", lambda: Function(autograd_function), one),
    Case("sdpa", lambda: Function(sdpa), one),
    Case(
        "multihead_attention",
        lambda: Function(mha, attention=nn.MultiheadAttention(6, 2, batch_first=True)),
        one,
    ),
    Case(
        "transformer_encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        one,
    ),
    Case("einsum", lambda: Function(einsum), one),
    Case("dict_output", lambda: Function(dict_output), one),
    Case("dataclass_output", lambda: Function(lambda m, x: Output(x * 2, (x, x + 1))), one),
    Case("namedtuple_output", lambda: Function(lambda m, x: Pair(x * 2, x.sort().values)), one),
    Case("return_type_output", lambda: Function(lambda m, x: x.max(dim=1)), one),
    Case("nested_input", lambda: Function(nested_input), nested_example),
    Case(
        "dataclass_input", lambda: Function(dataclass_input), lambda: (Output(torch.randn(2, 3), (torch.randn(2, 3),)),)
    ),
    Case("none_input", lambda: Function(none_input), lambda: (torch.randn(2, 3), None)),
    Case("shared_module", lambda: Function(lambda m, x: m.linear(m.linear(x)), linear=nn.Linear(6, 6)), one),
    Case("tied_weight", lambda: Function(tied_calls, linear=nn.Linear(6, 6)), one),
    Case("functional_weight", lambda: Function(functional_weight, weight=nn.Parameter(torch.randn(6, 6))), one),
    Case("module_made_in_forward", lambda: Function(module_made_in_forward), one),
    Case("parametrized_weight", parametrized, one),
    Case("forward_hook", hooked, one),
    Case("vmap", lambda: Function(vmapped), one),
    Case("checkpoint", lambda: Function(checkpointed), one),
    Case("autocast_region", lambda: Function(autocast_region, linear=nn.Linear(6, 6)), one, "autocast"),
    Case("out_argument", lambda: Function(out_argument), one),
    Case("iterate_and_unpack", lambda: Function(iterate_and_unpack), one),
    Case("random_in_forward", lambda: Function(random_in_forward), one, "random"),
    Case("python_random", lambda: Function(python_random), one, "random"),
    Case("multi_output_max", lambda: Function(multi_output_max), one),
    Case("data_attribute", lambda: Function(data_attribute), one),
    Case("tensor_as_size", lambda: Function(tensor_as_size), one),
    Case("tensor_index", lambda: Function(tensor_index), one),
    Case("leaf_subclass", lambda: MyConv(3, 4, 3), image),
    Case("mask_all_shortcut", lambda: Function(mask_all_shortcut), mask_example, "scalar"),
    Case("transposed_properties", lambda: Function(transposed_properties), one),
    Case("squeezes_and_len", lambda: Function(squeezes_and_len), one),
    Case("tolist_constant", lambda: Function(tolist_constant), one),
    Case("tolist_of_input", lambda: Function(tolist_of_input), one, "scalar"),
    Case("fill_and_zero", lambda: Function(fill_and_zero), one),
    Case("copy_in_place", lambda: Function(copy_in_place), one),
]
