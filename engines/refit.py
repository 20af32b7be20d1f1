"""Put the weights into an engine that was built without them (``--strip``), from the graph's file.

TensorRT strips only what can be put back, under the promise that it is the same again
(``REFIT_IDENTICAL``); that it is, the graph's SHA-256 in the record says, since a graph names its
weight file by hash. Needs TensorRT 10: 8.6 neither strips nor reads weights from ONNX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..runtime.backends.bindings import last_words, new_runtime
from .refusals import not_built, not_refitted


def filled(
    trt: Any, logger: Any, stripped: Path, graph: str, part: str, *, keep: bool, host_code: bool
) -> bytes:
    """The whole engine; raises EngineError ``engine-refit`` with the weights that are missing.

    keep: its weights can be replaced once more, as far as TensorRT (10.14 and later) can say so.
    host_code: it is for later versions too, and brings code of its own.
    """
    if not hasattr(trt, "OnnxParserRefitter"):
        raise EngineError(
            "engine-option",
            f"TensorRT {trt.__version__} puts no weights into engines",
            why="that came with TensorRT 10",
            fix="build the engines here: take the stripped ones away first",
        )
    runtime = new_runtime(trt, logger)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(stripped.read_bytes())
    if engine is None:
        raise not_built(trt, part, logger.lines)
    try:
        refitter = trt.Refitter(engine, logger)
    except TypeError as error:  # the bindings' word for a null pointer
        raise not_refitted(trt, part, last_words(logger.lines), ()) from error
    parser = trt.OnnxParserRefitter(refitter, logger)
    read = parser.refit_from_file(graph)
    missing = refitter.get_missing_weights()
    if not read or missing or not refitter.refit_cuda_engine():
        said = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise not_refitted(trt, part, "; ".join(said) or last_words(logger.lines), missing)
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if keep and hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    blob = engine.serialize_with_config(config)
    if blob is None:
        raise not_refitted(trt, part, last_words(logger.lines), ())
    return bytes(blob)
