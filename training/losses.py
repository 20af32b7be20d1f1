"""What the network is asked for: the mask, and at first what is seen where."""

from __future__ import annotations

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


class AttributeHead(nn.Module):
    """Training only: from encoder maps, the attributes and the mask on their coarse grids.

    The network learns words such as "striped" much sooner when it is told what is striped; the
    labels are free, since RefShapes knows its things.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = [len(names) + 1 for names in ATTRIBUTES]
        self.layers = nn.ModuleList(nn.Conv2d(c, sum(self.sizes) + 1, 1) for c in widths)

    def forward(self, maps: list[Tensor], labels: Tensor, masks: Tensor) -> Tensor:
        """Mean loss; maps [B, C_i, h_i, w_i], labels [B, 4, H, W], masks [B, H, W]."""
        total = labels.new_zeros((), dtype=torch.float32)
        for layer, x in zip(self.layers, maps, strict=True):
            out = layer(x).float()
            step = labels.shape[2] // out.shape[2]
            here = labels[:, :, step // 2 :: step, step // 2 :: step].long()
            for values, truth in zip(
                out[:, 1:].split(self.sizes, dim=1), here.unbind(1), strict=True
            ):
                total = total + F.cross_entropy(values, truth) / len(self.sizes)
            coarse = F.avg_pool2d(masks[:, None].float(), step)
            total = total + F.binary_cross_entropy_with_logits(out[:, :1], coarse)
        return total / len(self.layers)
