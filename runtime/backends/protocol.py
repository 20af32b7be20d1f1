"""What a backend must do: load a graph, say what it takes, run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..manifest import PartSpec

Arrays = Mapping[str, npt.NDArray[np.generic]]


class LoadedPart(Protocol):
    """A graph that is ready to run; ``largest`` is the largest batch that it takes."""

    largest: int

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs by name; inputs must match the part's specification.

        What another part of the same backend takes may stay on a device: then NumPy still sees an
        array (``backends/tensors.py``). What the part ``mask`` gives is always on the host.
        """


class Backend(Protocol):
    """A runtime that can load parts of a bundle."""

    name: str

    def dialects(self, plan: str) -> Sequence[str]:
        """Dialects of a plan that this backend runs on this machine, the best first."""

    def load(self, graph: Path, part: PartSpec) -> LoadedPart:
        """Load one graph and check it against the part's specification."""
