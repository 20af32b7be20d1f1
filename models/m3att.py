"""M3Att: multi-modal mutual attention (Liu et al., TIP 2023, arXiv 2305.15302).

A backbone, a neck whose coarsest map the sentence gates, a transformer encoder, then the decoder
of ``mutual_attention``, whose last product of words and pixels is decoded to a mask. There is no
public code or checkpoint; names are this module's own.

With ``early_fusion`` a picture can be kept as far as the projected maps of its backbone; without
it as the keys and values of every layer of the decoder.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .darknet import Darknet
from .gated_neck import GatedNeck
from .m3att_config import CONFIGS, PAPER, PAPER_DARKNET, TINY, GruConfig, M3AttConfig
from .m3att_heads import MaskHead, Reconstruction
from .mutual_attention import MutualDecoder
from .parts import BATCH, IMAGES, AttentionShape, Method, Network, Part, Port, Rehearsal
from .pictures import MEAN, STD, normalise_pixels, pick_all, unit_pixels
from .recurrent import BiRecurrent, WordVectors
from .swin import Swin
from .text import bert, encode
from .transformer import EncoderLayer, sine_grid

__all__ = ["CONFIGS", "PAPER", "PAPER_DARKNET", "TINY", "M3Att", "M3AttConfig"]

Tensors = tuple[Tensor, ...]


class GruText(nn.Module):
    """Word vectors and a bidirectional GRU; ids and words [B, T] to [B, T, width]."""

    def __init__(self, config: GruConfig) -> None:
        super().__init__()
        self.vectors = WordVectors(config.vocabulary, config.embedding)
        self.recurrent = BiRecurrent("gru", config.embedding, config.width)

    def forward(self, ids: Tensor, words: Tensor) -> Tensor:
        ahead, back = self.recurrent(self.vectors(ids), words).chunk(2, dim=2)
        both: Tensor = ahead + back
        return both


class _Decoded(NamedTuple):
    logits: Tensor
    product: Tensor
    attention: Tensors
    maps: Tensors


class M3Att(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: M3AttConfig = PAPER) -> None:
        super().__init__()
        self.config = c = config
        self.text: nn.Module
        if c.bert is not None:
            self.text, text_width = bert(c.bert), c.bert.width
        elif c.gru is not None:
            self.text, text_width = GruText(c.gru), c.gru.width
        self.backbone: nn.Module
        if c.swin is not None:
            self.backbone, widths = Swin(c.swin, c.size), c.swin.widths[1:]
        elif c.darknet is not None:
            self.backbone = Darknet(c.darknet.widths, c.darknet.blocks)
            widths = c.darknet.widths[3:]
        pixels = c.side**2
        self.language = nn.Linear(text_width, c.width)
        self.neck = GatedNeck(
            widths, c.inner, c.width, c.stride, text_width if c.early_fusion else None
        )
        self.encoder = nn.ModuleList(
            EncoderLayer(c.width, c.heads, c.hidden) for _ in range(c.encoder_layers)
        )
        self.decoder = MutualDecoder(c.width, c.heads, c.hidden, c.layers, c.words, pixels)
        self.head = MaskHead(
            c.words, c.head_width, c.doublings, c.side, c.size, c.width if c.skip else None
        )
        self.reconstruction = Reconstruction(c.words, pixels, c.width)
        self.register_buffer("positions", sine_grid(c.side, c.width), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    config: M3AttConfig
    positions: Tensor
    mean: Tensor
    std: Tensor
    high: ClassVar[tuple[str, ...]] = ("head.logit",)
    tokens: ClassVar[str] = "wordpiece"
    last = "head.logit"

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the neck's map and of the encoder's."""
        return (self.config.width, self.config.width)

    def encode_text(self, ids: Tensor, words: Tensor) -> Tensors:
        """Projected words and the decoder's first state [B, T, D], and the gate if there is one."""
        if self.config.bert is not None:
            tokens = encode(self.text, ids, words)
        else:
            tokens = self.text(ids, words)
        language = torch.where(words[:, :, None], self.language(tokens), 0.0)
        return (language, self.decoder.start(language, words), *self.neck.gate(tokens, words))

    def encode_image(self, pixels: Tensor) -> Tensors:
        """Pixels [I, S, S, 3] uint8 to all that depends on the picture alone.

        With early fusion the neck's laterals; without, the decoder's keys and values, and the
        neck's share of the mask decoder.
        """
        return self._see(pixels)[0]

    def _see(self, pixels: Tensor) -> tuple[Tensors, Tensors]:
        """What ``encode_image`` gives, and the maps on the way."""
        if self.config.swin is not None:
            maps = self.backbone(normalise_pixels(pixels, self.mean, self.std))[1:]
        else:
            maps = self.backbone(unit_pixels(pixels))
        laterals = self.neck.laterals(maps)
        return (laterals, ()) if self.config.early_fusion else self._fuse(laterals, ())

    def _fuse(self, laterals: Tensors, gate: Tensors) -> tuple[Tensors, Tensors]:
        """Neck and encoder: what the decoder reads, and the maps of both."""
        fused = self.neck(laterals, gate)
        side, width = fused.shape[2], fused.shape[1]
        x = fused.permute(0, 2, 3, 1).reshape(-1, side**2, width) + self.positions
        for layer in self.encoder:
            x = layer(x)
        encoded = x.transpose(1, 2).reshape(-1, width, side, side)
        return (*self.decoder.project(x), *self.head.beside(fused)), (fused, encoded)

    def decode(
        self, words: Tensor, text: Tensors, image: Tensors, image_index: Tensor | None
    ) -> _Decoded:
        """Products of both sides to logits [B, S, S] and what training looks at."""
        language, state, *gate = text
        maps: Tensors = ()
        if self.config.early_fusion:
            gathered = pick_all(image, image_index)
            (image, maps), image_index = self._fuse(gathered, tuple(gate)), None
        vision = image[: 2 * self.config.layers]
        beside = pick_all(image[len(vision) :], image_index)
        product, attention = self.decoder(language, state, words, vision, image_index)
        return _Decoded(self.head(product, beside), product, tuple(attention), maps)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        text = self.encode_text(ids, words)
        return self.decode(words, text, self.encode_image(pixels), image_index).logits

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        text = self.encode_text(ids, words)
        image, maps = self._see(pixels)
        out = self.decode(words, text, image, image_index)
        again = self.config.reconstruction * self.reconstruction(out.product, text[0], words)
        return Rehearsal(out.logits, maps or out.maps, out.attention, {"language": again})

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """Mutual attention: one score matrix, softmax over either side."""
        c = self.config
        depth = c.width // c.heads
        return (AttentionShape("mutual", c.layers, c.side**2, c.words, c.heads, depth),)

    def parts(self) -> tuple[Part, ...]:
        """``text`` once per expression, ``image`` once per picture, ``mask`` for every pair."""
        ids, words, pixels, index, logits = self.host_ports()
        text, image = self._text_ports(), self._image_ports()
        inputs = (index, words, *text, *image)
        return (
            Part("text", Method(self, self.encode_text), (ids, words), text),
            Part("image", Method(self, self.encode_image), (pixels,), image),
            Part("mask", Method(self, self._mask), inputs, (logits,)),
        )

    def _text_ports(self) -> tuple[Port, ...]:
        c = self.config
        rows = (BATCH, c.words, c.width)
        ports = (Port("language", "float32", rows), Port("state", "float32", rows))
        gate = Port("gate", "float32", (BATCH, self.neck.norm.num_features, 1, 1))
        return (*ports, gate) if c.early_fusion else ports

    def _image_ports(self) -> tuple[Port, ...]:
        c, neck = self.config, self.neck
        if c.early_fusion:
            names = ("top", "middle", "low")
            widths = (m.num_features for m in (neck.norm, neck.middle.bn, neck.low.bn))
            sides = (c.size // 32, c.size // 16, c.side)
            return tuple(
                Port(name, "float32", (IMAGES, width, side, side))
                for name, width, side in zip(names, widths, sides, strict=True)
            )
        depth, pixels = c.width // c.heads, c.side**2
        ports = [
            port
            for i in range(1, c.layers + 1)
            for port in (
                Port(f"keys_{i}", "float32", (IMAGES, c.heads, depth, pixels)),
                Port(f"values_{i}", "float32", (IMAGES, c.heads, pixels, depth)),
            )
        ]
        if c.skip:
            ports.append(Port("beside", "float32", (IMAGES, c.head_width, c.side, c.side)))
        return tuple(ports)

    def _mask(self, image_index: Tensor, words: Tensor, *products: Tensor) -> Tensor:
        cut = 3 if self.config.early_fusion else 2
        return self.decode(words, products[:cut], products[cut:], image_index).logits
