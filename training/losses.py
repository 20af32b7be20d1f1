"""What the network is asked for: the mask, and at first what is seen where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import ATTRIBUTES


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus Dice (Milletari et al., 3DV 2016); both [B, H, W].

    Target pixels are few and count four times. Dice counts a few pixels of smoothing, so that an
    empty truth asks for an empty prediction.
    """
    truth = masks.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, weight=1.0 + 3.0 * truth)
    likely = torch.sigmoid(logits).flatten(1)
    truth = truth.flatten(1)
    overlap = 2.0 * (likely * truth).sum(1) + 20.0
    dice = 1.0 - overlap / (likely.sum(1) + truth.sum(1) + 20.0)
    return cross_entropy + 0.5 * dice.mean()


def grounding_loss(weights: Tensor, meanings: Tensor, words: Tensor, labels: Tensor) -> Tensor:
    """Pixels are to attend to the words that are true of them.

    A pixel of a red circle should look at "red" and "circle" where they are said, and at a word
    that names no attribute otherwise. Without this push the network is slow to find out what a
    word has to do with a pixel, because instance normalisation removes whatever an expression
    says to all pixels alike.

    weights:  [B, T, h * w] attention over words.
    meanings: [B, T, 4] attribute value of each word, 0 where it names none (``batches.meanings``).
    words:    [B, T] bool. labels: [B, 4, H, W] attribute values of the pixels.
    """
    side = int(weights.shape[2] ** 0.5)
    here = _sample(labels, side).flatten(2)
    named = meanings[:, :, :, None]
    true = ((named == here[:, None]) & (named > 0)).any(2)
    neutral = (words & (meanings == 0).all(2))[:, :, None]
    wanted = torch.where(true.any(1, keepdim=True), true, neutral)
    loss = -torch.log((weights.float() * wanted).sum(1) + 1e-3) * wanted.any(1)
    seen = (here[:, 0] > 0).to(loss.dtype)
    things = (loss * seen).sum() / seen.sum().clamp_min(1.0)
    background = (loss * (1.0 - seen)).sum() / (1.0 - seen).sum().clamp_min(1.0)
    return things + 0.3 * background


def _sample(labels: Tensor, side: int) -> Tensor:
    """Labels [B, 4, H, W] at the centres of a side x side grid."""
    step = labels.shape[2] // side
    return labels[:, :, step // 2 :: step, step // 2 :: step].long()


class AttributeHead(nn.Module):
    """Training only: from encoder maps, the attributes and the mask on their coarse grids.

    The network learns words such as "striped" much sooner when it is told what is striped; the
    labels are free, since RefShapes knows its things.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = [len(names) + 1 for names in ATTRIBUTES]
        self.layers = nn.ModuleList(nn.Conv2d(c, sum(self.sizes) + 1, 1) for c in widths)

    def forward(
        self, maps: Sequence[Tensor], labels: Tensor, index: Tensor, masks: Tensor
    ) -> Tensor:
        """Mean loss; maps [B or P, C_i, h_i, w_i], labels [P, 4, H, W], masks [B, H, W].

        index: [B], each expression's picture. Maps of pictures know nothing of an expression, so
        no mask is asked of them.
        """
        total = labels.new_zeros((), dtype=torch.float32)
        for layer, x in zip(self.layers, maps, strict=True):
            out = layer(x).float()
            seen = labels if len(x) == len(labels) else labels[index]
            here = _sample(seen, out.shape[2])
            for values, truth in zip(
                out[:, 1:].split(self.sizes, dim=1), here.unbind(1), strict=True
            ):
                total = total + F.cross_entropy(values, truth) / len(self.sizes)
            if len(x) == len(masks):
                coarse = F.avg_pool2d(masks[:, None].float(), masks.shape[1] // out.shape[2])
                total = total + F.binary_cross_entropy_with_logits(out[:, :1], coarse)
        return total / max(1, len(self.layers))
