"""The demo's data, training and evaluation; deterministic under its seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from qgraph.demo.model import DigitsNet
from qgraph.errors import UserError

SEED = 0
EPOCHS = 30
_TEST_IMAGES = 500


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images `[N, 1, 8, 8]` in [0, 1], labels `[N]`."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> Digits:
    """The 1797 bundled digits, 500 of them for the test.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise UserError(
            "the demo's data come with scikit-learn, which is not installed",
            fix="pip install 'qgraph-fx[demo]'",
        ) from error
    data: Any = bundled()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:-_TEST_IMAGES], order[-_TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(digits: Digits, *, epochs: int = EPOCHS, batch: int = 64, progress: bool = True) -> DigitsNet:
    """A network trained on the digits with one-pixel shifts; returned in eval mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitsNet()
    steps = epochs * -(-len(digits.train_images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="train", disable=not progress, leave=False):
        for images, labels in _batches(digits, batch, generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(predict: Callable[[torch.Tensor], Any], digits: Digits, *, batch: int = 100) -> float:
    """Share of test images `predict` (images to logits) classifies correctly."""
    correct = 0
    with torch.no_grad():
        for start in range(0, len(digits.test_images), batch):
            logits = predict(digits.test_images[start : start + batch])
            correct += int((logits.argmax(1) == digits.test_labels[start : start + batch]).sum())
    return correct / len(digits.test_images)


def calibration_batches(digits: Digits, *, steps: int = 16, batch: int = 8) -> list[torch.Tensor]:
    """Training images for calibration."""
    return list(digits.train_images[: steps * batch].split(batch))


def _batches(digits: Digits, batch: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.randperm(len(digits.train_images), generator=generator)
    for chosen in order.split(batch):
        shift = [int(n) for n in torch.randint(-1, 2, (2,), generator=generator)]
        yield torch.roll(digits.train_images[chosen], shift, dims=(2, 3)), digits.train_labels[chosen]
