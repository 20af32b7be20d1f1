"""CLIPSeg: a small decoder on the activations of a frozen CLIP, modulated by one text vector.

Lüddecke and Ecker, "Image segmentation using text and image prompts", CVPR 2022; modules and names
are those of ``transformers.CLIPSegForImageSegmentation``, without what segmenting by text never
asks for: the last layers of the visual transformer and its projection. ``from_folder`` reads a
folder that transformers has written; nothing is downloaded.

Late fusion: the activations are narrowed once per picture, FiLM's factors made once per expression.
Pictures are squashed, as the published processor does; the masks are not calibrated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPSegConfig as TransformersConfig
from transformers import CLIPSegForImageSegmentation

from ..errors import CheckpointError
from .clip import (
    ClipText,
    ClipVision,
    embed_patches,
    embed_words,
    encode_layers,
    encode_words,
    last_word,
    resize_positions,
    text_settings,
    vision_settings,
)
from .parts import BATCH, IMAGES, Method, Network, Part, Port
from .pictures import MEAN, STD, normalise_pixels

Tensors = tuple[Tensor, ...]
POSITIONS = "clip.vision_model.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class CLIPSegConfig:
    """Sizes of a CLIPSeg; the defaults are those of ``clipseg-rd64-refined``.

    size:    pixels per side, a multiple of the patch.
    words:   tokens per expression, start and end among them.
    embed:   width of CLIP's common space.
    layers:  of the visual transformer, whose activations are taken, counted from 0.
    width, heads, hidden: of the decoder.
    condition: the decoder's layer that FiLM goes before.
    refined: three convolutions at the end instead of one.
    mean, std: of the pixels, in units of 0 to 1.
    """

    size: int = 352
    words: int = 77
    embed: int = 512
    layers: tuple[int, ...] = (3, 6, 9)
    width: int = 64
    heads: int = 4
    hidden: int = 2048
    condition: int = 0
    refined: bool = True
    text: ClipText = field(default_factory=ClipText)
    vision: ClipVision = field(default_factory=ClipVision)
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if self.size % self.vision.patch or not 1 <= self.words <= self.text.positions:
            raise ValueError(f"{self.size} pixels or {self.words} words do not fit the towers")
        if not 0 <= self.condition < len(self.layers) or max(self.layers) >= self.vision.layers:
            raise ValueError(f"layers {self.layers} do not fit {self.vision.layers}")
        if self.refined and self.vision.patch != 16:
            raise ValueError(f"three convolutions enlarge 16 times, not {self.vision.patch}")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.text.vocabulary

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size // self.vision.patch


PAPER = CLIPSegConfig()
TINY = CLIPSegConfig(
    size=96,
    words=20,
    embed=48,
    layers=(0, 1, 2),
    width=48,
    heads=4,
    hidden=96,
    refined=False,
    text=ClipText(vocabulary=64, width=48, layers=2, heads=4, positions=20),
    vision=ClipVision(patch=8, width=96, layers=3, heads=4),
)
CONFIGS = {"paper": PAPER, "tiny": TINY}


class CLIPSeg(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: CLIPSegConfig = PAPER) -> None:
        super().__init__()
        self.config = config
        whole = CLIPSegForImageSegmentation(_transformers_config(config))
        self.clip, self.decoder = whole.clip, whole.decoder
        vision = self.clip.vision_model
        vision.encoder.layers = vision.encoder.layers[: max(config.layers) + 1]
        self.last = "decoder.transposed_convolution" + (".4" if config.refined else "")
        del self.clip.visual_projection, self.clip.logit_scale, vision.post_layernorm
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    mean: Tensor
    std: Tensor
    # FiLM's factors, one number per channel for the whole picture
    high = ("decoder.film_mul", "decoder.film_add")
    tokens = "clip"
    config: CLIPSegConfig

    def encode_text(self, ids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, T] int32 and words [B, T] bool to FiLM's factor and shift, both [B, 1, W]."""
        tower = self.clip.text_model
        features = encode_words(tower, embed_words(tower, ids), words)
        condition = self.clip.text_projection(last_word(words, features))[:, None]
        return self.decoder.film_mul(condition), self.decoder.film_add(condition)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [P, S, S, 3] uint8 to narrowed activations [P, L, 1 + N, W], deepest first."""
        tower = self.clip.vision_model
        x = normalise_pixels(pixels, self.mean, self.std)
        states = encode_layers(tower.encoder.layers, embed_patches(tower, x))
        taken = [states[i] for i in self.config.layers][::-1]
        narrow = [layer(x) for layer, x in zip(self.decoder.reduces, taken, strict=True)]
        return torch.stack(narrow, dim=1)

    def segment(self, image_index: Tensor, factor: Tensor, shift: Tensor, seen: Tensor) -> Tensor:
        """What the other parts gave to logits [B, S, S]."""
        seen = seen.index_select(0, image_index)
        x = torch.zeros(())
        for i, layer in enumerate(self.decoder.layers):
            x = seen[:, i] if i == 0 else seen[:, i] + x
            if i == self.config.condition:
                x = factor * x + shift
            x = layer(x, attention_mask=None)
        side = self.config.grid
        grid = x[:, 1:].transpose(1, 2).reshape(-1, x.shape[2], side, side)
        logits: Tensor = self.decoder.transposed_convolution(grid)
        return logits.squeeze(1)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B or P, S, S, 3] uint8 to logits [B, S, S]; see ``parts.Network``."""
        if image_index is None:
            image_index = torch.arange(len(ids), device=ids.device)
        return self.segment(image_index, *self.encode_text(ids, words), self.encode_image(pixels))

    def parts(self) -> tuple[Part, ...]:
        """The three graphs: ``text`` per expression, ``image`` per picture, ``mask``."""
        c = self.config
        ids, words, pixels, index, logits = self.host_ports()
        film = tuple(Port(n, "float32", (BATCH, 1, c.width)) for n in ("factor", "shift"))
        seen = Port("seen", "float32", (IMAGES, len(c.layers), 1 + c.grid**2, c.width))
        return (
            Part("text", Method(self, self.encode_text), (ids, words), film),
            Part("image", Method(self, self.encode_image), (pixels,), (seen,)),
            Part("mask", Method(self, self.segment), (index, *film, seen), (logits,)),
        )


