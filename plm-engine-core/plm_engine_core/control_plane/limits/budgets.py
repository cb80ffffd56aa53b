"""What a call reserves, and from whose budgets."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID

from plm_shared.canonical_json import encodable
from plm_shared.ledger import uuid_text
from pydantic import BaseModel, ConfigDict, Field, model_validator

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits.subjects import Subjects
from plm_engine_core.control_plane.limits.windows import ZoneName
from plm_engine_core.control_plane.vocabulary import BudgetScope, Period

Unit = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]*$", max_length=40)]
"""What is counted: `EUR`, `calls`, `tokens`, or a unit that the policy registers."""

_NAMED = frozenset({BudgetScope.AGENT, BudgetScope.TEAM, BudgetScope.MODEL})
_NOTHING = Decimal(0)
_UTC = "UTC"
_MOST_RUNS = 1024  # whose reservations are remembered
_WIDTH = {scope: width for width, scope in enumerate(BudgetScope)}


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """One amount to set aside in one budget.

    A budget with a `limit` opens by itself when it is first drawn on, and anew in every period, in `time_zone` or
    else in UTC.
    """

    scope: BudgetScope
    scope_id: UUID
    unit: str
    amount: Decimal
    period: Period = Period.TOTAL
    subject: str | None = None
    limit: Decimal | None = None
    time_zone: str | None = None

    @classmethod
    def nothing_of(cls, key: BudgetKey, limit: Decimal, *, time_zone: str | None = None) -> Reserve:
        """An entry that names a budget and sets nothing aside in it."""
        return cls(
            scope=key.scope,
            scope_id=key.scope_id,
            unit=key.unit,
            amount=_NOTHING,
            period=key.period,
            subject=key.subject,
            limit=limit,
            time_zone=time_zone,
        )

    @cached_property
    def stored(self) -> Mapping[str, Any]:
        """The form in which it is booked, JSON values only and not to be changed: a run draws on the same often."""
        booked = {
            "scope_kind": str(self.scope),
            "scope_id": uuid_text(self.scope_id),
            "unit": str(self.unit),
            "amount": str(self.amount),
        }
        if self.limit is not None:
            booked |= {"period": str(self.period), "limit": str(self.limit)}
            if self.subject is not None:
                booked["subject"] = self.subject
            if self.time_zone is not None:
                booked["time_zone"] = self.time_zone
        return booked


@dataclass(frozen=True, kw_only=True)
class BudgetKey:
    """Names one budget. `subject` is the name of an agent, team or model; `scope_id` then follows from it."""

    scope: BudgetScope
    scope_id: UUID
    unit: str
    period: Period = Period.TOTAL
    subject: str | None = None

    @classmethod
    def of(cls, scope: BudgetScope, subject: str, unit: str, period: Period = Period.TOTAL) -> BudgetKey:
        """The key of what people name: an agent, team or model by its name, anything else by its id.

        Raises:
            InvalidRequest: `subject` is no id of a run, run group, user or tenant, or no name that can be stored.
        """
        if scope in _NAMED:
            name = _model_name(subject) if scope is BudgetScope.MODEL else subject
            if not encodable(name):
                raise InvalidRequest("the subject holds half a surrogate pair, which cannot be stored", field="subject")
            return cls(scope=scope, scope_id=id_of(name), unit=unit, period=period, subject=name)
        try:
            return cls(scope=scope, scope_id=UUID(subject), unit=unit, period=period)
        except ValueError:
            raise InvalidRequest(
                f"{subject!r:.80} is no id; a {scope.value} is named by its UUID", field="subject"
            ) from None

    @property
    def place(self) -> tuple[int, bool, str, UUID, str, str]:
        """Where it stands in a list: from narrow to wide, then by name, those without one last and by id."""
        return _WIDTH[self.scope], self.subject is None, self.subject or "", self.scope_id, self.unit, self.period

    def encode(self) -> str:
        """The text that a reader of a list keeps to go on after it."""
        content = [self.scope, str(self.scope_id), self.unit, self.period, self.subject]
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> BudgetKey:
        """Back from the text.

        Raises:
            InvalidRequest: no list has given this text.
        """
        try:
            scope, scope_id, unit, period, subject = json.loads(base64.urlsafe_b64decode(text.encode("ascii")))
            key = cls(
                scope=BudgetScope(scope), scope_id=UUID(scope_id), unit=unit, period=Period(period), subject=subject
            )
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            raise _not_ours() from error
        texts = (unit,) if subject is None else (unit, subject)
        if not all(type(each) is str and encodable(each) and "\0" not in each for each in texts):
            raise _not_ours()
        return key


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One budget as it stands; spent plus reserved never exceeds the limit, except by a measured overspend.

    `starts_at` and `ends_at` are when its window began and when it ends, `time_zone` is where it was counted from
    midnight to midnight when it was opened; None without a window. `pinned`: an operator set its limit.
    """

    scope: BudgetScope
    scope_id: UUID
    unit: str
    limit: Decimal
    spent: Decimal
    reserved: Decimal
    period: Period = Period.TOTAL
    subject: str | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    time_zone: str | None = None
    pinned: bool = False

    @property
    def key(self) -> BudgetKey:
        """Its name."""
        return BudgetKey(
            scope=self.scope, scope_id=self.scope_id, unit=self.unit, period=self.period, subject=self.subject
        )

    @property
    def width(self) -> tuple[int, str, str]:
        """Where it stands from narrow to wide: the order in which budgets are locked and shown."""
        return _WIDTH[self.scope], self.unit, self.period


