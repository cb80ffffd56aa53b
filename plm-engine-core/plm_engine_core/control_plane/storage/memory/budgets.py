"""Budgets, as `storage/sql` books them: windows that open by themselves, reserving all or nothing, charging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.limits.windows import ALWAYS, end_of, runs_at, window_of
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import (
    amount_text,
    booked,
    booked_sum,
    json_time,
    without_nulls,
)


def window_in_use(books: Books, tenant_id: UUID, budget: tuple[Any, ...]) -> datetime | None:
    """When the window of a budget that runs began, in whichever zone it was opened; None where none runs."""
    if budget[-1] == "total":
        return ALWAYS
    now = books.now()
    starts = [starts_at for starts_at, _ in books.windows.items((tenant_id, *budget))]
    rows = [books.budgets.get(tenant_id, (*budget, each)) for each in starts]
    running = [row["starts_at"] for row in rows if row is not None and runs(row, now)]
    return max(running, default=None)


def runs(row: Row, at: datetime) -> bool:
    """Whether the window of a row has begun and not ended."""
    return runs_at(at, row["period"], row["starts_at"], row["ends_at"])


def open_window(books: Books, tenant_id: UUID, entry: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The budget that an entry falls in, opened where no window of it runs; None where no such zone is known.

    While a window runs nothing else is opened, whatever the zone is now: so no change of zone gives a budget anew.
    """
    budget, zone = _name(entry), entry.get("time_zone")
    starts_at, ends_at = window_in_use(books, tenant_id, budget), None
    opened = starts_at is None
    if starts_at is None:
        try:
            starts_at, ends_at = window_of(budget[-1], zone or "UTC", books.now())
        except ValueError:
            return None
    name = (*budget, starts_at)
    open_budget(books, tenant_id, name, Decimal(entry["limit"]), entry.get("subject"))
    if opened:
        books.windows.put((tenant_id, *budget), starts_at, {})
        # A window of another zone that began at the same moment, and has ended, goes on as this one.
        books.budgets.change(tenant_id, name, time_zone=zone, ends_at=ends_at if zone else None)
    return name


def open_budget(books: Books, tenant_id: UUID, name: tuple[Any, ...], limit: Decimal, subject: str | None) -> None:
    """Open a budget, with the limit an operator set for an earlier window, else for a later one.

    One that is there is given its limit anew, unless that is the same or an operator's.
    """
    known = books.budgets.get(tenant_id, name)
    if known is not None and (known["pinned"] or known["limit_amount"] == booked(limit)):
        return
    scope, scope_id, unit, period, starts_at = name
    same = [row for row in books.budgets.rows(tenant_id) if row["pinned"] and row["name"][:4] == name[:4]]
    pinned = max(same, key=lambda row: (row["starts_at"] < starts_at, row["starts_at"]), default=None)
    row: dict[str, Any] = {"name": name, "scope_kind": scope, "scope_id": scope_id, "unit": unit, "period": period}
    row |= {"starts_at": starts_at, "subject": subject, "pinned": pinned is not None}
    row |= {"limit_amount": pinned["limit_amount"] if pinned else booked(limit)}
    blank = {"spent": Decimal(0), "reserved": Decimal(0), "ends_at": None, "time_zone": None}
    books.budgets.put(tenant_id, name, {**blank, **(known or {}), **row})


