"""Halts."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.halts import Halt
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import storable_text
from plm_engine_core.control_plane.storage.rows import halt_row
from plm_engine_core.control_plane.vocabulary import EventKind, HaltScope, RunState


class MemoryHalts:
    """Halts in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def trigger(
        self, tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, *, reason: str, by: UUID, actor: str
    ) -> Halt:
        """Commit a halt, or answer the one that stands in this scope."""
        async with self._books.turn() as books:
            target = scope_id or tenant_id
            earlier = _same_scope(books, tenant_id, scope, target)
            standing = [row for row in earlier if row["lifted_at"] is None]
            if standing:
                return halt_row(standing[0])
            if scope is HaltScope.RUN:
                books.run(tenant_id, target)
            epoch = max((row["epoch"] for row in earlier), default=0) + 1
            row = {"id": new_id(), "epoch": epoch, "reason": storable_text(reason), "triggered_by": by}
            row |= {"triggered_at": books.now(), "lifted_by": None, "lifted_at": None}
            if scope is HaltScope.SYSTEM:
                books.halts_system.put(None, row["id"], row)
            else:
                row |= {"scope": scope.value, "scope_id": target, "subject": None}
                books.halts.put(tenant_id, row["id"], row)
            halt = halt_row(row)
            books.append(tenant_id, TENANT_STREAM, EventKind.HALT_TRIGGERED, actor, halt.to_json())
            return halt

    async def get(self, tenant_id: UUID, halt_id: UUID) -> Halt:
        """One halt of the tenant, or of the system."""
        async with self._books.turn() as books:
            row = books.halts.get(tenant_id, halt_id) or books.halts_system.get(None, halt_id)
            if row is None:
                raise NotFound("halt", halt_id)
            return halt_row(row)

    async def lift(self, tenant_id: UUID, halt: Halt, *, by: UUID, actor: str) -> Halt:
        """Lift a halt and queue this tenant's runs it parked; runs of other tenants follow by recovery."""
        async with self._books.turn() as books:
            system = halt.scope is HaltScope.SYSTEM
            table, group = (books.halts_system, None) if system else (books.halts, tenant_id)
            row = table.get(group, halt.id)
            if row is not None and row["lifted_at"] is None:
                lifted = halt_row(table.change(group, halt.id, lifted_by=by, lifted_at=books.now()))
                _resume(books, tenant_id, lifted, actor)
                books.append(tenant_id, TENANT_STREAM, EventKind.HALT_LIFTED, actor, lifted.to_json())
                return lifted
        return await self.get(tenant_id, halt.id)


def _same_scope(books: Books, tenant_id: UUID, scope: HaltScope, target: UUID) -> list[Row]:
    if scope is HaltScope.SYSTEM:
        return books.halts_system.rows(None)
    rows = books.halts.rows(tenant_id)
    return [row for row in rows if (row["scope"], row["scope_id"]) == (scope.value, target)]


def _resume(books: Books, tenant_id: UUID, halt: Halt, actor: str) -> None:
    for run in books.run_states.rows(tenant_id):
        run_id = run["run_id"]
        if run["state"] == "halted" and books.standing_halt(tenant_id, run_id) is None:
            books.queue_again(tenant_id, run_id, was=RunState.HALTED)
            books.deliver(tenant_id, run_id)
            payload = {"was": RunState.HALTED.value, "halt_id": str(halt.id)}
            books.append(tenant_id, run_stream(run_id), EventKind.RUN_RESUMED, actor, payload)
