"""The model and the data that benchmarks on several devices train on, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Size:
    """How large a GPT is.

    Args:
        layers: blocks.
        width: numbers per token between the blocks.
        heads: of the attention; they divide the width.
        vocabulary: different tokens.
        context: tokens in a sequence.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


LARGE = Size(layers=24, width=1536, heads=12, vocabulary=50304, context=1024)  # 0.84 billion parameters
TINY = Size(layers=2, width=32, heads=2, vocabulary=64, context=16)


class Block(nn.Module):
    """Attention and a perceptron, each on normalised input and added to it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention of all heads."""
        batch, time, width = x.shape
        query, key, value = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(y.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Predicts each token of a sequence from those before it; its forward returns the loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of sequences of ``context + 1`` tokens, shape (batch, context + 1)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embed(inputs) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Sequences(Dataset[Tensor]):
    """Random sequences of tokens, the same for the same arguments; low numbers are more frequent, so there is something to learn.

    Args:
        count: sequences.
        size: of the model that reads them.
    """

    def __init__(self, count: int, size: Size) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = (torch.rand(count, size.context + 1, generator=generator).square() * size.vocabulary).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]
