"""CM-MaskSD: cross-modality masked self-distillation (Wang et al., IEEE TMM 2024).

CLIP's towers, the neck, decoder and sentence-made kernel of CRIS; while it is trained, two more
branches with the same weights see a part of the picture or of the expression only and learn from
the branch that sees all (``distil.py``). There is no public code, so the choices are these: CRIS's
decoder on CLIP ViT-B/16 (or its whole graph on RN101), correlation in CLIP's own space, a teacher
without gradient.

Late fusion: the picture's features meet the expression at the neck's gate only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import (
    MEAN,
    MEAN_COLOUR,
    STD,
    ClipText,
    ClipVision,
    embed_words,
    encode_patches,
    encode_words,
    last_word,
    text_tower,
    vision_tower,
)
from .clip_resnet import ClipResNet, ModifiedResNet
from .cris import Decoder, Neck, Projector, PyramidNeck
from .distil import MaskedBranches
from .parts import BATCH, IMAGES, AttentionShape, Framing, Method, Network, Part, Port, Rehearsal
from .pictures import normalise_pixels, pick_all

Tensors = tuple[Tensor, ...]
PRODUCTS = 5  # tensors that the text part gives


@dataclass(frozen=True)
class CMMaskSDConfig:
    """Sizes of a CM-MaskSD; the defaults are the paper's.

    size:      pixels per side, a multiple of the coarsest stride.
    words:     tokens per expression; longer ones are cut, shorter ones padded.
    embed:     width of CLIP's common space.
    width, layers, heads, hidden: of neck and decoder.
    enlarge:   how much the projector enlarges the decoder's map, in two steps.
    vision, resnet: the visual tower, one of the two.
    distil:    whether the masked branches are trained, with the weight ``distil_weight``, on a
               ``distil_share`` of each batch; masked are ``mask_patches`` of the patches and
               ``mask_words`` of the words.
    brackets:  whether the tokenizer puts a token before and one behind each expression.
    """

    size: int = 480
    words: int = 17
    embed: int = 512
    width: int = 512
    layers: int = 3
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.1
    enlarge: tuple[int, int] = (2, 2)
    text: ClipText = field(default_factory=ClipText)
    vision: ClipVision | None = field(default_factory=ClipVision)
    resnet: ClipResNet | None = None
    distil: bool = True
    distil_weight: float = 1.0
    distil_share: float = 1.0
    mask_patches: float = 0.25
    mask_words: float = 0.2
    brackets: bool = True
    framing: Framing = field(
        default_factory=lambda: Framing("letterbox", "bicubic", MEAN_COLOUR, 0.35)
    )

    def __post_init__(self) -> None:
        if (self.vision is None) == (self.resnet is None):
            raise ValueError("a model has 1 visual tower: vision or resnet")
        coarsest = 32 if self.vision is None else self.vision.patch
        factor = self.enlarge[0] * self.enlarge[1]
        if self.size < coarsest or self.size % coarsest or self.stride % factor:
            raise ValueError(f"{self.size} pixels or {self.enlarge} do not fit strides {coarsest}")
        if self.width % (4 * self.heads) or not 1 <= self.words <= self.text.positions:
            raise ValueError(f"{self.width} channels or {self.words} words do not fit")
        if not (0 < self.distil_share <= 1 and 0 < self.mask_patches <= 0.5 > self.mask_words > 0):
            raise ValueError(f"shares of {self.mask_patches}, {self.mask_words} cannot be masked")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.text.vocabulary

    @property
    def stride(self) -> int:
        """Pixels per place of the decoder's map."""
        return 16 if self.vision is None else self.vision.patch

    @property
    def grid(self) -> int:
        """Places per side of the decoder's map."""
        return self.size // self.stride

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Channels and side of each map of the visual tower, finest first."""
        if self.resnet is None:
            return ((self.embed, self.grid),)
        fine = 8 * self.resnet.width
        return (fine, self.size // 8), (2 * fine, self.size // 16), (self.embed, self.size // 32)

    @property
    def seen(self) -> tuple[tuple[int, int], ...]:
        """Channels and side of what the neck makes of the picture alone."""
        c, g = self.width, self.grid
        return ((c, g),) if self.resnet is None else ((c // 2, g), (c, g), (2 * c, g // 2))


PAPER = CMMaskSDConfig()
RN101 = CMMaskSDConfig(size=416, vision=None, resnet=ClipResNet())
TINY = CMMaskSDConfig(
    size=96,
    words=20,
    embed=64,
    width=64,
    layers=2,
    heads=2,
    hidden=128,
    dropout=0.0,
    enlarge=(1, 2),
    text=ClipText(vocabulary=64, width=48, layers=2, heads=4, positions=20),
    vision=ClipVision(patch=8, width=96, layers=3, heads=4, stem="conv"),
    distil_weight=0.2,
    distil_share=0.125,
    brackets=False,
    framing=Framing(),
)
CONFIGS = {"paper": PAPER, "rn101": RN101, "tiny": TINY}


class Clip(nn.Module):
    """The two towers and their projections, named as in ``transformers.CLIPModel``.

    A residual network is called ``visual``, as in OpenAI's archives, and projects by itself.
    """

    def __init__(self, config: CMMaskSDConfig) -> None:
        super().__init__()
        self.text_model = text_tower(config.text)
        self.text_projection = nn.Linear(config.text.width, config.embed, bias=False)
        if config.vision is not None:
            self.vision_model = vision_tower(config.vision, config.size)
            self.visual_projection = nn.Linear(config.vision.width, config.embed, bias=False)
        if config.resnet is not None:
            self.visual = ModifiedResNet(config.resnet, config.size, config.embed)
        self.grid = config.grid

    def look(self, x: Tensor) -> Tensors:
        """Normalised pixels to the maps [B, C_i, h_i, w_i] of ``CMMaskSDConfig.levels``."""
        if hasattr(self, "visual"):
            maps: Tensors = self.visual(x)
            return maps
        places = self.visual_projection(encode_patches(self.vision_model, x))
        return (places.transpose(1, 2).reshape(-1, places.shape[2], self.grid, self.grid),)


class CMMaskSD(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: CMMaskSDConfig = PAPER) -> None:
        super().__init__()
        self.config = c = config
        self.clip = Clip(c)
        kind = Neck if c.resnet is None else PyramidNeck
        self.neck = kind(tuple(w for w, _ in c.levels), c.embed, c.width, c.grid)
        self.decoder = Decoder(
            c.layers, c.width, c.text.width, c.heads, c.hidden, c.grid, c.words, c.dropout
        )
        self.projector = Projector(c.width, c.embed, c.enlarge)
        self.branches = (
            MaskedBranches(tuple(w for w, _ in c.levels), c.text.width, c.mask_patches,
                           c.mask_words, c.brackets)
            if c.distil
            else None
        )  # fmt: skip
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    mean: Tensor
    std: Tensor
    # the last layer, whose kernel the sentence makes
    high = ("projector.dynamic", "projector.txt")
    tokens = "clip"
    config: CMMaskSDConfig

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of ``Rehearsal.maps``."""
        return tuple(width for width, _ in self.config.levels)

    def encode_text(self, ids: Tensor, words: Tensor) -> Tensors:
        """The ``text`` part: gate, keys, values, kernel and offset; see ``parts.Network``."""
        return self.speak(self.read(embed_words(self.clip.text_model, ids), words), words)

    def read(self, embedded: Tensor, words: Tensor) -> Tensor:
        """Token embeddings to word features, both [B, T, E]."""
        return encode_words(self.clip.text_model, embedded, words)

    def speak(self, features: Tensor, words: Tensor) -> Tensors:
        """Word features [B, T, E] to all that the ``mask`` part asks of an expression."""
        state = self.clip.text_projection(last_word(words, features))
        keys, values = self.decoder.keys_values(features, words)
        return self.neck.gate(state), keys, values, *self.projector.kernel(state)

    def look(self, pixels: Tensor) -> Tensors:
        """pixels [P, S, S, 3] uint8 to the visual tower's maps."""
        return self.clip.look(normalise_pixels(pixels, self.mean, self.std))

    def encode_image(self, pixels: Tensor) -> Tensors:
        """The ``image`` part: pixels [P, S, S, 3] uint8 to what the neck makes of a picture."""
        seen: Tensors = self.neck.look(self.look(pixels))
        return seen

    def segment(self, image_index: Tensor, words: Tensor, *rest: Tensor) -> Tensor:
        """The ``mask`` part: what the others gave, text first, to logits [B, S, S]."""
        seen = pick_all(rest[PRODUCTS:], image_index)
        return self.enlarge(self.decode(seen, words, rest[:PRODUCTS])[0])

    def decode(self, seen: Tensors, words: Tensor, products: Tensors) -> tuple[Tensor, Tensors]:
        """The neck's maps, a row for every expression, to logits [B, h, w] and attention."""
        gate, keys, values, kernel, offset = products
        fused, attention = self.decoder(self.neck(seen, gate), keys, values, words)
        return self.projector(fused, kernel, offset), attention

    def enlarge(self, logits: Tensor) -> Tensor:
        """[B, 1, h, w] to [B, S, S]."""
        factor = self.config.size // logits.shape[2]
        logits = F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)
        return logits.squeeze(1)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B or P, S, S, 3] uint8 to logits [B, S, S]; see ``parts.Network``."""
        seen = pick_all(self.encode_image(pixels), image_index)
        return self.enlarge(self.decode(seen, words, self.encode_text(ids, words))[0])

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """The forward with the losses of the masked branches."""
        embedded = embed_words(self.clip.text_model, ids)
        features = self.read(embedded, words)
        maps = self.look(pixels)
        seen = pick_all(self.neck.look(maps), image_index)
        logits, attention = self.decode(seen, words, self.speak(features, words))
        extra = None
        if self.branches is not None:
            chosen = torch.arange(0, len(ids), round(1 / self.config.distil_share)).to(ids.device)
            losses = self.branches(
                self,
                pick_all(maps, image_index[chosen]),
                embedded[chosen],
                features[chosen],
                words[chosen],
                logits[chosen],
                masks[chosen],
            )
            extra = {k: v * self.config.distil_weight for k, v in losses.items()}
        return Rehearsal(
            self.enlarge(logits),
            maps,
            tuple(weights.mean(1).transpose(1, 2) for weights in attention),
            extra,
        )

    def rescale(self, shift: float, scale: float) -> None:
        """Logits become ``scale * (logits - shift)``."""
        self.projector.rescale(shift, scale)

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """The decoder's layers."""
        c = self.config
        depth = c.width // c.heads
        return (AttentionShape("decoder", c.layers, c.grid**2, c.words, c.heads, depth),)

    def parts(self) -> tuple[Part, ...]:
        """The three graphs: ``text`` per expression, ``image`` per picture, ``mask``."""
        c = self.config
        depth, last = c.width // c.heads, c.width // 2
        gate = c.width if c.resnet is None else 2 * c.width
        ids, words, pixels, index, logits = self.host_ports()
        products = (
            Port("gate", "float32", (BATCH, gate)),
            Port("keys", "float32", (BATCH, c.layers, c.heads, depth, c.words)),
            Port("values", "float32", (BATCH, c.layers, c.heads, c.words, depth)),
            Port("kernel", "float32", (BATCH, 9, last)),
            Port("offset", "float32", (BATCH, 9, 1)),
        )
        seen = tuple(
            Port(f"seen_{i}", "float32", (IMAGES, width, side, side))
            for i, (width, side) in enumerate(c.seen, start=1)
        )
        mask = (index, words, *products, *seen)
        return (
            Part("text", Method(self, self.encode_text), (ids, words), products),
            Part("image", Method(self, self.encode_image), (pixels,), seen),
            Part("mask", Method(self, self.segment), mask, (logits,)),
        )