class Limit(BaseModel):
    """A limit beside those of a run and its tenant.

    It is about each agent, run group, user, team or model by itself, or only about `subject`, whose own limit then
    takes the place of the general one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: BudgetScope
    subject: str | None = Field(default=None, min_length=1, max_length=200)
    per: Period = Period.TOTAL
    unit: Unit
    limit: Amount

    @model_validator(mode="after")
    def _is_about_something(self) -> Limit:
        if self.scope is BudgetScope.RUN or (self.scope is BudgetScope.TENANT and self.per is Period.TOTAL):
            raise ValueError(f"the limits of a {self.scope.value} stand under budgets.{self.scope.value}")
        if self.subject is not None:
            if self.scope is BudgetScope.TENANT:
                raise ValueError("a tenant limit has no subject; it is about the tenant whose run it is")
            _check_subject(self.scope, self.subject, "limit")
        return self

    @property
    def key(self) -> tuple[BudgetScope, str | None, Period, str]:
        """What makes two limits the same."""
        return self.scope, self.subject, self.per, self.unit


class SubjectZone(BaseModel):
    """The time zone of one subject, in which its windows begin at midnight.

    That of a tenant counts for all in it that have none of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: BudgetScope
    subject: str = Field(min_length=1, max_length=200)
    time_zone: ZoneName

    @model_validator(mode="after")
    def _has_windows(self) -> SubjectZone:
        if self.scope is BudgetScope.RUN:
            raise ValueError("a run has no windows, so it needs no time zone")
        _check_subject(self.scope, self.subject, "time zone")
        return self

    @property
    def key(self) -> tuple[BudgetScope, str]:
        """Whose it is, in the one spelling in which subjects are compared."""
        return self.scope, _normal(self.scope, self.subject)


def id_of(name: str) -> UUID:
    """The id under which the budgets of an agent, a team or a model are kept: 16 bytes of the name's SHA-256."""
    return UUID(bytes=sha256(name.encode()).digest()[:16])


