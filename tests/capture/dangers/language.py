"""Python around tensors: operators, numpy, closures, attributes, arithmetic with sizes."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.dangers.common import EXACT, Danger, image, indices, of, one
from tests.support.models import Forward


def powers(m, x):
    y = (x + 1) ** 2 + x**-1.0 + 2**x + x.pow(2) + torch.pow(x, 3) + (x.abs() + 1) ** x
    y **= 2
    return y


def reflected(m, x):
    return 1 - x + 3 / x + 2 // (x.abs() + 1) + 5 % (x.abs() + 1) + np.float32(2) * x + x * np.int64(3)


def numpy_square_root(m, x):
    return (x @ x.transpose(1, 2) / np.sqrt(x.shape[-1])).softmax(-1) * np.float64(2) + np.pi


def numpy_tables(m, x):
    scale = torch.as_tensor(np.array([1.0, 2, 3, 4, 5, 6], dtype=np.float32))
    shift = torch.tensor(np.linspace(0, 1, 6), dtype=torch.float32)
    return x * scale + shift + torch.from_numpy(np.eye(6, dtype=np.float32))[:4]


def augmented(m, x):
    y = x.clone()
    y += 1
    y -= x
    y *= 2
    y /= 3
    y //= 0.5
    y %= 2
    return y


def integer_operators(m, i):
    y = (i & 3) | (i << 1) ^ (~i >> 1)
    y |= 8
    y ^= i
    y &= 31
    y <<= 1
    return -y, +y, abs(y), 3 & y, 1 << (i % 4)


def comparisons(m, x):
    return (x > 0) & (x < 1) | ~(x >= 2) ^ (x == x) & (x != 0), x.eq(0), torch.where(x > 0, 1.0, 0.0), x > x.mean()


_TABLE = torch.arange(6.0)


def closure() -> nn.Module:
    table, factor, steps = torch.randn(6), 0.5, [1.0, 2.0]

    def inner(value):
        return sum(value * step for step in steps) + table

    return Forward(lambda m, x: inner(x * factor) + _TABLE)


def generators(m, x):
    def rows() -> Iterator[torch.Tensor]:
        yield from x.unbind(1)

    total = sum(row * weight for weight, row in enumerate(rows(), 1))
    pairs = [a * b for a, b in itertools.pairwise(x.unbind(1))]
    product = functools.reduce(operator.mul, (part.mean(-1, keepdim=True) for part in x.split(2, -1)))
    return total, torch.stack(pairs, 1), product, {name: part for name, part in zip("ab", x.chunk(2, -1), strict=True)}


def methods_by_name(m, x):
    for name in ("relu", "exp", "tanh"):
        x = getattr(x, name)()
    return getattr(torch, "cla" + "mp")(x, max=0.5).__add__(1).__getitem__((slice(None), 0))


class Properties(nn.Module):
    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(6))
        self.modules_by_name = {"a": nn.Tanh(), "b": nn.ReLU()}

    @property
    def weight(self):
        return self.raw.exp()

    @functools.cached_property
    def bias(self):
        return self.raw * 2

    def __getitem__(self, name):
        return self.modules_by_name[name]

    def forward(self, x):
        return self["a"](x * self.weight) + self["b"](x + self.bias)


class OptionalParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = None
        self.register_module("down", None)
        self.register_parameter("bias", None)
        self.act = nn.ReLU() if self.norm is None else nn.Identity()
        self.layers = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in range(3)})

    def forward(self, x):
        y = x if self.down is None else self.down(x)
        for name in sorted(self.layers, reverse=True):
            y = self.layers[name](y)
            y = self.act(y) if hasattr(self, "act") else y
        return F.linear(y, self.layers["0"].weight, self.bias) + (0 if self.norm is None else 1)


class DynamicAttributes(nn.Module):
    def forward(self, x):
        self.scale_of_this_call = 2.0
        self.parts = [x * 2]
        self.__setattr__("last", self.parts[0] + self.scale_of_this_call)
        return self.last - self.parts.pop()


class NamedByKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"for": nn.Linear(6, 6), "else": nn.Sequential(nn.Linear(6, 6), nn.ReLU())})

    def forward(self, x):
        return self.parts["for"](x) + self.parts["else"](x) + self.parts["for"].bias


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(self.embed(i)) @ self.embed.weight


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, depth=3):
        return x if depth == 0 else self.linear(self(x, depth - 1))


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.act.forward(self.linear.forward(x)) + nn.Linear.forward(self.linear, x)


class MonkeyPatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        original = self.linear.forward
        self.linear.forward = lambda x: original(x) * 2

    def forward(self, x):
        return self.linear(x)


class MetaTensorClass(torch.Tensor):
    """A subclass without data of its own, as libraries use to mark boxes and images."""


def subclass(m, x):
    return (x.as_subclass(MetaTensorClass) * 2 + x).as_subclass(torch.Tensor)


def shape_arithmetic(m, x):
    b, c, h, w = x.shape
    grid = math.ceil(h / 3) * 3
    x = F.pad(x, (0, grid - w, 0, grid - h))
    n = int(math.log2(w)) + int(np.prod(x.shape[1:])) // (c * grid) + divmod(h, 3)[1] + round(w**0.5)
    return x.reshape(b, c, grid // 3, 3, grid // 3, 3).mean((3, 5)) * n + torch.Size((h, w)).numel()


def rearranged(m, x):
    """What einops does for 'b (h p) c -> (b h) p c' and back."""
    pattern = {"b": x.shape[0], "h": 2, "p": x.shape[1] // 2, "c": x.shape[2]}
    left = [pattern[axis] for axis in "bhpc"]
    groups = [["b", "h"], ["p"], ["c"]]
    sizes = [math.prod(pattern[axis] for axis in group) for group in groups]
    folded = x.reshape(left).reshape(sizes).softmax(1)
    return folded.reshape(left).permute(*["bhpc".index(axis) for axis in "bchp"]).flatten(2)


@functools.cache
def _window(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.hann_window(length, dtype=dtype)


def numpy_scalars(m, x):
    std = np.array([0.5, 2.0], dtype=np.float32)
    size = np.int64(3)
    index = np.argsort(np.array([2, 0, 1]))
    return x[:, :size] * std[0] + x[:, index.tolist()] / float(std.mean()) + x[:, :3].reshape(-1, size, np.int32(6))


def list_of_results(m, x):
    outputs: list[torch.Tensor] = []
    for step in range(3):
        outputs.append((outputs[-1] if outputs else x) * (step + 1))
        outputs.insert(0, outputs[-1].mean(-1, keepdim=True).expand_as(x))
    del outputs[1]
    return torch.cat(outputs, 1), torch.stack(outputs[::-1]).sum(0)


def try_except(m, x):
    try:
        y = x @ torch.ones(5, 5)
    except RuntimeError:
        y = x @ torch.ones(6, 6)
    return y


_SHIFT = torch.ones(6)


def keywords_and_defaults(m, x):
    def block(value, *, scale=2.0, shift=_SHIFT, **rest):
        return value * scale + shift * rest.get("gain", 1.0)

    return block(x) + functools.partial(block, scale=3.0)(x, gain=0.5)


DANGERS = [
    Danger("powers", of(powers), one),
    Danger("reflected", of(reflected), one),
    Danger("numpy_square_root", of(numpy_square_root), one),
    Danger("numpy_tables", of(numpy_tables), one),
    Danger("augmented", of(augmented), one),
    Danger("integer_operators", of(integer_operators), indices),
    Danger("comparisons", of(comparisons), one),
    Danger("closure", closure, one),
    Danger("generators", of(generators), one),
    Danger("methods_by_name", of(methods_by_name), one),
    Danger("properties", Properties, one),
    Danger("optional_parts", OptionalParts, one),
    Danger("dynamic_attributes", DynamicAttributes, one),
    Danger("named_by_keywords", NamedByKeywords, one),
    Danger("tied", Tied, indices),
    Danger("recursive", Recursive, one),
    Danger("calls_forward", CallsForward, one),
    Danger("monkey_patched", MonkeyPatched, one),
    Danger("subclass", of(subclass), one),
    Danger("shape_arithmetic", of(shape_arithmetic), image),
    Danger("rearranged", of(rearranged), one),
    Danger("cached_window", of(lambda m, x: x * _window(6, x.dtype)), one, EXACT),
    Danger("numpy_scalars", of(numpy_scalars), one),
    Danger("list_of_results", of(list_of_results), one),
    Danger("try_except", of(try_except), one),
    Danger("keywords_and_defaults", of(keywords_and_defaults), one),
]
