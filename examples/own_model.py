"""A model of one's own, with its own text encoder: everything that refedge needs to know of it.

refedge export examples/own_model.py:build -o own.refedge
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from refedge.data.refshapes.expressions import words
from refedge.models.parts import BATCH, Method, Network, Part, Port
from refedge.models.tokenizers import word_level
from tokenizers import Tokenizer
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    size: int = 64
    words: int = 20
    vocabulary: int = 64
    width: int = 24


class Gated(Network):
    high = ("head",)  # stays in float32 in every precision plan

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.stem = nn.Conv2d(3, config.width, 4, stride=4)
        self.body = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.head = nn.Conv2d(config.width, 1, 1)

    def encode_text(self, ids: Tensor, words: Tensor) -> Tensor:
        known = words[:, :, None].float()
        return torch.sigmoid((self.embed(ids) * known).sum(1) / known.sum(1).clamp_min(1))

    def decode(self, pixels: Tensor, gate: Tensor) -> Tensor:
        x = self.stem(pixels.float().permute(0, 3, 1, 2) / 255)
        x = self.head(F.relu(self.body(x)) * gate[:, :, None, None])
        return F.interpolate(x, scale_factor=4, mode="bilinear").squeeze(1)

    def forward(self, pixels, ids, words, image_index=None):
        return self.decode(pixels, self.encode_text(ids, words))

    def parts(self) -> tuple[Part, ...]:
        ids, known, pixels, _, logits = self.host_ports(BATCH)
        gate = Port("gate", "float32", (BATCH, self.config.width))
        text = Part("text", Method(self, self.encode_text), (ids, known), (gate,))
        return (text, Part("mask", Method(self, self.decode), (pixels, gate), (logits,)))


def build() -> tuple[Network, Tokenizer]:
    torch.manual_seed(0)  # the same weights each time: what is timed is what was exported
    return Gated(Config()), word_level(words())
