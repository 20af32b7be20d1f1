"""JSON records that carry a digest of their own bytes, so that a reader knows what was written."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

import msgspec

BLANK = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')


def seal(record: Any) -> bytes:
    """A frozen dataclass with a field ``digest`` as indented JSON, its own SHA-256 filled in.

    The digest is taken over the same bytes with zeros in its place.
    """
    blank = msgspec.json.format(msgspec.json.encode(replace(record, digest=BLANK)), indent=1)
    digest = hashlib.sha256(blank).hexdigest()
    return _DIGEST.sub(f'"digest": "{digest}"'.encode(), blank)


def broken(raw: bytes) -> str:
    """Why bytes are not as they were sealed; empty where they are."""
    found = _DIGEST.findall(raw)
    if len(found) != 1:
        return "it holds no digest of itself"
    digest: bytes = found[0]
    if hashlib.sha256(raw.replace(digest, BLANK.encode())).hexdigest() != digest.decode():
        return "its bytes do not match its digest"
    return ""
