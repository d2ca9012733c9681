"""The default road keeps the accuracy of a trained network, also where its channels differ by a factor of 1000."""

from __future__ import annotations

import pytest
import torch

from qgraph.demo.training import load_digits
from tools.bench.accuracy import TO_REACH, integers, make_hard, sqnr, train

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_plain_and_hard_digits() -> None:
    digits = load_digits()
    batches = list(digits.train_images[:128].split(8))
    plain = train(digits, epochs=15)
    for model in (plain, make_hard(plain)):
        with torch.no_grad():
            expected = model(digits.test_images[:496])
        logits = integers(model, batches)(digits.test_images[:496])
        right = [(values.argmax(1) == digits.test_labels[:496]).float().mean() for values in (expected, logits)]
        assert right[0] >= 0.98
        assert right[1] >= right[0] - 0.005
        assert sqnr(expected, logits) >= TO_REACH