class BudgetPlan:
    """Which budgets a call draws on, under one policy; made once for each."""

    def __init__(
        self,
        *,
        run: Iterable[str],
        tenant: Iterable[str],
        limits: Iterable[Limit],
        time_zone: str | None = None,
        time_zones: Iterable[SubjectZone] = (),
    ) -> None:
        self._run = sorted(run)
        self._tenant = sorted(tenant)
        self._limits: dict[tuple[BudgetScope, Period, str], dict[str | None, Decimal]] = {}
        for each in limits:
            about = self._limits.setdefault((each.scope, each.per, each.unit), {})
            about[None if each.subject is None else _normal(each.scope, each.subject)] = each.limit
        self._zone = time_zone or _UTC
        self._zones = {each.key: each.time_zone for each in time_zones}
        self._unlimited = lru_cache(maxsize=_MOST_RUNS)(self._draw)

    def of(
        self,
        amounts: Mapping[str, Decimal],
        *,
        tenant_id: UUID,
        run_id: UUID,
        subjects: Subjects | None = None,
        model: str | None = None,
    ) -> tuple[Reserve, ...]:
        """The reservations of one call, from narrow to wide and then by unit and period.

        That order is the order of locks: the widest row is hot, so it is taken last and held shortest. A unit that the
        call does not bound reserves nothing, and is checked and charged all the same.
        """
        reserves = self._unlimited(tuple(amounts.items()), run_id, tenant_id)
        if not self._limits:
            return reserves
        limited = self._limited(amounts, _whose(subjects or Subjects(), tenant_id, model))
        return tuple(sorted((*reserves, *limited), key=lambda each: (_WIDTH[each.scope], each.unit, each.period)))

    def place_of(self, key: BudgetKey) -> str:
        """The member of a policy that says whether calls draw on such a budget."""
        own = key.period is Period.TOTAL and key.scope in (BudgetScope.RUN, BudgetScope.TENANT)
        return f"budgets.{key.scope.value}" if own else "limits"

    def draws_on(self, key: BudgetKey) -> bool:
        """Whether a call that is about what `key` names draws on its budget."""
        if self.place_of(key) != "limits":
            return key.unit in (self._run if key.scope is BudgetScope.RUN else self._tenant)
        about = self._limits.get((key.scope, key.period, key.unit), {})
        return None in about or (key.subject or str(key.scope_id)) in about

    def zone_of(self, key: BudgetKey, tenant_id: UUID) -> str | None:
        """The time zone of a budget's windows, None for UTC or without windows."""
        if key.period is Period.TOTAL:
            return None
        return self._zone_of(key.scope, key.subject or str(key.scope_id), str(tenant_id))

    def _zone_of(self, scope: BudgetScope, subject: str, tenant: str) -> str | None:
        of_tenant = self._zones.get((BudgetScope.TENANT, tenant), self._zone)
        zone = self._zones.get((scope, subject), of_tenant)
        return None if zone == _UTC else zone

    def _draw(self, given: tuple[tuple[str, Decimal], ...], run_id: UUID, tenant_id: UUID) -> tuple[Reserve, ...]:
        """What is drawn on the run's own budget and on its tenant's; the same for each such call of the run."""
        amounts = dict(given)
        every = ((BudgetScope.RUN, run_id, self._run), (BudgetScope.TENANT, tenant_id, self._tenant))
        return tuple(
            Reserve(scope=scope, scope_id=scope_id, unit=unit, amount=amounts.get(unit, _NOTHING))
            for scope, scope_id, units in every
            for unit in units
        )

    def _limited(self, amounts: Mapping[str, Decimal], whose: Mapping[BudgetScope, str]) -> Iterator[Reserve]:
        for (scope, period, unit), by_subject in self._limits.items():
            subject = whose.get(scope)
            limit = by_subject.get(subject, by_subject.get(None)) if subject is not None else None
            if subject is None or limit is None:
                continue
            key = BudgetKey.of(scope, subject, unit, period)
            yield Reserve(
                scope=scope,
                scope_id=key.scope_id,
                unit=unit,
                amount=amounts.get(unit, _NOTHING),
                period=period,
                subject=key.subject,
                limit=limit,
                time_zone=None if period is Period.TOTAL else self._zone_of(scope, subject, whose[BudgetScope.TENANT]),
            )


def _check_subject(scope: BudgetScope, subject: str, what: str) -> None:
    if scope not in _NAMED:
        try:
            UUID(subject)
        except ValueError:
            raise ValueError(f"the subject of a {scope.value} {what} is its id, a UUID") from None


def _normal(scope: BudgetScope, subject: str) -> str:
    if scope in (BudgetScope.AGENT, BudgetScope.TEAM):
        return subject
    return _model_name(subject) if scope is BudgetScope.MODEL else str(UUID(subject))


def _not_ours() -> InvalidRequest:
    return InvalidRequest("this is not a cursor of the budgets; leave it out to begin anew", field="cursor")


def _model_name(written: str) -> str:
    return written.strip().casefold()


def _whose(subjects: Subjects, tenant_id: UUID, model: str | None) -> dict[BudgetScope, str]:
    names = {
        BudgetScope.RUN_GROUP: str(subjects.run_group_id) if subjects.run_group_id else None,
        BudgetScope.AGENT: subjects.agent_id,
        BudgetScope.USER: str(subjects.user_id) if subjects.user_id else None,
        BudgetScope.TEAM: subjects.team,
        BudgetScope.MODEL: model,
        BudgetScope.TENANT: str(tenant_id),
    }
    return {scope: name for scope, name in names.items() if name is not None}
