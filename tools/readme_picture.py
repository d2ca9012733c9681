"""Draws the picture of the README: `python -m tools.readme_picture`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import qgraph
from qgraph.demo.model import ResidualBlock

PICTURE = Path(__file__).parents[1] / "docs/images/captured_to_integer.svg"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ResidualBlock(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.block(x).mean(dim=(2, 3)))
        return logits


def main() -> None:
    torch.manual_seed(0)
    model, example = Net().eval(), torch.randn(1, 8, 16, 16)
    qat = qgraph.prepare(model, example)
    qgraph.calibrate(qat, [torch.randn(8, 8, 16, 16)], progress=False)
    title = "A graph as captured, and the integer graph made of it"
    qgraph.draw_diff(qgraph.trace(model, example), qgraph.convert(qat), PICTURE, title=title)


if __name__ == "__main__":
    main()
