"""A model of one's own, with its own text encoder: everything that refedge needs to know of it.

refedge export examples/own_model.py:build -o own.refedge
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from refedge.models.parts import BATCH, Method, Network, Part, Port
from refedge.models.tokenizers import word_level
from tokenizers import Tokenizer
from torch import Tensor, nn

WORDS = ("the", "red", "green", "blue", "circle", "square", "left", "right", "of", "small", "large")


@dataclass(frozen=True)
class Config:
    size: int = 64
    words: int = 8
    vocabulary: int = len(WORDS) + 2
    width: int = 24


class Gated(Network):
    """Convolutions whose channels the mean word vector gates."""

    high = ("head",)  # stays in float32 in every precision plan

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.stem = nn.Conv2d(3, config.width, 4, stride=4)
        self.body = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.head = nn.Conv2d(config.width, 1, 1)

    def encode_text(self, ids: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        known = words[:, :, None].to(torch.float32)
        return (torch.sigmoid((self.embed(ids) * known).sum(1) / known.sum(1)),)

    def decode(self, pixels: Tensor, gate: Tensor) -> Tensor:
        x = self.stem(pixels.to(torch.float32).permute(0, 3, 1, 2) / 255)
        x = self.head(F.relu(self.body(x)) * gate[:, :, None, None])
        return F.interpolate(x, scale_factor=4, mode="bilinear").squeeze(1)

    def forward(self, pixels, ids, words, image_index=None):
        return self.decode(pixels, *self.encode_text(ids, words))

    def parts(self) -> tuple[Part, ...]:
        c = self.config
        ids = Port("ids", "int32", (BATCH, c.words))
        words = Port("words", "bool", (BATCH, c.words))
        gate = Port("gate", "float32", (BATCH, c.width))
        pixels = Port("pixels", "uint8", (BATCH, c.size, c.size, 3))
        logits = Port("logits", "float32", (BATCH, c.size, c.size))
        return (
            Part("text", Method(self, self.encode_text), (ids, words), (gate,)),
            Part("mask", Method(self, self.decode), (pixels, gate), (logits,)),
        )


def build() -> tuple[Network, Tokenizer]:
    torch.manual_seed(0)
    return Gated(Config()).eval(), word_level(WORDS)
