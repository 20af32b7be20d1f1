"""Int8 as a script would do it: every float tensor, everywhere. For contrast, not for use.

This is what quantizing "all operators" means, attention mask and softmax included, per tensor. The
masked scores of a padded expression reach -1e4; the step that holds them erases the scores of the
words, and with them what the expression says.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..export.graph import GraphIndex
from .placement import Placement, place

_UNTOUCHED = ("Cast", "Equal", "TopK")


def naive_placement(
    index: GraphIndex, _: Iterable[str] = (), __: frozenset[str] = frozenset()
) -> Placement:
    """Every activation of every float node, norms, softmax and masked scores included."""
    sane = place(index)
    tensors = dict.fromkeys(sane.inputs)
    for node in index.nodes:
        if node.op_type in _UNTOUCHED:
            continue
        for name in (*node.input, *node.output):
            if name in index.tensors or not index.is_float(name) or name in index.outputs:
                continue
            tensors[name] = None
    weights = dict.fromkeys(sane.weights)
    return Placement(sane.int8, (), tuple(tensors), (), weights, sane.same)
