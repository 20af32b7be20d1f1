"""What a training run is made of: one frozen record, stored in the checkpoint's card."""

from __future__ import annotations

from dataclasses import dataclass

# what the expressions of a scene are about, scene after scene
MIXTURE = (
    ("attribute", "attribute", "extreme", "relation"),
    ("attribute", "superlative", "extreme", "none"),
    ("attribute", "superlative", "relation", "extreme"),
    ("attribute", "attribute", "relation", "none"),
)


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; two runs of equal recipes and library versions see equal batches.

    steps:        optimiser steps; the schedule is a cosine over all of them.
    scenes:       scenes per step, each with four expressions (``MIXTURE``).
    rate:         highest learning rate, reached after ``warmup`` steps.
    auxiliary:    weight of the attribute and grounding losses, which fade to zero over the run's
                  first half.
    average:      decay of the exponential moving average of the weights, which is what is kept.
    bfloat16:     autocast to bfloat16.
    """

    difficulty: str = "lite"
    steps: int = 7000
    scenes: int = 8
    rate: float = 3e-3
    warmup: int = 300
    decay: float = 0.02
    clip: float = 2.0
    auxiliary: float = 0.5
    average: float = 0.998
    bfloat16: bool = False
    seed: int = 1

    @property
    def pairs(self) -> int:
        """Image-expression pairs that the whole run sees."""
        return self.steps * self.scenes * len(MIXTURE[0])
