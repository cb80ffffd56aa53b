"""Conditions compiled to closures, once per snapshot; each answers with the leaves that decided it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.matching import Match, Matcher, any_of, matcher
from plm_engine_core.control_plane.policy.conditions import (
    ActionIs,
    And,
    AssetIs,
    Condition,
    EvaluatorSays,
    FieldIs,
    Not,
    Or,
    RiskLevelIs,
    ScoreAtLeast,
    TimeOfDay,
    WeightAtMost,
    check_bounds,
)
from plm_engine_core.control_plane.policy.fields import MISSING, FieldPath, lookup, member, parts, shown
from plm_engine_core.control_plane.vocabulary import RiskLevel

Holds = bool | None
"""True, false, or None: undecided."""


@dataclass(frozen=True, slots=True)
class LeafResult:
    """One leaf as it was found: its place in the policy, its words, and whether it holds."""

    at: str
    says: str
    holds: Holds

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {"at": self.at, "says": self.says, "holds": self.holds}


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a condition holds, and the leaves that made it so."""

    holds: Holds
    leaves: tuple[LeafResult, ...]


@dataclass(slots=True)
class View:
    """What conditions look at: fields by root, the risk, and the answers of evaluators as far as they are known."""

    fields: Mapping[str, Any]
    risk: int = 0
    at: datetime | None = None
    evaluations: Mapping[str, Holds] = field(default_factory=dict)


Test = Callable[[View], Finding]
_Judge = Callable[[Any], Holds]

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "le": operator.le,
    "ge": operator.ge,
    "lt": operator.lt,
    "gt": operator.gt,
}
_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?")
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def compile_condition(tree: Condition, at: str) -> Test:
    """Compile a whole tree; `at` is its place in the policy, from which its leaves are named.

    Raises:
        ValueError: it is too deep or too large.
    """
    return _compile(check_bounds(tree), at)


def _compile(node: Condition, at: str) -> Test:
    match node:
        case And() | Or():
            return _until(tuple(_parts(node, at)), settles=isinstance(node, Or))
        case Not():
            return _negation(_compile(node.condition, f"{at}.condition"))
        case _:
            return _leaf(node, at)


def _parts(node: And | Or, at: str) -> Iterator[Test]:
    """The parts of a composite; those of a part of the same kind are its own."""
    for index, child in enumerate(node.conditions):
        place = f"{at}.conditions.{index}"
        if isinstance(child, And | Or) and type(child) is type(node):
            yield from _parts(child, place)
        else:
            yield _compile(child, place)


def _until(tests: tuple[Test, ...], *, settles: bool) -> Test:
    """The first part that settles it answers; else the undecided ones do; else all of them together."""

    def test(view: View) -> Finding:
        agreed: list[LeafResult] = []
        undecided: list[LeafResult] = []
        for each in tests:
            found = each(view)
            if found.holds is settles:
                return found
            if found.holds is None:
                undecided += found.leaves
            else:
                agreed += found.leaves
        return Finding(None, tuple(undecided)) if undecided else Finding(not settles, tuple(agreed))

    return test


def _negation(inner: Test) -> Test:
    def test(view: View) -> Finding:
        found = inner(view)
        return found if found.holds is None else Finding(not found.holds, found.leaves)

    return test


def _leaf(node: Condition, at: str) -> Test:
    words = says(node)
    results = {holds: Finding(holds, (LeafResult(at, words, holds),)) for holds in (True, False, None)}
    match node:
        case RiskLevelIs(level=level, operator=order):
            compare, rank = _ORDERS[order], level.rank
            return lambda view: results[compare(view.risk, rank)]
        case EvaluatorSays(evaluator_name=name):
            return lambda view: results[view.evaluations.get(name)]
        case TimeOfDay():
            within = _time(node)
            return lambda view: results[within(view.at)]
        case _:
            return _at(*_judged(node), results)


def _at(path: FieldPath, judge: _Judge, results: Mapping[Holds, Finding]) -> Test:
    """Find the field and judge it; most paths have two parts, and are found without a further call."""
    root, *rest = parts(path)
    if len(rest) != 1:
        find = lookup(path)
        return lambda view: results[judge(find(view.fields))]
    (name,) = rest

    def test(view: View) -> Finding:
        holder = view.fields.get(root)
        return results[judge(holder.get(name, MISSING) if type(holder) is dict else member(holder, name))]

    return test


