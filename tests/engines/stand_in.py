"""TensorRT's names without TensorRT: records the order of calls, knows no name the real one lacks.

Every attribute is looked up in the table of the real bindings' names of one version; what is not in
it raises AttributeError, as it would there. Results are what the table says a call returns; what
matters to the builder's decisions (parsing succeeded, bytes were made) is given by the test.
"""

from __future__ import annotations

from typing import Any

from .conformance import TABLE


class Member:
    """A value of an enumeration."""

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name

    def __int__(self) -> int:
        names = [n for n in TABLE[self.group] if n not in ("name", "value")]
        return names.index(self.name)

    def __repr__(self) -> str:
        return f"{self.group}.{self.name}"

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class Thing:
    """An object of a class of the bindings."""

    def __init__(self, world: Bindings, group: str, values: dict[str, Any] | None = None) -> None:
        self.__dict__.update(_world=world, _group=group, _values=values or {})

    def __getattr__(self, name: str) -> Any:
        self._world.require(self._group, name)
        if name in self._values:
            return self._values[name]
        arguments, result = TABLE[self._group][name][1:]

        def call(*given: Any, **named: Any) -> Any:
            assert set(named) <= set(arguments)
            self._world.calls.append((f"{self._group}.{name}", given))
            key = f"{self._group}.{name}"
            if key in self._world.results:
                made = self._world.results[key]
                return made(*given) if callable(made) else made
            return Thing(self._world, result) if result else True

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._world.require(self._group, name)
        self._world.calls.append((f"{self._group}.{name} =", (value,)))
        self._values[name] = value


class Bindings:
    """The module ``tensorrt`` of a version."""

    def __init__(self, version: str, results: dict[str, Any]) -> None:
        self._version = version
        self.__version__ = f"{version}.1"
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.results = results
        world = self

        class Base:
            def __init__(self) -> None:
                pass

        class ILogger(Base):
            INTERNAL_ERROR, ERROR, WARNING = (
                Member("ILogger", n) for n in ("INTERNAL_ERROR", "ERROR", "WARNING")
            )

        self._own = {"ILogger": ILogger, "IProgressMonitor": type("IProgressMonitor", (Base,), {})}
        self._world = world

    def has(self, group: str, name: str) -> bool:
        return self._version in TABLE.get(group, {}).get(name, [""])[0].split()

    def require(self, group: str, name: str) -> None:
        if not self.has(group, name):
            raise AttributeError(f"TensorRT {self._version} has no {group}.{name}")

    def __getattr__(self, name: str) -> Any:
        self.require("", name)
        if name in self._own:
            return self._own[name]
        if name not in TABLE:
            result = TABLE[""][name][2]
            return lambda *given: Thing(self, result) if result else True
        if name in ("Builder", "OnnxParser", "OnnxParserRefitter", "Refitter", "Runtime"):
            values = self.results.get(name, {})
            if values is None:  # the bindings' word for a null pointer
                raise TypeError("factory function returned nullptr")
            return lambda *given: Thing(self, name, dict(values))
        return Enumeration(self, name)


class Enumeration:
    """Values by name."""

    def __init__(self, world: Bindings, group: str) -> None:
        self.__dict__.update(_world=world, _group=group)

    def __getattr__(self, name: str) -> Any:
        self._world.require(self._group, name)
        return Member(self._group, name)
