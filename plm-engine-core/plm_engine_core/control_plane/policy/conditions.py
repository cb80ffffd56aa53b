"""Conditions: trees of named nodes that a policy is written in, as typed values that survive a JSON round trip.

A condition is true, false, or *undecided*: a field is missing or of a kind that cannot be compared, or an evaluator
gave no answer. `not` keeps undecided; `and` and `or` are undecided when their other parts do not settle them (Kleene's
logic). What an undecided condition means is for whoever asks: it always counts against the agent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from plm_engine_core.control_plane.documents import Number
from plm_engine_core.control_plane.matching import Match, matcher
from plm_engine_core.control_plane.policy.fields import FieldPath, check_path
from plm_engine_core.control_plane.vocabulary import RiskLevel

DEEPEST = 16
MOST_NODES = 1000

Order = Literal["eq", "le", "ge", "lt", "gt"]
Comparison = Literal["eq", "ne", "le", "ge", "lt", "gt", "in", "not_in", "contains", "glob", "regex", "exists"]
Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Clock = Annotated[str, Field(pattern=r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$")]


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RiskLevelIs(_Node):
    """The risk of the proposal, compared: `{type: risk_level, level: medium, operator: le}`."""

    type: Literal["risk_level"] = "risk_level"
    level: RiskLevel
    operator: Order = "le"


class WeightAtMost(_Node):
    """The weight that the agent claims is at most `max_weight`; undecided when it claims none."""

    type: Literal["weight"] = "weight"
    max_weight: Number = Field(allow_inf_nan=False)


class ScoreAtLeast(_Node):
    """The score that the agent claims is at least `min_score`; undecided when it claims none."""

    type: Literal["score"] = "score"
    min_score: Number = Field(allow_inf_nan=False)


class ActionIs(_Node):
    """The capability is one of `actions` (globs), or with `mode: deny` none of them."""

    type: Literal["action"] = "action"
    actions: Names
    mode: Literal["allow", "deny"] = "allow"


class AssetIs(_Node):
    """The resource matches one of `patterns`, which `match` says how to read."""

    type: Literal["asset"] = "asset"
    patterns: Names
    match: Match

    @model_validator(mode="after")
    def _readable(self) -> AssetIs:
        for pattern in self.patterns:
            matcher(pattern, self.match)
        return self


class EvaluatorSays(_Node):
    """The evaluator of this name, declared by the policy, allows the proposal."""

    type: Literal["evaluator"] = "evaluator"
    evaluator_name: str = Field(min_length=1)


class FieldIs(_Node):
    """A field of the proposal or of its facts, found by path and compared with `value`."""

    type: Literal["field"] = "field"
    path: Annotated[FieldPath, Field(description="`arguments.amount`, or a list where a name holds a dot")]
    operator: Comparison
    value: Scalar | tuple[Scalar, ...] = None

    _path_known = field_validator("path")(check_path)

    @field_validator("value", mode="before")
    @classmethod
    def _comparable_at_all(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if not all(each is None or isinstance(each, bool | int | float | str) for each in values):
            raise ValueError("must be a text, a number, true, false or null, or a list of those")
        return value

    @model_validator(mode="after")
    def _comparable(self) -> FieldIs:
        problem = _problem(self.operator, self.value, given="value" in self.model_fields_set)
        if problem:
            raise ValueError(f"operator {self.operator} {problem}")
        if self.operator in ("glob", "regex"):
            matcher(str(self.value), Match(self.operator))
        return self


class TimeOfDay(_Node):
    """The proposal was prepared in this part of the day, on one of these days, in UTC.

    From `start` on and before `end`; a `start` after `end` passes midnight.
    """

    type: Literal["time_of_day"] = "time_of_day"
    start: Clock = "00:00"
    end: Clock = "24:00"
    weekdays: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class And(_Node):
    """All of `conditions` hold."""

    type: Literal["and"] = "and"
    conditions: Annotated[tuple[Condition, ...], Field(min_length=1)]


class Or(_Node):
    """One of `conditions` holds."""

    type: Literal["or"] = "or"
    conditions: Annotated[tuple[Condition, ...], Field(min_length=1)]


class Not(_Node):
    """`condition` does not hold."""

    type: Literal["not"] = "not"
    condition: Condition


Condition = Annotated[
    RiskLevelIs
    | WeightAtMost
    | ScoreAtLeast
    | ActionIs
    | AssetIs
    | EvaluatorSays
    | FieldIs
    | TimeOfDay
    | And
    | Or
    | Not,
    Field(discriminator="type"),
]


def _problem(operator: Comparison, value: object, *, given: bool) -> str:
    """What is wrong with the value for this operator, or nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match operator:
        case "exists":
            return "" if value is None else "takes no value"
        case "in" | "not_in":
            return "" if isinstance(value, tuple) and value else "needs a list of values"
        case "glob" | "regex":
            return "" if isinstance(value, str) else "needs a text"
        case "le" | "ge" | "lt" | "gt":
            return "" if number else "needs a number"
        case _:
            return "needs a value" if not given or isinstance(value, tuple) else ""


def check_bounds(tree: Any) -> Any:
    """Refuse a tree that is too deep or too large, before anything recursive touches it.

    Takes a document as it was read, or nodes, and gives it back unchanged.

    Raises:
        ValueError: it is deeper than 16 or has more than 1 000 nodes.
    """
    count = 0
    open_nodes = [(tree, 1)]
    while open_nodes:
        node, depth = open_nodes.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"the condition is more than {DEEPEST} deep; flatten it, or split it over several rules")
        if count > MOST_NODES:
            raise ValueError(f"the condition has more than {MOST_NODES} nodes; split it over several rules")
        open_nodes.extend((child, depth + 1) for child in _children(node))
    return tree


def _children(node: Any) -> list[Any]:
    members: Mapping[str, Any] = node if isinstance(node, Mapping) else getattr(node, "__dict__", {})
    several = members.get("conditions")
    one = [members["condition"]] if "condition" in members else []
    return one + (list(several) if isinstance(several, list | tuple) else [])


def leaves(tree: Condition) -> Iterator[Condition]:
    """Every leaf of a tree, from left to right."""
    match tree:
        case And() | Or():
            for child in tree.conditions:
                yield from leaves(child)
        case Not():
            yield from leaves(tree.condition)
        case _:
            yield tree


ConditionTree = Annotated[Condition, BeforeValidator(check_bounds)]
"""A whole tree: what a policy's members are declared as."""

for _model in (And, Or, Not):
    _model.model_rebuild()
