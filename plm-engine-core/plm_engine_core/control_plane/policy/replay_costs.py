"""What recorded attempts set aside and spent, and what they would have under another policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.amounts import plain
from plm_engine_core.control_plane.policy.decision import Verdict
from plm_engine_core.control_plane.vocabulary import BudgetUnit

_RESERVING = (Verdict.ALLOW.value, Verdict.ASK.value)
_Amounts = tuple[tuple[str, Decimal], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """How much of one unit is set aside, as it was decided and as it would be."""

    before: Decimal
    after: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """How much of one unit settled calls cost, and what of it would have been spent.

    `at_most` adds the bounds of calls that were never made, and that would be allowed, or could be approved.
    """

    before: Decimal
    after: Decimal
    at_most: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedCost:
    """Of one attempt: what was set aside, or would have been, and what its call cost; None where none was settled."""

    reserve: _Amounts
    spent: _Amounts | None


def recorded_cost(reserve: Mapping[str, str], spent: Mapping[str, str] | None) -> RecordedCost:
    """The stored amounts, read.

    Raises:
        ArithmeticError: one of them is no number; `AttributeError`, `TypeError`, `ValueError`: it is no amount at all.
    """
    return RecordedCost(reserve=_read(reserve), spent=_read(spent) if spent is not None else None)


def _read(amounts: Mapping[str, str]) -> _Amounts:
    return tuple((str(unit), Decimal(amount)) for unit, amount in amounts.items())


@dataclass(kw_only=True)
class Costs:
    """Sums over attempts, by unit. What a capability does not bound is in no sum of what is set aside.

    A call that was made costs what it did, as long as it would be allowed, asked for or left undecided; a person who is
    asked may say no. One that was not made, and that is decided as it was, costs nothing.
    """

    _reserved_before: Counter[_Amounts] = field(default_factory=Counter)
    _reserved_after: Counter[_Amounts] = field(default_factory=Counter)
    _bounds: Counter[_Amounts] = field(default_factory=Counter)
    _spent_before: dict[str, Decimal] = field(default_factory=dict)
    _spent_after: dict[str, Decimal] = field(default_factory=dict)

    def add(self, recorded: RecordedCost, *, before: str, after: str, bound: Mapping[str, Decimal]) -> None:
        """Count one attempt; `bound` is what its call would set aside, were it allowed."""
        reserves = after not in (Verdict.DENY.value, Verdict.STEER.value)
        if before in _RESERVING:
            self._reserved_before[recorded.reserve] += 1
        if reserves:
            self._reserved_after[tuple(bound.items())] += 1
        if recorded.spent is not None:
            _add(self._spent_before, recorded.spent)
            if reserves:
                _add(self._spent_after, recorded.spent)
        elif reserves and before != after:
            self._bounds[tuple(bound.items())] += 1

    @property
    def reserved(self) -> dict[str, Reserved]:
        """By unit, what is set aside by calls that are allowed, asked for or undecided: the most that they may cost."""
        before, after = _sums(self._reserved_before), _sums(self._reserved_after)
        return {unit: Reserved(before=_of(before, unit), after=_of(after, unit)) for unit in _units(before, after)}

    @property
    def spent(self) -> dict[str, Spent]:
        """By unit, what settled calls cost, as they were settled: corrections made later are not in it."""
        bounds = _sums(self._bounds)
        return {
            unit: Spent(
                before=_of(self._spent_before, unit),
                after=_of(self._spent_after, unit),
                at_most=_of(self._spent_after, unit) + _of(bounds, unit),
            )
            for unit in _units(self._spent_before, bounds)
        }

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values; amounts are texts."""
        return {
            "reserved": {
                unit: {"before": str(plain(each.before)), "after": str(plain(each.after))}
                for unit, each in self.reserved.items()
            },
            "spent": {
                unit: {
                    "before": str(plain(each.before)),
                    "after": str(plain(each.after)),
                    "at_most": str(plain(each.at_most)),
                }
                for unit, each in self.spent.items()
            },
        }


def _add(sums: dict[str, Decimal], amounts: _Amounts) -> None:
    for unit, amount in amounts:
        sums[unit] = sums.get(unit, Decimal(0)) + amount


def _sums(reserves: Counter[_Amounts]) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = {}
    for reserve, calls in reserves.items():
        _add(sums, tuple((str(unit), calls * amount) for unit, amount in reserve))
    return sums


def _of(sums: Mapping[str, Decimal], unit: str) -> Decimal:
    return sums.get(unit, Decimal(0))


def _units(*sums: Iterable[str]) -> list[str]:
    """The built-in ones, and then whatever else there is."""
    built_in = [each.value for each in BudgetUnit]
    return [*built_in, *sorted({unit for each in sums for unit in each} - set(built_in))]
