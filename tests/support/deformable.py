"""Multi-scale deformable attention and a decoder that selects its queries, as they are usually written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Shapes = tuple[tuple[int, int], ...]


class DeformableAttention(nn.Module):
    """Deformable DETR's attention in plain PyTorch (Zhu et al., 2020, section 4.1)."""

    def __init__(self, width: int = 16, heads: int = 2, points: int = 3, shapes: Shapes = ((8, 6), (4, 3))) -> None:
        super().__init__()
        self.heads, self.points, self.shapes = heads, points, shapes
        count = heads * len(shapes) * points
        self.value = nn.Linear(width, width)
        self.offsets = nn.Linear(width, 2 * count)
        self.weights = nn.Linear(width, count)
        self.output = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, reference: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """`query` `[N, Q, C]`, `reference` `[N, Q, L, 2]` in 0 to 1, `memory` `[N, sum of H * W, C]`."""
        batch, queries, _ = query.shape
        heads, levels, points = self.heads, len(self.shapes), self.points
        value = self.value(memory).view(batch, memory.shape[1], heads, -1)
        offsets = self.offsets(query).view(batch, queries, heads, levels, points, 2)
        weights = self.weights(query).view(batch, queries, heads, levels * points)
        weights = F.softmax(weights, -1).view(batch, queries, heads, levels, points)
        normalizer = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float32)
        locations = reference[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
        return self.output(self.attend(value, locations, weights))

    def attend(self, value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        batch, _, heads, width = value.shape
        queries = locations.shape[1]
        parts = value.split([h * w for h, w in self.shapes], dim=1)
        grids = 2 * locations - 1
        sampled = []
        for level, (h, w) in enumerate(self.shapes):
            part = parts[level].flatten(2).transpose(1, 2).reshape(batch * heads, width, h, w)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
            sampled.append(F.grid_sample(part, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(self.shapes) * self.points)
        output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1).view(batch, heads * width, queries)
        return output.transpose(1, 2).contiguous()


class SelectingDecoder(nn.Module):
    """Scores every token, takes the best, gathers their features and boxes, and adds embeddings of their rank."""

    def __init__(self, width: int = 16, classes: int = 5, queries: int = 4) -> None:
        super().__init__()
        self.queries = queries
        self.score = nn.Linear(width, classes)
        self.box = nn.Linear(width, 4)
        self.ranks = nn.Embedding(queries, width)
        self.labels = nn.Embedding(classes, width)
        self.head = nn.Linear(width, classes)

    def forward(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, boxes and token numbers of the selected tokens of `memory` `[N, T, C]`."""
        scores = self.score(memory)
        best = torch.topk(scores.max(-1).values, self.queries, dim=1).indices
        boxes = torch.gather(self.box(memory).sigmoid(), 1, best.unsqueeze(-1).repeat(1, 1, 4))
        features = torch.gather(memory, 1, best.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
        labels = torch.gather(scores, 1, best.unsqueeze(-1).expand(-1, -1, scores.shape[-1])).argmax(-1)
        features = features + self.ranks.weight + self.labels(labels)
        return self.head(features), boxes, best
