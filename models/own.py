"""A model of one's own: ``FILE.py:FUNCTION``, checked against what its parts promise.

The function takes nothing and returns a ``Network`` and a ``tokenizers.Tokenizer``. The file is
run, so it must be one's own or be trusted.
"""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import ExportError
from .examples import host_inputs
from .parts import BATCH, HOST, IMAGES, Network, Part

FIELDS = ("size", "words", "vocabulary")
_BATCH = 3


def open_own(spec: str) -> tuple[Network, Tokenizer, str]:
    """The model in evaluation mode, its tokenizer, and the SHA-256 of its weights.

    Raises ExportError for a function that is missing or fails, and for a model that does not do
    what its parts say.
    """
    path, _, name = spec.rpartition(":")
    try:
        made = runpy.run_path(path)[name]()
    except FileNotFoundError as error:
        raise _refused(spec, f"there is no file {path}") from error
    except KeyError as error:
        raise _refused(spec, f"the file defines no {error}") from error
    except Exception as error:  # whatever a user's file raises
        raise _refused(spec, f"{type(error).__name__}: {error}") from error
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], Network)
        and isinstance(made[1], Tokenizer)
    ):
        raise _refused(spec, f"it returned {_kinds(made)}, not a Network and a Tokenizer")
    model, tokenizer = made
    require_sound(model.eval())
    weights = save({k: v.contiguous() for k, v in model.state_dict().items()})
    return model, tokenizer, hashlib.sha256(weights).hexdigest()


@torch.no_grad()
def require_sound(model: Network) -> None:
    """Run every part on inputs that its ports describe, and the whole; raise ExportError if unlike.

    Needs a config with ``size``, ``words`` and ``vocabulary``, parts from ``text`` to ``mask``
    whose inputs the host or an earlier part gives, and logits [B, size, size] at the end.
    """
    config: Any = getattr(model, "config", None)
    lacking = [f for f in FIELDS if not isinstance(getattr(config, f, None), int)]
    if lacking:
        raise _unsound(model, f"its config has no whole number {', '.join(lacking)}")
    parts = _call(model, "parts()", model.parts)
    names = [part.name for part in parts]
    if names not in (["text", "mask"], ["text", "image", "mask"]):
        raise _unsound(model, f"its parts are {names}, not text, perhaps image, and mask")
    known = host_inputs(model, _BATCH, 0)
    host = [known[name] for name in HOST]
    for part in parts:
        absent = [port.name for port in part.inputs if port.name not in known]
        if absent:
            raise _unsound(model, f"nobody gives {part.name!r} its input {', '.join(absent)}")
        known |= _run(model, part, known)
    whole = _call(model, "forward()", lambda: model(*host))
    logits = known.get("logits")
    if logits is None or tuple(logits.shape) != (_BATCH, config.size, config.size):
        raise _unsound(model, f"'mask' gives no logits [batch, {config.size}, {config.size}]")
    if not torch.allclose(whole, logits, rtol=1e-3, atol=1e-3 * float(whole.std())):
        raise _unsound(model, "forward() and the parts one after the other give different logits")


def _run(model: Network, part: Part, known: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = [known[port.name] for port in part.inputs]
    given = _call(model, f"the part {part.name!r}", lambda: part.module(*taken))
    outputs = given if isinstance(given, tuple) else (given,)
    if len(outputs) != len(part.outputs):
        raise _unsound(
            model, f"{part.name!r} gives {len(outputs)} tensors and names {len(part.outputs)}"
        )
    sizes = {BATCH: len(known["ids"]), IMAGES: len(known["pixels"])}
    for port, tensor in zip(part.outputs, outputs, strict=True):
        shape = tuple(sizes.get(n, n) if isinstance(n, str) else n for n in port.shape)
        if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, port.dtype):
            raise _unsound(
                model,
                f"{part.name!r} gives {port.name} as {tensor.dtype} {tuple(tensor.shape)}, "
                f"its port says {port.dtype} {shape}",
            )
    return dict(zip((port.name for port in part.outputs), outputs, strict=True))


def _call(model: Network, what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # whatever a user's code raises
        reason = (str(error).splitlines() or [""])[0]
        raise _unsound(model, f"{what} raises {type(error).__name__}: {reason}") from error


def _unsound(model: Network, why: str) -> ExportError:
    return ExportError(
        "model-protocol",
        f"{type(model).__name__} is not a model that refedge can take",
        why=why,
        fix="docs/models.md shows what a model must offer, with an example",
    )


def _refused(spec: str, why: str) -> ExportError:
    return ExportError(
        "model-file",
        f"{spec!r} gives no model",
        why=why,
        fix="name FILE.py:FUNCTION, a function that returns a Network and a Tokenizer",
    )


def _kinds(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__
