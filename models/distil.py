"""Masked self-distillation, the training of CM-MaskSD; absent from what is exported.

Two branches with the network's own weights see less than everything and learn from the truth and
from the branch that sees all, whose gradient is stopped: LMVSD sees the picture without some of the
patches that the words point to, VMLSD reads the expression without some of the words that the
picture points to. What points where is the correlation of patches and words in CLIP's space.

The paper's ratios and distance are not known; here half of the most correlated share of patches or
words is masked, at random, and the distance is the Kullback-Leibler divergence of every pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = tuple[Tensor, ...]


class MaskedBranches(nn.Module):
    """The embeddings that take the place of what is masked, and the losses of both branches.

    widths: channels of the visual tower's maps. text: width of token embeddings.
    patches, words: shares that are masked. brackets: the first and last word are no words.
    """

    def __init__(
        self, widths: tuple[int, ...], text: int, patches: float, words: float, brackets: bool
    ) -> None:
        super().__init__()
        self.patch = nn.ParameterList(nn.Parameter(0.02 * torch.randn(w)) for w in widths)
        self.word = nn.Parameter(0.02 * torch.randn(text))
        self.patches, self.words, self.brackets = patches, words, brackets

    def forward(
        self,
        model: Any,
        maps: Tensors,
        embedded: Tensor,
        features: Tensor,
        words: Tensor,
        logits: Tensor,
        masks: Tensor,
    ) -> dict[str, Tensor]:
        """Losses by name, for B rows.

        model:    a ``CMMaskSD``. maps: [B, C_i, h_i, w_i], the visual tower's.
        embedded, features: [B, T, E], words before and behind the text tower. words: [B, T] bool.
        logits:   [B, 1, h, w] of the branch that sees all. masks: [B, S, S] bool.
        """
        with torch.no_grad():
            similar = correlation(maps[-1], model.clip.text_projection(features))
            hidden = self.hide_patches(similar, words, maps[-1].shape[2])
            muted = self.mute_words(similar, words)
        masked = self.without_patches(maps, hidden)
        read = model.read(torch.where(muted[:, :, None], self.word, embedded), words)
        with _unrecorded(model):
            seen = model.neck.look(tuple(map(_pair, masked, maps)))
            twice = _pair(words, words)
            both, _ = model.decode(seen, twice, model.speak(_pair(features, read), twice))
        vision, language = both.chunk(2)
        step = masks.shape[1] // logits.shape[2]
        truth = masks[:, None, step // 2 :: step, step // 2 :: step].to(logits.dtype)
        teacher = logits.detach()
        return {
            "masked_vision": F.binary_cross_entropy_with_logits(vision, truth),
            "masked_language": F.binary_cross_entropy_with_logits(language, truth),
            "distil_vision": divergence(vision, teacher),
            "distil_language": divergence(language, teacher),
        }

    def hide_patches(self, similar: Tensor, words: Tensor, side: int) -> Tensor:
        """Correlation [B, N, T] to the patches to hide, [B, side, side] bool."""
        relevance = similar.masked_fill(~words[:, None], -2.0).amax(2)
        everywhere = torch.ones_like(relevance, dtype=torch.bool)
        return choose(relevance, everywhere, self.patches).reshape(-1, side, side)

    def mute_words(self, similar: Tensor, words: Tensor) -> Tensor:
        """Correlation [B, N, T] to the words to mute, [B, T] bool; never the start or the end."""
        allowed = words
        if self.brackets:
            allowed = words & F.pad(words[:, 1:], (0, 1))
            allowed = allowed & (torch.arange(words.shape[1], device=words.device) > 0)
        return choose(similar.amax(1), allowed, self.words)

    def without_patches(self, maps: Tensors, hidden: Tensor) -> Tensors:
        """The maps with the mask embedding where the patches are hidden."""
        masked = []
        for x, embedding in zip(maps, self.patch, strict=True):
            factor = x.shape[2] // hidden.shape[1]
            where = hidden.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            masked.append(torch.where(where[:, None], embedding[:, None, None], x))
        return tuple(masked)


@contextlib.contextmanager
def _unrecorded(model: nn.Module) -> Iterator[None]:
    """Batch norms keep their running statistics: those of whole pictures and expressions."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def _pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second))


def correlation(map_: Tensor, features: Tensor) -> Tensor:
    """Cosines of patches [B, C, h, w] and words [B, T, C], [B, h * w, T]."""
    patches = F.normalize(map_.flatten(2), dim=1)
    return (F.normalize(features, dim=2) @ patches).transpose(1, 2)


def choose(scores: Tensor, allowed: Tensor, share: float) -> Tensor:
    """A random half of the highest ``2 * share`` of what is allowed (of at least two), [B, N] bool.

    scores: [B, N]; allowed: [B, N] bool.
    """
    counts = allowed.sum(1, keepdim=True)
    taken = (counts * share).round().clamp_min(1).minimum(counts)
    order = scores.masked_fill(~allowed, -torch.inf)
    relevant = _rank(order) < torch.minimum(2 * taken, counts)
    lot = torch.rand(scores.shape, device=scores.device).masked_fill(~relevant, -1.0)
    return (_rank(lot) < taken) & relevant


def _rank(scores: Tensor) -> Tensor:
    """The place of each value of a row, 0 for the largest."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of two maps of logits, the teacher's from the student's."""
    entropy = F.binary_cross_entropy_with_logits(teacher, torch.sigmoid(teacher))
    return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher)) - entropy