def _judged(node: Condition) -> tuple[FieldPath, _Judge]:
    """Which field a leaf looks at, and how it judges what stands there."""
    match node:
        case WeightAtMost(max_weight=most):
            return "claims.weight", _ordered(operator.le, most)
        case ScoreAtLeast(min_score=least):
            return "claims.score", _ordered(operator.ge, least)
        case ActionIs(actions=actions, mode=mode):
            judge = _matches(any_of(actions, Match.GLOB))
            return "capability.id", judge if mode == "allow" else _opposite(judge)
        case AssetIs(patterns=patterns, match=kind):
            return "resource", _matches(any_of(patterns, kind))
        case FieldIs():
            return node.path, _compared(node)
        case _:
            raise TypeError(f"{type(node).__name__} is no leaf of a condition")


def _compared(node: FieldIs) -> _Judge:
    wanted = node.value
    match node.operator:
        case "exists":
            return lambda value: value is not MISSING
        case "eq":
            return (lambda value: value == wanted) if isinstance(wanted, str) else lambda value: same(value, wanted)
        case "ne":
            return lambda value: not same(value, wanted)
        case "in" | "not_in":
            inside, among = node.operator == "in", wanted if isinstance(wanted, tuple) else ()
            return lambda value: any(same(value, each) for each in among) is inside
        case "contains":
            return lambda value: _contains(value, wanted)
        case "glob" | "regex":
            return _matches(matcher(str(wanted), Match(node.operator)))
        case order:
            return _ordered(_ORDERS[order], wanted)


def _ordered(compare: Callable[[Any, Any], bool], bound: Any) -> _Judge:
    exact = Decimal(str(bound))

    def judge(value: Any) -> Holds:
        if type(value) is int:
            return compare(value, bound)
        number = _number(value) if value is not MISSING else None
        return None if number is None else compare(number, exact)

    return judge


def _number(value: Any) -> Decimal | None:
    """The number a value is, or a text plainly writes; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float | int):
        number = Decimal(str(value))
    elif isinstance(value, Decimal):
        number = value
    elif isinstance(value, str) and _DECIMAL.fullmatch(value):
        number = Decimal(value)
    else:
        return None
    return number if number.is_finite() else None


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, and a missing field equals nothing."""
    if one is MISSING or isinstance(one, bool) is not isinstance(other, bool):
        return False
    return bool(one == other)


def _contains(holder: Any, value: Any) -> Holds:
    if holder is MISSING:
        return False
    if isinstance(holder, list | tuple | set | frozenset):
        return any(same(each, value) for each in holder)
    return None


def _matches(match: Matcher) -> _Judge:
    def judge(value: Any) -> Holds:
        if isinstance(value, str):
            return match(value)
        return False if value is MISSING else None

    return judge


def _opposite(judge: _Judge) -> _Judge:
    def opposite(value: Any) -> Holds:
        holds = judge(value)
        return None if holds is None else not holds

    return opposite


def _time(node: TimeOfDay) -> Callable[[datetime | None], Holds]:
    start, end = _minutes(node.start), _minutes(node.end)
    days = frozenset(_DAYS.index(day) for day in node.weekdays)

    def within(at: datetime | None) -> Holds:
        if at is None:
            return None
        minute = at.hour * 60 + at.minute
        inside = start <= minute < end if start <= end else minute >= start or minute < end
        return inside and at.weekday() in days

    return within


def _minutes(clock: str) -> int:
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)


def says(leaf: Condition) -> str:
    """A leaf in words, for people who read why."""
    match leaf:
        case RiskLevelIs(level=RiskLevel() as level, operator=order):
            return f"risk {order} {level.value}"
        case WeightAtMost(max_weight=most):
            return f"claimed weight le {most:g}"
        case ScoreAtLeast(min_score=least):
            return f"claimed score ge {least:g}"
        case ActionIs(actions=actions, mode=mode):
            return f"capability {'is' if mode == 'allow' else 'is not'} {_listed(actions)}"
        case AssetIs(patterns=patterns, match=kind):
            return f"resource {kind.value} {_listed(patterns)}"
        case EvaluatorSays(evaluator_name=name):
            return f"evaluator {name} allows"
        case TimeOfDay(start=start, end=end, weekdays=days):
            return f"time from {start} to {end} UTC on {', '.join(days)}"
        case FieldIs(path=path, operator="exists"):
            return f"{shown(path)} exists"
        case FieldIs(path=path, operator=comparison, value=value):
            return f"{shown(path)} {comparison} {_listed(value) if isinstance(value, tuple) else repr(value)}"
        case _:
            raise TypeError(f"{type(leaf).__name__} is no leaf of a condition")


def _listed(values: tuple[Any, ...]) -> str:
    text = ", ".join(str(value) for value in values[:5])
    return text if len(values) <= 5 else f"{text} and {len(values) - 5} more"
