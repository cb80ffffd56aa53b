"""What a component says about its licenses, as one SPDX expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from license_reviewer.families import Family, combine, family, parse
from license_reviewer.names import compliance, names_only_a_family, spdx_name


class ListMeaning(StrEnum):
    """How a list of licenses is read; CycloneDX leaves it open."""

    ALL = "all"  #: every license of the list holds
    ANY = "any"  #: one of them may be chosen


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The licenses of one component.

    ``expression`` and ``family`` are None when nothing is stated, or when something stated is ``unknown``.
    ``if_choice`` is the family if a list were a choice; ``imprecise`` holds names without a version.
    """

    expression: str | None = None
    family: Family | None = None
    if_choice: Family | None = None
    unknown: tuple[str, ...] = ()
    imprecise: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    marks_only: bool = False


@dataclass(frozen=True)
class _Name:
    text: str
    expression: str
    imprecise: bool


def read_licenses(texts: Sequence[str], meaning: ListMeaning) -> Reading:
    """Bring identifiers, expressions, names and classifiers into one expression."""
    statements = [text.strip() for text in texts if text.strip()]
    marks = {text: compliance(text) for text in statements}
    denied = tuple(text for text in statements if marks[text] is False)
    licenses = [text for text in statements if marks[text] is None]
    if not licenses:
        return Reading(denied=denied, marks_only=bool(statements))
    names = {text: _name(text) for text in licenses}
    unknown = tuple(sorted(text for text, name in names.items() if name is None))
    if unknown:
        return Reading(unknown=unknown, denied=denied)
    precise = _without_repetition([name for name in names.values() if name])
    expressions = sorted({name.expression for name in precise})
    choice = combine(expressions, "OR")
    stated = choice if meaning is ListMeaning.ANY else combine(expressions, "AND")
    return Reading(
        expression=stated.render(),
        family=family(stated),
        if_choice=family(choice),
        imprecise=tuple(name.text for name in precise if name.imprecise),
        denied=denied,
    )


def _name(text: str) -> _Name | None:
    expression = parse(text)
    if expression is not None:
        return _Name(text, expression.render(), imprecise=False)
    named = spdx_name(text)
    if named is None or parse(named) is None:
        return None
    return _Name(text, named, imprecise=names_only_a_family(text, named))


def _without_repetition(names: list[_Name]) -> list[_Name]:
    """Leave out "Apache Software License" where "Apache-2.0" stands beside it: tools list id and classifier."""
    stems = {name.expression.split("-")[0] for name in names if not name.imprecise}
    return [name for name in names if not (name.imprecise and _stem(name.expression) in stems)]


def _stem(expression: str) -> str:
    return expression.removeprefix("LicenseRef-").split("-")[0]
