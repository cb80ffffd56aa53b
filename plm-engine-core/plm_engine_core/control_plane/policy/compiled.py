"""Conditions compiled to closures, once per snapshot; each answers with the leaves that decided it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
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
from plm_engine_core.control_plane.policy.fields import MISSING, lookup, shown
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
_Probe = Callable[[View], Holds]

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
            tests = tuple(_compile(child, f"{at}.conditions.{index}") for index, child in enumerate(node.conditions))
            return _all(tests) if isinstance(node, And) else _any(tests)
        case Not():
            return _negation(_compile(node.condition, f"{at}.condition"))
        case _:
            return _leaf(_probe(node), at, says(node))


def _all(tests: tuple[Test, ...]) -> Test:
    return _until(tests, settles=False)


def _any(tests: tuple[Test, ...]) -> Test:
    return _until(tests, settles=True)


def _until(tests: tuple[Test, ...], *, settles: bool) -> Test:
    """The first part that settles it answers; else the undecided ones do; else all of them together."""

    def test(view: View) -> Finding:
        agreed: list[LeafResult] = []
        undecided: list[LeafResult] = []
        for each in tests:
            found = each(view)
            if found.holds is settles:
                return found
            (undecided if found.holds is None else agreed).extend(found.leaves)
        return Finding(None, tuple(undecided)) if undecided else Finding(not settles, tuple(agreed))

    return test


def _negation(inner: Test) -> Test:
    def test(view: View) -> Finding:
        found = inner(view)
        return found if found.holds is None else Finding(not found.holds, found.leaves)

    return test


def _leaf(probe: _Probe, at: str, words: str) -> Test:
    results = {holds: Finding(holds, (LeafResult(at, words, holds),)) for holds in (True, False, None)}
    return lambda view: results[probe(view)]


def _probe(node: Condition) -> _Probe:  # one line a kind of leaf
    match node:
        case RiskLevelIs(level=level, operator=order):
            compare, rank = _ORDERS[order], level.rank
            return lambda view: compare(view.risk, rank)
        case WeightAtMost(max_weight=most):
            return _ordered(lookup("claims.weight"), operator.le, most)
        case ScoreAtLeast(min_score=least):
            return _ordered(lookup("claims.score"), operator.ge, least)
        case ActionIs(actions=actions, mode=mode):
            probe = _matches(lookup("capability.id"), any_of(actions, Match.GLOB))
            return probe if mode == "allow" else _opposite(probe)
        case AssetIs(patterns=patterns, match=kind):
            return _matches(lookup("resource"), any_of(patterns, kind))
        case EvaluatorSays(evaluator_name=name):
            return lambda view: view.evaluations.get(name)
        case TimeOfDay():
            return _time(node)
        case FieldIs():
            return _field(node)
        case _:
            raise TypeError(f"{type(node).__name__} is no leaf of a condition")


def _field(node: FieldIs) -> _Probe:
    find, value = lookup(node.path), node.value
    match node.operator:
        case "exists":
            return lambda view: find(view.fields) is not MISSING
        case "eq":
            return lambda view: same(find(view.fields), value)
        case "ne":
            return lambda view: not same(find(view.fields), value)
        case "in" | "not_in":
            wanted, among = node.operator == "in", value if isinstance(value, tuple) else ()
            return lambda view: _among(find(view.fields), among) is wanted
        case "contains":
            return lambda view: _contains(find(view.fields), value)
        case "glob" | "regex":
            return _matches(find, matcher(str(value), Match(node.operator)))
        case order:
            return _ordered(find, _ORDERS[order], value)


def _ordered(find: Callable[[Mapping[str, Any]], Any], compare: Callable[[Any, Any], bool], bound: Any) -> _Probe:
    exact = Decimal(str(bound))

    def probe(view: View) -> Holds:
        value = find(view.fields)
        kind = type(value)
        if kind is int:
            return compare(value, exact)
        number = _number(value)
        return None if number is None else compare(number, exact)

    return probe


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


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(same(value, each) for each in values)


def _contains(holder: Any, value: Any) -> Holds:
    if holder is MISSING:
        return False
    if isinstance(holder, list | tuple | set | frozenset):
        return any(same(each, value) for each in holder)
    return None


def _matches(find: Callable[[Mapping[str, Any]], Any], match: Matcher) -> _Probe:
    def probe(view: View) -> Holds:
        value = find(view.fields)
        if isinstance(value, str):
            return match(value)
        return False if value is MISSING else None

    return probe


def _opposite(probe: _Probe) -> _Probe:
    def opposite(view: View) -> Holds:
        holds = probe(view)
        return None if holds is None else not holds

    return opposite


def _time(node: TimeOfDay) -> _Probe:
    start, end = _minutes(node.start), _minutes(node.end)
    days = frozenset(_DAYS.index(day) for day in node.weekdays)

    def probe(view: View) -> Holds:
        if view.at is None:
            return None
        minute = view.at.hour * 60 + view.at.minute
        inside = start <= minute < end if start <= end else minute >= start or minute < end
        return inside and view.at.weekday() in days

    return probe


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
