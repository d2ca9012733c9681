"""Numbers, transforms, weights that change, and layers with state of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.dangers.common import EXACT, REFUSED, Danger, image, indices, of, one, padded
from tests.support.models import Forward


def rotary(m, x):
    angles = torch.outer(torch.arange(x.shape[1]).float(), 1.0 / 10000 ** (torch.arange(0, 6, 2).float() / 6))
    rotation = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def complex_parts(m, x):
    z = torch.complex(x, x.roll(1, -1)) * 1j
    z.real.mul_(2)
    spectrum = torch.fft.rfft(x, dim=-1)
    spectrum[..., 0] = 0
    return z.conj().imag, z.abs(), torch.fft.irfft(spectrum, n=6, dim=-1), torch.view_as_real(z).sum(-1)


def functional_transforms(m, x):
    gradient = torch.func.grad(lambda value: (value**3).sum())(x)
    jacobian = torch.func.jacrev(lambda value: value.sin().sum(-1))(x[0])
    batched = torch.vmap(lambda a, b: (a @ b.T).softmax(-1))(x, x * 2)
    return gradient, jacobian, batched, torch.vmap(torch.vmap(torch.dot))(x, x)


def forces(m, x):
    with torch.enable_grad():
        position = x.detach().requires_grad_()
        energy = position.pow(4).sum()
        (gradient,) = torch.autograd.grad(energy, position)
    return -gradient


def functional_call(m, x):
    weights = {"weight": m.linear.weight * 2, "bias": m.linear.bias + 1}
    return torch.func.functional_call(m.linear, weights, (x,))


def hypernetwork(m, x):
    weight = m.hyper(x.mean((0, 1))).view(6, 6)
    return torch.func.functional_call(m.linear, {"weight": weight}, (x,))


class GeneratedWeight(nn.Module):
    """A leaf whose weight is computed from the input just before it is called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        del self.linear.weight
        self.hyper = nn.Linear(6, 36)

    def forward(self, x):
        self.linear.weight = self.hyper(x.mean((0, 1))).view(6, 6)
        return self.linear(x)


class SwappedData(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        saved = self.linear.weight.data
        self.linear.weight.data = saved * x.mean()
        y = self.linear(x)
        self.linear.weight.data = saved
        return y


class ParametersByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.ParameterDict({"a b": nn.Parameter(torch.randn(6)), "for": nn.Parameter(torch.randn(6))})
        self.rows = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x):
        return x * self.table["a b"] + self.table["for"] + sum(self.rows)


def legacy_types(m, x):
    y = torch.FloatTensor([1.0, 2.0]).type(torch.DoubleTensor)
    return x.double() * y[0] + x.type(torch.float64) + x.new([3.0]) + torch.Tensor([1.0])


def wrapped_as_parameter(m, x):
    return nn.Parameter(x * 2, requires_grad=False) + 1


def types_of_results(m, i):
    kind = torch.sigmoid(i).dtype
    return i.to(kind) * i.sigmoid().to(kind)


