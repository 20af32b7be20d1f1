"""Why TensorRT did not build: its own words, as errors that can be mended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..runtime.backends.bindings import last_words

if TYPE_CHECKING:
    import tensorrt as trt

# words of the parser and of the builder, 8.6 to 11
_PLUGIN = re.compile(r"plugin creator|find plugin|plugin not found|No importer registered", re.I)
_MEMORY = re.compile(r"out of memory|OutOfMemory|Cuda failure: 2\b|insufficient memory", re.I)
_NODE = re.compile(r'^name: "([^"]+)"', re.M)  # of a node that the parser prints (8.6)


def not_parsed(trt: Any, parser: trt.OnnxParser, part: str, lines: Sequence[str]) -> EngineError:
    """EngineError ``engine-plugin`` or ``engine-parse``, naming the node."""
    said, nodes = [], []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        said.append(str(error.desc()))
        if hasattr(error, "node_name"):
            nodes.append(f"{error.node_name()} ({error.node_operator()})")
    nodes = nodes or _NODE.findall("\n".join(lines))
    where = f" at {', '.join(dict.fromkeys(nodes))}" if nodes else ""
    why = "; ".join(dict.fromkeys(said)) or last_words(lines)
    if _PLUGIN.search("\n".join([why, *lines])):
        return EngineError(
            "engine-plugin",
            f"TensorRT {trt.__version__} lacks a plugin that the part {part!r} needs{where}",
            why=why,
            fix="name its library with --plugin, or export the bundle without it",
        )
    return EngineError(
        "engine-parse",
        f"TensorRT {trt.__version__} refuses the graph of the part {part!r}{where}",
        why=why,
        fix="nodes are named after torch modules: rewrite that one, or build another plan",
    )


def not_built(trt: Any, part: str, lines: Sequence[str]) -> EngineError:
    """EngineError ``engine-memory`` or ``engine-build``, with the end of TensorRT's log."""
    why = last_words(lines)
    if _MEMORY.search(why):  # earlier lines speak of tactics that were skipped
        return no_memory(part, why)
    return EngineError(
        "engine-build",
        f"TensorRT {trt.__version__} built no engine of the part {part!r}",
        why=why,
        fix="try --level 1 or another plan; the log line names the layer",
    )


def not_refitted(trt: Any, part: str, why: str, missing: Sequence[str]) -> EngineError:
    """EngineError ``engine-refit``, naming the first weights that nobody gave."""
    named = f"; without {', '.join(missing[:4])}{' …' * (len(missing) > 4)}" if missing else ""
    return EngineError(
        "engine-refit",
        f"TensorRT {trt.__version__} cannot put the weights into the engine of the part {part!r}",
        why=why + named,
        fix="take that engine away and build it here with its weights: refedge build",
    )


def no_memory(part: str, why: str) -> EngineError:
    """EngineError ``engine-memory``."""
    return EngineError(
        "engine-memory",
        f"the memory did not suffice to build the part {part!r}",
        why=why,
        fix="end other programs (on Jetson the desktop too), add swap, and build again with "
        "--workspace 512 --level 1: parts that are done are kept",
    )
