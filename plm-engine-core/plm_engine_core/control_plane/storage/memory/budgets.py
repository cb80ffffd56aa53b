"""Budgets, as `storage/sql` books them: windows that open by themselves, reserving all or nothing, charging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import (
    amount_text,
    booked,
    booked_sum,
    json_time,
    without_nulls,
)

ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
"""When the window of a budget without a period began."""


def window_start(period: str, now: datetime) -> datetime:
    """When the window that now lies in began, in UTC; weeks begin on Monday."""
    if period == "total":
        return ALWAYS
    day = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if period == "month" else day


def _window_end(period: str, starts_at: datetime) -> datetime:
    if period == "month":
        return (starts_at + timedelta(days=31)).replace(day=1)
    return starts_at + timedelta(days=7 if period == "week" else 1)


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
    books.budgets.put(tenant_id, name, {"spent": Decimal(0), "reserved": Decimal(0), **(known or {}), **row})


def reserve(books: Books, tenant_id: UUID, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Set every amount aside, or none: the entries with their windows as `reserved`, or a refusal."""
    wanted: dict[tuple[Any, ...], Decimal] = {}
    done = []
    for entry in entries:
        period = entry.get("period") or "total"
        starts_at = window_start(period, books.now())
        name = (entry["scope_kind"], UUID(entry["scope_id"]), entry["unit"], period, starts_at)
        if entry.get("limit") is not None:
            open_budget(books, tenant_id, name, Decimal(entry["limit"]), entry.get("subject"))
        budget, amount = books.budgets.get(tenant_id, name), Decimal(entry["amount"])
        before = budget["reserved"] if budget is not None else Decimal(0)
        reserved = wanted.get(name, before) + amount
        if budget is None or budget["spent"] + reserved > budget["limit_amount"]:
            return _unaffordable(entry, budget, period, starts_at)
        wanted[name] = booked(reserved)
        done.append({**entry, "starts_at": json_time(starts_at)})
    for name, reserved in wanted.items():
        books.budgets.change(tenant_id, name, reserved=reserved)
    return {"reserved": done}


def _unaffordable(entry: Mapping[str, Any], budget: Row | None, period: str, starts_at: datetime) -> dict[str, Any]:
    """How a budget refuses: with its own figures, or by not being there."""
    scope, unit = entry["scope_kind"], entry["unit"]
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
    if period != "total":
        limit["ends_at"] = json_time(_window_end(period, starts_at))
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
