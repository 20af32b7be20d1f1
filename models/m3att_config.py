"""Sizes of M3Att: the paper's two variants and a tiny one.

The full text of the paper is not public; where it is silent the sizes are those of VLT, its
ancestor by the same group (Ding et al., ICCV 2021), and every one can be changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .darknet import BLOCKS, WIDTHS
from .parts import Framing
from .swin import SwinConfig
from .text import TextConfig


@dataclass(frozen=True)
class DarknetConfig:
    """Sizes of a Darknet; the defaults are Darknet-53."""

    widths: tuple[int, int, int, int, int, int] = WIDTHS
    blocks: tuple[int, int, int, int, int] = BLOCKS


@dataclass(frozen=True)
class GruConfig:
    """Sizes of word vectors under a bidirectional GRU, whose directions are summed.

    vocabulary: rows of the table; words that the data knows, not all that GloVe has.
    """

    vocabulary: int = 12000
    embedding: int = 300
    width: int = 1024


@dataclass(frozen=True)
class M3AttConfig:
    """Sizes of a M3Att; the defaults are the variant with Swin-B and BERT.

    size:           pixels per side, a multiple of 32.
    words:          tokens per expression.
    swin, darknet:  the backbone: one of the two.
    bert, gru:      the text encoder: one of the two.
    early_fusion:   the sentence gates the neck.
    stride:         of the grid where words and pixels meet: 8 or 16.
    inner, width:   channels inside the neck; of everything after it.
    hidden:         width of the feed-forward layers.
    layers:         mutual attentions.
    head_width, doublings: channels of the mask decoder; how often it doubles the grid.
    skip:           the mask decoder also sees the neck's map.
    reconstruction: weight of the language reconstruction's loss.
    framing:        Swin's variant squashes, Darknet's puts a grey border around; both ask for 35 %.
    """

    size: int = 480
    words: int = 20
    swin: SwinConfig | None = field(default_factory=SwinConfig)
    darknet: DarknetConfig | None = None
    bert: TextConfig | None = field(default_factory=TextConfig)
    gru: GruConfig | None = None
    early_fusion: bool = True
    stride: int = 16
    inner: int = 512
    width: int = 256
    heads: int = 8
    hidden: int = 1024
    encoder_layers: int = 2
    layers: int = 3
    head_width: int = 256
    doublings: int = 3
    skip: bool = False
    reconstruction: float = 0.1
    framing: Framing = field(default_factory=lambda: Framing(threshold=0.35))

    def __post_init__(self) -> None:
        if self.size % 32 or self.stride not in (8, 16):
            raise ValueError(f"{self.size} pixels, no multiple of 32, or stride {self.stride}")
        if self.width % (2 * self.heads) or self.width % 4 or self.layers < 1:
            raise ValueError(f"{self.width} channels, {self.heads} heads, {self.layers} layers")
        if self.stride % 2**self.doublings:
            raise ValueError(f"a stride of {self.stride} cannot be doubled {self.doublings} times")
        if (self.swin is None) == (self.darknet is None):
            raise ValueError("1 backbone is needed: swin or darknet")
        if (self.bert is None) == (self.gru is None):
            raise ValueError("1 text encoder is needed: bert or gru")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        text = self.bert or self.gru
        return text.vocabulary if text else 0

    @property
    def side(self) -> int:
        """Side of the grid where words and pixels meet."""
        return self.size // self.stride


PAPER = M3AttConfig()
PAPER_DARKNET = M3AttConfig(
    size=416,
    words=15,
    swin=None,
    darknet=DarknetConfig(),
    bert=None,
    gru=GruConfig(),
    framing=Framing("letterbox", fill=(128, 128, 128), threshold=0.35),
)
TINY = M3AttConfig(
    size=96,
    swin=None,
    darknet=DarknetConfig(widths=(8, 16, 32, 64, 96, 128), blocks=(0, 1, 2, 2, 1)),
    bert=TextConfig(vocabulary=64, width=48, layers=2, heads=4, hidden=96, positions=20),
    early_fusion=False,
    stride=8,
    inner=64,
    width=64,
    heads=4,
    hidden=128,
    encoder_layers=2,
    head_width=32,
    doublings=1,
    skip=True,
    framing=Framing(),
)
CONFIGS = {"paper": PAPER, "darknet": PAPER_DARKNET, "tiny": TINY}
