"""Budgets in memory, as an operator sees and changes them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey, Reserve
from plm_engine_core.control_plane.storage.memory.books import Books
from plm_engine_core.control_plane.storage.memory.budgets import open_window, runs, window_in_use
from plm_engine_core.control_plane.storage.memory.values import booked, booked_sum
from plm_engine_core.control_plane.storage.ports import Correction
from plm_engine_core.control_plane.storage.rows import budget_row, budget_told, unknown_zone
from plm_engine_core.control_plane.vocabulary import BudgetScope, EventKind

_CORRECT = "budgets.correct"


class MemoryBudgets:
    """Budgets in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def list(
        self,
        tenant_id: UUID,
        *,
        limit: int,
        after: BudgetKey | None = None,
        scope: BudgetScope | None = None,
        scope_id: UUID | None = None,
    ) -> Sequence[Budget]:
        """Total budgets and present windows in the order of their places, at most `limit`, strictly behind `after`."""
        async with self._books.turn() as books:
            found = [
                budget_row(row)
                for row in books.budgets.rows(tenant_id)
                if runs(row, books.now())
                and (scope is None or row["scope_kind"] == scope.value)
                and (scope_id is None or row["scope_id"] == scope_id)
            ]
            behind = [each for each in found if after is None or each.key.place > after.place]
            return sorted(behind, key=lambda each: each.key.place)[:limit]

    async def set_limit(
        self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, time_zone: str | None = None, actor: str
    ) -> Budget:
        """Set and pin the limit of the present window, opening it where it is not there, in UTC or in `time_zone`."""
        async with self._books.turn() as books:
            books.require_tenant(tenant_id)
            name = open_window(books, tenant_id, Reserve.nothing_of(key, limit, time_zone=time_zone).stored)
            if name is None:
                raise unknown_zone(time_zone)
            row = books.budgets.change(tenant_id, name, limit_amount=booked(limit), pinned=True)
            told = {**budget_told(row), "limit": str(limit)}
            books.append(tenant_id, TENANT_STREAM, EventKind.BUDGET_SET, actor, told)
            return budget_row(row)

    async def correct(self, tenant_id: UUID, correction: Correction, *, actor: str) -> Budget:
        """Book a counter-entry once, unless it would leave less than nothing spent."""
        async with self._books.turn() as books:
            books.require_tenant(tenant_id)
            key, name = correction.key, _present(books, tenant_id, correction.key)
            before = _claim(books, tenant_id, correction, name)
            row = books.budgets.get(tenant_id, before or name)
            if row is None:
                raise NotFound("budget", f"{key.scope.value}/{key.scope_id}/{key.unit}")
            if before is not None:
                return budget_row(row)
            if row["spent"] + correction.amount < 0:
                raise InvalidRequest(
                    f"only {row['spent'].normalize():f} {key.unit} were spent; no more can be given back",
                    field="amount",
                )
            row = books.budgets.change(tenant_id, name, spent=booked_sum(row["spent"] + correction.amount))
            told = {**budget_told(row), "amount": str(correction.amount), "reason": correction.reason}
            books.append(tenant_id, TENANT_STREAM, EventKind.BUDGET_CORRECTED, actor, told)
            return budget_row(row)


def _claim(books: Books, tenant_id: UUID, correction: Correction, budget: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Take the command id for this budget; when the same correction took it before, for which one that did."""
    name = (_CORRECT, correction.command_id)
    record = books.idempotency_records.get(tenant_id, name)
    if record is None:
        books.idempotency_records.put(tenant_id, name, {"digest": correction.digest, "result": budget})
        return None
    if record["digest"] != correction.digest:
        raise IdempotencyConflict(f"command {correction.command_id} was already used for another correction")
    booked_on: tuple[Any, ...] = record["result"]
    return booked_on


def _present(books: Books, tenant_id: UUID, key: BudgetKey) -> tuple[Any, ...]:
    """The budget of the window that runs; where none does one that is not there."""
    budget = (key.scope.value, key.scope_id, key.unit, key.period.value)
    return (*budget, window_in_use(books, tenant_id, budget))
