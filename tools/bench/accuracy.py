"""What quantization costs on a small trained network, and on the same function with channels of very different ranges.

"hard" scales the 32 channels of the second convolution by 1 to 1000 (evenly in the logarithm) through its batch norm,
and divides by the same in the next convolution: the float function stays, one scale for all channels no longer fits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.demo.training import Digits, load_digits
from qgraph.quantization import calibrate, convert, correct_bias, equalize, prepare
from qgraph.simulator import Simulator
from tools.bench.measure import table

SEEDS = (0, 1, 2)
TO_REACH = 40.0
_TESTED = 496
_WIDTH = 32
Predict = Callable[[torch.Tensor], Any]


class Net(nn.Module):
    """Digits `[N, 1, 8, 8]` to logits `[N, 10]`: three convolutions with batch norm, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, _WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_WIDTH)
        self.conv3 = nn.Conv2d(_WIDTH, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        x = self.pool(self.relu3(self.bn3(self.conv3(x))))
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def train(digits: Digits, seed: int = 0, epochs: int = 15) -> Net:
    """A trained network in eval mode."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.train_images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def make_hard(model: Net, largest: float = 1000.0) -> Net:
    """The same function with channels of the second convolution scaled by 1 to `largest`."""
    model = copy.deepcopy(model)
    factors = torch.logspace(0, torch.tensor(largest).log10().item(), _WIDTH)
    with torch.no_grad():
        model.bn2.weight.mul_(factors)
        model.bn2.bias.mul_(factors)
        model.conv3.weight.div_(factors[:, None, None])
    return model


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Power of the signal over that of the error, in dB."""
    return float(10 * torch.log10(expected.square().sum() / (actual - expected).square().sum()))


def integers(model: nn.Module, batches: list[torch.Tensor], *, improved: bool = False) -> Predict:
    """The integer graph, all settings left as they are; or after `equalize` and `correct_bias`."""
    prepared = prepare(model, batches[0])
    calibrate(prepared, batches, progress=False)
    if improved:
        equalize(prepared, batches)
        correct_bias(prepared, batches)
    return Simulator(convert(prepared))


def torch_fx(model: nn.Module, batches: list[torch.Tensor], engine: str) -> Predict:
    """The quantized model of torch's FX mode, default settings of an engine."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(engine), (batches[0],))
        for batch in batches:
            prepared(batch)
        quantized: Predict = convert_fx(prepared)
    return quantized


def run() -> str:
    """Accuracy and SQNR of the logits, for several trainings, plain and hard."""
    torch.set_num_threads(1)
    digits = load_digits()
    batches = list(digits.train_images[:128].split(8))
    images, labels = digits.test_images[:_TESTED], digits.test_labels[:_TESTED]
    rows: list[tuple[object, ...]] = []
    for seed in SEEDS:
        plain = train(digits, seed)
        for variant, model in (("plain", plain), ("hard", make_hard(plain))):
            with torch.no_grad():
                expected = model(images)
                found = {
                    "qgraph": integers(model, batches)(images),
                    "qgraph, equalize + correct_bias": integers(model, batches, improved=True)(images),
                    "torch FX x86": torch_fx(model, batches, "x86")(images),
                    "torch FX onednn": torch_fx(model, batches, "onednn")(images),
                }
            for name, logits in found.items():
                db = sqnr(expected, logits)
                verdict = ("ok" if db >= TO_REACH else "MISSED") if name == "qgraph" and seed == SEEDS[0] else ""
                right = [f"{(values.argmax(1) == labels).float().mean():.2%}" for values in (expected, logits)]
                rows.append((seed, variant, name, *right, f"{db:.1f}", verdict))
    return table(
        ("seed", "variant", "quantized by", "float accuracy", "accuracy", "SQNR, dB", "40 dB, first seed"), rows
    )


if __name__ == "__main__":
    print(run())
