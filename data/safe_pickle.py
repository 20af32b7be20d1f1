"""Pickles of plain data, read without trust.

A pickle is a program. Refusing its globals keeps it from calling anything, but the fast unpickler
can still be crashed: a tuple nested a million times deep and used as a key overflows the C stack
while it is hashed, and one opcode can demand a memo of 64 GB. Here every opcode that plain lists,
dicts, strings, numbers, booleans and None do not need is withheld, which leaves nothing to call
and nothing to overflow. 150,000 made-up expressions, as many as RefCOCO has, take five seconds of
one x86 core, five times as long as the fast unpickler.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import corrupt

_PLAIN = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.LIST, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.DICT, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
)
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class _RefusedError(Exception):
    """An opcode that plain data does not need."""


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        if opcode in _NAMES:
            raise _RefusedError(_NAMES[opcode])
        raise pickle.UnpicklingError(f"byte {opcode:#04x} is no pickle opcode")


class _PlainUnpickler(pickle._Unpickler):
    # the C unpickler offers no way to withhold opcodes; this one looks each up in ``dispatch``
    dispatch = _Opcodes({op[0]: pickle._Unpickler.dispatch[op[0]] for op in _PLAIN})

    def find_class(self, module: str, name: str) -> Any:
        raise _RefusedError("GLOBAL")


def loads_plain(raw: bytes, name: Path | str) -> Any:
    """The lists, dicts, strings, numbers, booleans and None of a pickle of any protocol.

    Strings that Python 2 wrote as bytes are read as Latin-1. ``name`` says whose bytes these are.
    """
    try:
        return _PlainUnpickler(io.BytesIO(raw), encoding="latin1").load()
    except _RefusedError as error:
        raise DataError(
            "data-pickle",
            f"{name} is not plain data",
            why=f"it uses the pickle opcode {error}; such a file could run code",
            fix="take the file from the dataset's own source, or convert it to JSON where you "
            "trust it",
        ) from error
    except Exception as error:  # the bytes choose the exception: EOFError, KeyError, TypeError, ...
        why = f"it is not a whole pickle ({type(error).__name__}: {error})"
        raise corrupt(name, why) from error