def resized(m, x):
    h, w = x.shape[-2:]
    y = F.interpolate(x, size=(math.ceil(h * 1.5), w // 2 * 3), mode="bilinear", align_corners=False)
    z = F.interpolate(y, scale_factor=1 / 1.5, mode="nearest", recompute_scale_factor=True)
    return y, z, F.adaptive_avg_pool2d(x, (h // 2, 1)), F.unfold(x, 3, padding=1).view(x.shape[0], -1, h, w)


def sampled(m, x):
    theta = torch.eye(2, 3).repeat(x.shape[0], 1, 1)
    theta[:, 0, 2] = x.mean((1, 2, 3))
    grid = F.affine_grid(theta, [x.shape[0], x.shape[1], 5, 7], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def deformed(m, x):
    """Points predicted from the input, around a grid made in the forward."""
    h, w = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    grid = torch.stack([xs, ys], -1).expand(x.size(0), -1, -1, -1).clone()
    grid += m.offset(x).permute(0, 2, 3, 1).tanh() * 0.1
    return F.grid_sample(x, grid, align_corners=True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 5, 2, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(6, 5)

    def forward(self, x):
        states = torch.zeros(4, x.shape[0], 5)
        out, states = self.gru(x, states)
        h = c = x.new_zeros(x.shape[0], 5)
        outs = []
        for step in range(x.shape[1]):
            h, c = self.cell(x[:, step], (h, c))
            outs.append(h)
        return out, states.transpose(0, 1).flatten(1), torch.stack(outs, 1), c


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        lengths = torch.full((x.shape[0],), 3)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class MaskedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)

    def forward(self, x, mask):
        causal = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
        y, weights = self.attention(x, x, x, attn_mask=causal, key_padding_mask=torch.zeros_like(mask).float())
        return self.layer(y, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0), weights


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(6, 2, 1, 1, 8, batch_first=True)

    def forward(self, x, y):
        mask = self.net.generate_square_subsequent_mask(y.shape[1])
        return self.net(x, y, tgt_mask=mask, tgt_is_causal=True)


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6, padding_idx=0)
        self.bag = nn.EmbeddingBag(10, 6, mode="mean")
        self.place = nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, i):
        y = self.table(i) + self.place[:, : i.shape[1]]
        return y * i.ne(0)[..., None], self.bag(i), F.embedding(i, self.table.weight)


def sorting(m, x):
    values, order = x.sort(-1, descending=True)
    inverse = order.argsort(-1)
    unique, back, counts = torch.unique(x.round(), return_inverse=True, return_counts=True)
    return values.gather(-1, inverse), x.topk(2).indices, unique[back], counts.float().mean(), x.median(-1).values


def statistics(m, x):
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (
        (x - mean) / (var + 1e-5).sqrt(),
        x.norm(dim=-1),
        torch.linalg.vector_norm(x, 2, -1),
        x.logsumexp(1),
        x.cumsum(1),
    )


def infinite_masks(m, x):
    scores = x @ x.transpose(1, 2)
    n = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    scores = scores + torch.where(torch.eye(n) > 0, 0.0, torch.finfo(x.dtype).min / 2)
    return torch.where(scores.isinf(), torch.tensor(0.0), scores.softmax(-1)), x.clamp(max=math.inf, min=-math.inf)


def cond(m, x):
    return torch.cond(x.sum() > 0, lambda value: value + 1, lambda value: value - 1, (x,))


def sparse_product(m, x):
    return torch.stack([torch.sparse.mm(m.adjacency, row) for row in x.unbind(1)], 1)


def made_sparse(m, x):
    return x.relu().to_sparse().to_dense()


def nested_tensor(m, x):
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor(list(x.unbind(0))), 0.0) * 2


def bucketed(m, x):
    edges = torch.linspace(-1, 1, 5)
    return torch.bucketize(x, edges), torch.searchsorted(edges, x), torch.histc(x, 5, -1, 1)


def random_but_seeded(m, x):
    generator = torch.Generator().manual_seed(0)
    return x + torch.rand(6, generator=generator)


def forked_random(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.rand(6)


def quantized_by_hand(m, x):
    scale = x.abs().amax() / 127
    codes = torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8)
    return codes.float() * scale, torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)


def named_dimensions(m, x):
    return x.refine_names("N", "T", "C").mean("T").rename(None) * 2


def script_list(m, x):
    return _scripted_pair(x)[1] + _scripted_pair(x)[0]


@torch.jit.script
def _scripted_pair(a: torch.Tensor) -> list[torch.Tensor]:
    out = [a, a * 2]
    if a.size(0) > 100:
        out.append(a)
    return out


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.round(), a.sign()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0]


def straight_through(m, x):
    codes, sign = Straight.apply(x * 4)
    return x + (codes / 4 - x).detach() + sign


def two_inputs(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 4, 6), torch.randn(size, 3, 6)


DANGERS = [
    Danger("rotary", of(rotary), one),
    Danger("complex_parts", of(complex_parts), one),
    Danger("functional_transforms", of(functional_transforms), one),
    Danger("forces", of(forces), one, REFUSED),
    Danger("functional_call", of(functional_call, linear=nn.Linear(6, 6)), one),
    Danger("hypernetwork", of(hypernetwork, linear=nn.Linear(6, 6), hyper=nn.Linear(6, 36)), one),
    Danger("generated_weight", GeneratedWeight, one),
    Danger("swapped_data", SwappedData, one, "state"),
    Danger("resized", of(resized), image),
    Danger("sampled", of(sampled), image),
    Danger("parameters_by_name", ParametersByName, one),
    Danger("legacy_types", of(legacy_types), one),
    Danger("wrapped_as_parameter", of(wrapped_as_parameter), one),
    Danger("types_of_results", of(types_of_results), indices),
    Danger("deformed", of(deformed, offset=nn.Conv2d(3, 2, 1)), image),
    Danger("recurrent", Recurrent, one),
    Danger("packed", Packed, one, REFUSED),
    Danger("masked_attention", MaskedAttention, padded),
    Danger("encoder_decoder", EncoderDecoder, two_inputs),
    Danger("embeddings", Embeddings, indices),
    Danger("embedding_max_norm", of(lambda m, i: m.e(i), e=nn.Embedding(10, 6, max_norm=1.0)), indices, "state"),
    Danger("sorting", of(sorting), one),
    Danger("statistics", of(statistics), one),
    Danger("infinite_masks", of(infinite_masks), one),
    Danger("cond", of(cond), one, REFUSED),
    Danger("sparse_product", lambda: Forward(sparse_product, adjacency=torch.eye(2).to_sparse()), one, EXACT),
    Danger("made_sparse", of(made_sparse), one),
    Danger("nested_tensor", of(nested_tensor), one, REFUSED),
    Danger("bucketed", of(bucketed), one),
    Danger("random_but_seeded", of(random_but_seeded), one, REFUSED),
    Danger("forked_random", of(forked_random), one, REFUSED),
    Danger("quantized_by_hand", of(quantized_by_hand), one),
    Danger("script_list", of(script_list), one),
    Danger("straight_through", of(straight_through), one),
]
