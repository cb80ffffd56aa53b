"""Frozen dataclasses that cost next to nothing to define, for what every start of a plugin's processes imports.

`dataclasses` compiles six methods for each class, and imports `inspect`: of the start of a supervisor that was a third.
Here all classes share their methods. To everybody else they are frozen dataclasses: what `dataclasses` and `inspect`
know of one is worked out when they ask. Every annotated name of the class is a field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from inspect import Signature

T = TypeVar("T")


class _Field:
    __slots__ = ("default_factory", "repr")

    def __init__(self, default_factory: Callable[[], Any] | None, shown: bool) -> None:
        self.default_factory = default_factory
        self.repr = shown


def field(*, default_factory: Callable[[], Any] | None = None, repr: bool = True) -> Any:  # noqa: A002 - as in dataclasses
    """Describe a field whose default is made anew for each record, or that is not shown, as in `dataclasses`."""
    return _Field(default_factory, repr)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class what ``dataclass(frozen=True, kw_only=...)`` would make it; it may derive from other records."""

    def make(cls: type[Any]) -> type[Any]:
        base = getattr(cls, "__layout__", None)
        layout = cls.__layout__ = _Layout(cls, base, kw_only)
        members = {} if base else _MEMBERS  # else it has inherited them
        for name, member in {**members, "__match_args__": () if kw_only else tuple(layout.template)}.items():
            setattr(cls, name, member)
        return cls

    return make


def replace(original: T, **changes: Any) -> T:
    """Return another record with some fields changed; like `dataclasses.replace`."""
    return type(original)(**{**vars(original), **changes})


class _Layout:
    """The fields of a class: ``template`` has them all, in order, with their defaults; ``open`` those without one."""

    def __init__(self, cls: type[Any], base: _Layout | None, kw_only: bool) -> None:
        self.kinds: dict[str, Any] = {**(base.kinds if base else {}), **cls.__annotations__}
        self.fields: dict[str, _Field] = dict(base.fields) if base else {}
        self.template: dict[str, Any] = dict(base.template) if base else {}
        self.open: dict[str, Callable[[], Any] | None] = dict(base.open) if base else {}
        self.kw_only = kw_only
        self.is_checked = hasattr(cls, "__post_init__")
        self.twin: type[Any] | None = None
        for name in cls.__annotations__:
            default = vars(cls).get(name, _NONE)
            if not isinstance(default, _Field):
                self.template[name] = default
                self.open.pop(name, None)
                continue
            self.template[name] = None  # in its place, and filled in for each record
            self.fields[name] = default
            self.open[name] = default.default_factory
            if default is not _NONE:
                delattr(cls, name)

    def place(self, cls: type[Any], values: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments by name."""
        names = cls.__match_args__[: len(values)]
        if len(values) > len(names):
            raise TypeError(f"{cls.__name__}() takes {len(names)} arguments by position, not {len(values)}")
        twice = [name for name in names if name in named]
        if twice:
            raise TypeError(f"{cls.__name__}() is given {', '.join(twice)} twice")
        return {**dict(zip(names, values, strict=True)), **named}


_NONE = _Field(None, shown=True)  # of a plain field without a default


def _init(self: Any, /, *values: Any, **named: Any) -> None:
    cls = type(self)
    layout: _Layout = cls.__layout__
    if values:
        named = layout.place(cls, values, named)
    state = self.__dict__
    state.update(layout.template)
    state.update(named)
    if len(state) > len(layout.template):
        raise TypeError(f"{cls.__name__}() has no field {', '.join(state.keys() - layout.template.keys())}")
    for name, default_factory in layout.open.items():
        if name not in named:
            if default_factory is None:
                raise TypeError(f"{cls.__name__}() needs {name}")
            state[name] = default_factory()
    if layout.is_checked:
        self.__post_init__()


def _repr(self: Any) -> str:
    fields = type(self).__layout__.fields
    shown = (name for name in type(self).__layout__.template if fields.get(name, _NONE).repr)
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _values(of: Any) -> tuple[Any, ...]:
    return tuple(getattr(of, name) for name in type(of).__layout__.template)


def _eq(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _setattr(self: Any, name: str, value: object) -> None:  # noqa: ARG001 - as object has it
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:  # noqa: ARG001 - as object has it
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


class _OfTwin:
    """An attribute that `dataclasses` looks for: that of the dataclass which a record stands for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, cls: type[Any]) -> Any:
        return getattr(_twin(cls), self._name)


class _SignatureOfTwin:
    def __get__(self, instance: object, cls: type[Any]) -> Signature:
        from inspect import signature

        return signature(_twin(cls))


def _twin(cls: type[Any]) -> type[Any]:
    layout: _Layout = cls.__layout__
    if layout.twin is None:
        import dataclasses

        described: list[Any] = []
        for name, kind in layout.kinds.items():
            options: dict[str, Any] = {"repr": layout.fields.get(name, _NONE).repr}
            if name not in layout.open:
                options["default"] = layout.template[name]
            elif layout.open[name] is not None:
                options["default_factory"] = layout.open[name]
            described.append((name, kind, dataclasses.field(**options)))
        layout.twin = dataclasses.make_dataclass(cls.__name__, described, frozen=True, kw_only=layout.kw_only)
    return layout.twin


_MEMBERS: dict[str, Any] = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
    "__replace__": replace,
    "__dataclass_fields__": _OfTwin("__dataclass_fields__"),
    "__dataclass_params__": _OfTwin("__dataclass_params__"),
    "__signature__": _SignatureOfTwin(),
}
