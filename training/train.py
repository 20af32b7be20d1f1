"""Train a model on RefShapes: ``refedge train``.

One loop: batch, mask loss plus a fading attribute loss, AdamW under a cosine, a moving average of
the weights, a validation score now and then. The state is written every few minutes, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.protocols import PROTOCOLS, Meter, Scores
from ..data.refshapes.dataset import RefShapes, Sample
from ..errors import CheckpointError
from ..models.checkpoint import (
    Loaded,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_card,
)
from ..models.families import family
from ..models.parts import Network
from .batches import Batch, collate, meanings, stream, tokenizer
from .losses import AttributeHead, grounding_loss, mask_loss
from .recipe import Recipe

STATE = "state.pt"
Say = Callable[[str], None]


def train(
    name: str,
    config: Any,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    every: int = 500,
    test_scenes: int = 1000,
    say: Say = print,
) -> Loaded:
    """Run a recipe to its end, write the checkpoint, score it, and return it as it was written.

    name, config: family and configuration of the model.
    folder:      where the state and the checkpoint go; a state of the same recipe is resumed.
    every:       steps between validation scores.
    test_scenes: scenes of the test split that the scores in the card are measured on.
    """
    run = _Run(name, config, recipe, device)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / STATE).is_file():
        run.resume(folder / STATE)
        say(f"resumed at step {run.step} of {recipe.steps}")
    started, last_saved = time.perf_counter(), time.perf_counter()
    first = run.step
    batches = stream(recipe, config.size, config.words, start=run.step, workers=workers)
    for loss in run.advance(batches):
        due = run.step % every == 0 or run.step == recipe.steps
        if due:
            scores, families = run.validate()
            run.record(loss, scores, families)
        if due or time.perf_counter() - last_saved > 120:
            run.save(folder / STATE)
            last_saved = time.perf_counter()
        if due:
            speed = (run.step - first) / (time.perf_counter() - started)
            say(_line(run, loss, scores, families, speed))
    training = {
        "recipe": asdict(recipe),
        "pairs": recipe.pairs,
        "torch": str(torch.__version__),
        "device": device,
        "curve": run.curve,
    }
    save_checkpoint(folder, name, run.averaged.to("cpu"), tokenizer(), training=training)
    say("scoring the test split")
    return _score_card(folder, recipe.difficulty, test_scenes)


def _score_card(folder: Path, difficulty: str, scenes: int) -> Loaded:
    """Score the weights as they lie on disk (in float16) and add the result to the card."""
    loaded = load_checkpoint(str(folder))
    config = loaded.model.config
    samples = RefShapes("test", difficulty=difficulty, size=config.size, scenes=scenes)
    overall, families = _score(loaded.model, samples, config.words, "cpu")
    record = {
        "protocol": "refshapes",
        "scenes": scenes,
        "overall": asdict(overall),
        "families": {name: asdict(s) for name, s in families.items()},
    }
    name = "refshapes:test" if difficulty == "lite" else f"refshapes-{difficulty}:test"
    card = replace(loaded.card, scores={name: record})
    write_card(folder, card)
    return replace(loaded, card=card)


@torch.no_grad()
def _score(
    model: Network, samples: Iterable[Sample], words: int, device: str
) -> tuple[Scores, dict[str, Scores]]:
    """Scores under the protocol ``refshapes``, a few scenes at a time."""
    meter = Meter(PROTOCOLS["refshapes"])
    pending = iter(samples)
    while chunk := list(islice(pending, 16)):
        batch = collate(chunk, words)
        found = model(*(t.to(device) for t in batch.inputs)) > 0
        pairs = [(sample, e) for sample in chunk for e in sample.expressions]
        for mask, (sample, e) in zip(found.cpu().numpy(), pairs, strict=True):
            meter.add(mask, sample.mask(e), family=e.family, things=sample.things)
    return meter.scores(), meter.by_family()


class _Run:
    """Everything that changes during a run."""

    def __init__(self, name: str, config: Any, recipe: Recipe, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        build = family(name).build
        self.model = build(config).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.head = AttributeHead(self.model.map_widths).to(device)
        self.averaged = build(config).to(device).eval()
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            _groups(nn.ModuleList((self.model, self.head)), recipe.decay), lr=recipe.rate
        )
        self.meanings = meanings().to(device)
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._validation = list(
            RefShapes("val", difficulty=recipe.difficulty, size=config.size, scenes=80)
        )

    def advance(self, batches: Iterator[Batch]) -> Iterator[float]:
        """One optimiser step per batch; yields the running loss."""
        running = 0.0
        for batch in batches:
            loss = self._one(batch)
            running = loss if running == 0.0 else 0.98 * running + 0.02 * loss
            self.step += 1
            yield running

    def _one(self, batch: Batch) -> float:
        recipe, device = self.recipe, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(self.step, recipe)
        pixels, ids, words, index = (t.to(device) for t in batch.inputs)
        masks, labels = batch.masks.to(device), batch.labels.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.bfloat16):
            seen = self.model.rehearse(pixels, ids, words, index, masks)
        loss = mask_loss(seen.logits.float(), masks)
        weight = recipe.auxiliary * max(0.0, 1.0 - 2.0 * self.step / recipe.steps)
        total = loss + sum((seen.extra or {}).values())
        if weight and seen.maps:
            total = total + weight * self.head(seen.maps, labels, index, masks)
        if weight and seen.attention:
            named, here = self.meanings[ids.long()], labels[index]
            grounded = sum(grounding_loss(a, named, words, here) for a in seen.attention)
            total = total + weight * grounded / len(seen.attention)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        for old, new in zip(
            self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if old.is_floating_point():
                old.lerp_(new, 1.0 - decay)
            else:
                old.copy_(new)

    def validate(self) -> tuple[Scores, dict[str, Scores]]:
        """Scores of the averaged weights on the first validation scenes."""
        return _score(self.averaged, self._validation, self.averaged.config.words, self.device)

    def record(self, loss: float, scores: Scores, families: dict[str, Scores]) -> None:
        """Add a point to the curve that goes into the card."""
        point: dict[str, Any] = {"step": self.step, "loss": round(loss, 4)}
        point["miou"] = round(scores.miou or 0.0, 4)
        point["n_acc"] = round(scores.n_acc or 0.0, 4)
        point["families"] = {
            name: round(s.miou, 4) for name, s in families.items() if s.miou is not None
        }
        self.curve.append(point)

    def save(self, path: Path) -> None:
        """Write everything that resuming needs."""
        buffer = io.BytesIO()
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "step": self.step,
                "model": self.model.state_dict(),
                "averaged": self.averaged.state_dict(),
                "head": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "curve": self.curve,
            },
            buffer,
        )
        write_atomically(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Read a state of the same recipe (as tensors only: ``weights_only``)."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise CheckpointError(
                "train-recipe",
                f"{path} belongs to another recipe",
                why=f"it was trained with {state['recipe']}",
                fix="use the same options, or another folder",
            )
        for name in ("model", "averaged", "head", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.curve = state["step"], state["curve"]


def _groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only."""
    decayed: list[Tensor] = [p for p in module.parameters() if p.ndim > 1]
    plain: list[Tensor] = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to one percent."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done))


def _line(run: _Run, loss: float, scores: Scores, families: dict[str, Scores], speed: float) -> str:
    each = "  ".join(f"{name} {s.miou:.3f}" for name, s in families.items() if s.miou is not None)
    left = (run.recipe.steps - run.step) / speed / 60
    return (
        f"step {run.step}/{run.recipe.steps}  loss {loss:.3f}  val mIoU {scores.miou or 0:.3f}"
        f"  {each}  none {scores.n_acc or 0:.2f}  {left:.0f} min left"
    )
