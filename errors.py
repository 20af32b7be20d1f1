"""The one error family: what happened, why, how to fix it, and a code that never changes.

Every error a user can cause is one of these, so a caller catches ``RefedgeError`` and the command
line prints three lines instead of a traceback. ``docs/errors.md`` lists the codes.
"""

from __future__ import annotations


class RefedgeError(Exception):
    """Something the user can understand and mend.

    what: what happened, one sentence naming the offending value.
    why:  the reason, or the rule that was broken.
    fix:  the next thing to do.
    code: stable identifier such as ``image-unreadable``; tests and scripts may rely on it.
    """

    def __init__(self, code: str, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"[{self.code}] {self.what}\n  why: {self.why}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.what, self.why, self.fix))


class InputError(RefedgeError):
    """An image, an expression or an option that cannot be used."""


class BundleError(RefedgeError):
    """A bundle that is missing, damaged, or made for something else."""


class CheckpointError(RefedgeError):
    """Weights that do not belong to the model they were given to."""


class DataError(RefedgeError):
    """A dataset, split or protocol that does not exist or cannot be read."""


class ExportError(RefedgeError):
    """A model that could not be turned into the graphs refedge promises."""


class BackendError(RefedgeError):
    """A runtime that is missing or refused a graph."""


class EngineError(RefedgeError):
    """A TensorRT engine that could not be built, or that belongs to another machine or bundle."""


class RefedgeWarning(UserWarning):
    """Something was changed on the way in, such as an expression cut to the model's word limit."""


def _rebuild(kind: type[RefedgeError], code: str, what: str, why: str, fix: str) -> RefedgeError:
    return kind(code, what, why=why, fix=fix)


def unwritable(path: object, error: OSError) -> InputError:
    """The error for a file or folder that cannot be written."""
    return InputError(
        "output-unwritable",
        f"{path} cannot be written",
        why=error.strerror or str(error),
        fix="choose a folder that exists or can be made, and that you may write to",
    )