def reserve(books: Books, tenant_id: UUID, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Set every amount aside, or none: the entries with their windows as `reserved`, or a refusal."""
    wanted: dict[tuple[Any, ...], Decimal] = {}
    done = []
    for entry in entries:
        name = _drawn_on(books, tenant_id, entry)
        if name is None:
            return _unknown_zone(entry)
        budget, amount = books.budgets.get(tenant_id, name), Decimal(entry["amount"])
        before = budget["reserved"] if budget is not None else Decimal(0)
        reserved = wanted.get(name, before) + amount
        if budget is None or budget["spent"] + reserved > budget["limit_amount"]:
            return _unaffordable(entry, budget)
        wanted[name] = booked(reserved)
        done.append({**entry, "starts_at": json_time(name[-1])})
    for name, reserved in wanted.items():
        books.budgets.change(tenant_id, name, reserved=reserved)
    return {"reserved": done}


def _name(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a budget is named by, but for its window."""
    return entry["scope_kind"], UUID(entry["scope_id"]), entry["unit"], entry.get("period") or "total"


def _drawn_on(books: Books, tenant_id: UUID, entry: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The budget that an entry draws on; that of one in UTC is found by its start, the rest is looked for."""
    budget = _name(entry)
    if entry.get("limit") is None:
        return (*budget, ALWAYS)
    if "time_zone" not in entry and budget[-1] != "total":
        name = (*budget, window_of(budget[-1], "UTC", books.now())[0])
        known = books.budgets.get(tenant_id, name)
        if known is not None and known["ends_at"] is None:
            open_budget(books, tenant_id, name, Decimal(entry["limit"]), entry.get("subject"))
            return name
    return open_window(books, tenant_id, entry)


def _unknown_zone(entry: Mapping[str, Any]) -> dict[str, Any]:
    """How a budget refuses whose window cannot be told."""
    scope, period, unit, zone = (entry[name] for name in ("scope_kind", "period", "unit", "time_zone"))
    named = {"scope": scope, "scope_id": entry["scope_id"], "subject": entry.get("subject"), "unit": unit}
    return {
        "outcome": "deny",
        "reason": "budget_missing",
        "limit": without_nulls({**named, "period": period, "time_zone": zone}),
        "rule": f"limits.{scope}.{period}.{unit}",
        "message": f"the {scope}'s {period} budget in {unit} cannot be opened: the storage knows no time zone {zone}",
        "unblock": f"time zone data that know {zone} where the storage runs, or another time zone in the policy",
    }


def _unaffordable(entry: Mapping[str, Any], budget: Row | None) -> dict[str, Any]:
    """How a budget refuses: with its own figures, or by not being there."""
    scope, unit, period = entry["scope_kind"], entry["unit"], entry.get("period") or "total"
    name = scope if period == "total" else f"{scope}'s {period}"
    limit = {"scope": scope, "scope_id": entry["scope_id"], "subject": entry.get("subject"), "unit": unit}
    limit = without_nulls({**limit, "period": period})
    book = "budgets" if entry.get("limit") is None else "limits"
    rule = ".".join([book, scope, *([entry["period"]] if entry.get("period") else []), unit])
    refusal = {"outcome": "deny", "limit": limit, "rule": rule}
    if budget is None:
        return refusal | {
            "reason": "budget_missing",
            "message": f"no {name} budget in {unit} is set for this {scope}",
            "unblock": f"a {name} budget in {unit}",
        }
    limit |= {column: amount_text(budget[column]) for column in ("spent", "reserved")}
    limit |= {"limit": amount_text(budget["limit_amount"]), "needed": amount_text(Decimal(entry["amount"]))}
    unblock = f"a higher {name} budget in {unit}"
    ends_at = end_of(period, budget["starts_at"], budget["ends_at"])
    if ends_at is not None:
        limit |= without_nulls({"time_zone": budget["time_zone"], "ends_at": json_time(ends_at)})
        unblock += f", or waiting until {limit['ends_at']}"
    return refusal | {
        "reason": "budget_exceeded",
        "message": f"the {name} budget is too small: limit {limit['limit']} {unit}, spent {limit['spent']}, "
        f"reserved {limit['reserved']}, needed {limit['needed']}",
        "unblock": unblock,
    }


def hold_reservations(books: Books, tenant_id: UUID, grant_id: UUID, reserved: Sequence[Mapping[str, Any]]) -> None:
    """Write down what a grant has set aside."""
    for entry in reserved:
        period, starts_at = entry.get("period") or "total", datetime.fromisoformat(entry["starts_at"])
        name = (entry["scope_kind"], UUID(entry["scope_id"]), entry["unit"], period, starts_at)
        row = {"name": name, "unit": entry["unit"], "amount": booked(Decimal(entry["amount"])), "settled": None}
        books.reservations.put((tenant_id, grant_id), name, row)


def charge(books: Books, tenant_id: UUID, grant_id: UUID, charges: Mapping[str, str]) -> bool:
    """Turn reservations into spend, the whole of them where no amount was measured; whether more was spent."""
    group, overrun = (tenant_id, grant_id), False
    for row in books.reservations.rows(group):
        name, amount = row["name"], row["amount"]
        actual = Decimal(charges[row["unit"]]) if row["unit"] in charges else amount
        overrun = overrun or actual > amount
        budget = books.budgets.get(tenant_id, name)
        if budget is not None:
            left, spent = booked(budget["reserved"] - amount), booked_sum(budget["spent"] + actual)
            books.budgets.change(tenant_id, name, reserved=left, spent=spent)
        books.reservations.change(group, name, settled=booked(actual))
    return overrun


def spent(books: Books, tenant_id: UUID, grant_id: UUID) -> dict[str, str]:
    """What a settled grant cost, per unit; every budget of a unit was charged alike."""
    return {row["unit"]: amount_text(row["settled"]) for row in books.reservations.rows((tenant_id, grant_id))}
