"""Frozen dataclasses that are made cheaply, for what every booking makes."""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import wraps
from typing import Any, TypeVar

Record = TypeVar("Record")


def made_at_once(cls: type[Record]) -> type[Record]:
    """Have a frozen dataclass with keyword fields and a `__dict__` write its fields there.

    The `__init__` that it has calls `object.__setattr__` for every field; for the records of a booking that is an
    eighth of what the booking costs the client. What it takes and refuses stays as it is, and nothing else can change.
    """
    one_by_one: Any = cls.__init__
    scope: dict[str, Any] = {"_missing": MISSING}
    parameters, lines = ["self", "*"], ["into = self.__dict__"]
    for each in fields(cls):  # type: ignore[arg-type]  # it is a dataclass
        name = value = parameter = each.name
        if each.default is not MISSING:
            scope[f"_default_{name}"] = each.default
            parameter = f"{name}=_default_{name}"
        elif each.default_factory is not MISSING:
            scope[f"_make_{name}"] = each.default_factory
            parameter, value = f"{name}=_missing", f"_make_{name}() if {name} is _missing else {name}"
        parameters.append(parameter)
        lines.append(f"into[{name!r}] = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    text = f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines)
    exec(text, scope)  # noqa: S102 - as dataclasses do; the names are those of a class of ours
    cls.__init__ = wraps(one_by_one)(scope["__init__"])  # type: ignore[method-assign]
    return cls