def from_folder(folder: Path, size: int = 352, words: int | None = None) -> CLIPSeg:
    """A CLIPSeg that ``save_pretrained`` has written, in evaluation mode.

    folder: with ``config.json`` and ``model.safetensors``; ``preprocessor_config.json`` is read for
            mean and deviation of the pixels if it is there.
    size:   pixels per side; positions are resized once, bicubically, as transformers does each
            time. words: tokens per expression; None for as many as there are positions.

    Raises CheckpointError where the folder holds no such model.
    """
    try:
        theirs = TransformersConfig.from_pretrained(folder, local_files_only=True)
        state = load_file(folder / "model.safetensors")
        config = _own_config(theirs, size, words, _pixels(folder))
        model = CLIPSeg(config)
        state[POSITIONS] = resize_positions(state[POSITIONS], config.grid)
        own = model.state_dict()
        model.load_state_dict({k: state[k] for k in own})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            "checkpoint-missing",
            f"{folder} is no CLIPSeg",
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="give a folder written by CLIPSegForImageSegmentation.save_pretrained",
        ) from error
    return model.eval()


def _pixels(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    names = {"mean": "image_mean", "std": "image_std"}
    return {own: tuple(found[name]) for own, name in names.items() if name in found}


def _own_config(
    theirs: TransformersConfig, size: int, words: int | None, pixels: dict[str, Any]
) -> CLIPSegConfig:
    text, vision = theirs.text_config, theirs.vision_config
    return CLIPSegConfig(
        size=size,
        words=words or text.max_position_embeddings,
        embed=theirs.projection_dim,
        layers=tuple(theirs.extract_layers),
        width=theirs.reduce_dim,
        heads=theirs.decoder_num_attention_heads,
        hidden=theirs.decoder_intermediate_size,
        condition=theirs.conditional_layer,
        refined=theirs.use_complex_transposed_convolution,
        text=ClipText(
            text.vocab_size,
            text.hidden_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.max_position_embeddings,
        ),
        vision=ClipVision(
            vision.patch_size,
            vision.hidden_size,
            vision.num_hidden_layers,
            vision.num_attention_heads,
        ),
        **pixels,
    )


def _transformers_config(config: CLIPSegConfig) -> TransformersConfig:
    return TransformersConfig(
        text_config=text_settings(config.text),
        vision_config=vision_settings(config.vision, config.size),
        projection_dim=config.embed,
        extract_layers=list(config.layers),
        reduce_dim=config.width,
        decoder_num_attention_heads=config.heads,
        decoder_intermediate_size=config.hidden,
        conditional_layer=config.condition,
        use_complex_transposed_convolution=config.refined,
        attn_implementation="eager",
    )
