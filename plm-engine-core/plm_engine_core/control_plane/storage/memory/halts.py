"""Halts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.halts import Halt, HaltDrill
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import storable_text
from plm_engine_core.control_plane.storage.rows import halt_row
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, EventKind, HaltScope, RunState


class MemoryHalts:
    """Halts in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def trigger(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        reason: str,
        by: UUID,
        actor: str,
        cancel_seconds: float,
        registered: bool = False,
    ) -> Halt:
        """Commit a halt, or answer the one that stands in this scope."""
        target = tenant_id if scope is HaltScope.TENANT else scope_id
        async with self._books.turn() as books:
            earlier = _same_scope(books, tenant_id, scope, (target, subject))
            standing = [row for row in earlier if row["lifted_at"] is None]
            if standing:
                return _halt(books, tenant_id, standing[0])
            if not (registered or _known(books, tenant_id, scope, scope_id, subject)):
                raise NotFound(scope.value.replace("_", " "), subject or scope_id)
            row = {"id": new_id(), "epoch": max((row["epoch"] for row in earlier), default=0) + 1}
            row |= {"reason": storable_text(reason), "triggered_by": by, "triggered_at": books.now()}
            row |= {"lifted_by": None, "lifted_at": None, "cancel_seconds": cancel_seconds}
            if scope is HaltScope.SYSTEM:
                books.halts_system.put(None, row["id"], row)
            else:
                row |= {"scope": scope.value, "scope_id": target, "subject": subject}
                books.halts.put(tenant_id, row["id"], row)
            halt = _halt(books, tenant_id, row)
            books.append(tenant_id, TENANT_STREAM, EventKind.HALT_TRIGGERED, actor, halt.to_json())
            return halt

    async def met(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        registered: bool = False,
    ) -> HaltDrill:
        """What a halt of this scope would meet in the tenant now."""
        halt: Row = {"scope": scope.value, "scope_id": scope_id, "subject": subject}
        async with self._books.turn() as books:
            books.require_tenant(tenant_id)
            if not (registered or _known(books, tenant_id, scope, scope_id, subject)):
                raise NotFound(scope.value.replace("_", " "), subject or scope_id)
            states = (RunState(run["state"]) for run in books.run_states.rows(tenant_id) if _stops(books, halt, run))
            runs = Counter(state for state in states if state not in TERMINAL_RUN_STATES)
            calls = Counter(grant["state"] for grant in books.grants.rows(tenant_id) if _is_over(books, halt, grant))
        return HaltDrill(
            scope=scope,
            scope_id=scope_id,
            subject=subject,
            runs=dict(runs),
            grants=calls["issued"],
            calls=calls["begun"],
        )

    async def get(self, tenant_id: UUID, halt_id: UUID) -> Halt:
        """One halt of the tenant, or of the system."""
        async with self._books.turn() as books:
            row = books.halts.get(tenant_id, halt_id) or books.halts_system.get(None, halt_id)
            if row is None:
                raise NotFound("halt", halt_id)
            return _halt(books, tenant_id, row)

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, standing: bool
    ) -> Sequence[Halt]:
        """Newest first."""
        async with self._books.turn() as books:
            rows = [*books.halts.rows(tenant_id), *books.halts_system.rows(None)]
            found = sorted(rows, key=lambda row: (row["triggered_at"], row["id"]), reverse=True)
            shown = [
                row
                for row in found
                if (before is None or (row["triggered_at"], row["id"]) < before)
                and not (standing and row["lifted_at"] is not None)
            ]
            return [_halt(books, tenant_id, row) for row in shown[:limit]]

    async def lift(self, tenant_id: UUID, halt: Halt, *, by: UUID, actor: str) -> Halt:
        """Lift a halt and queue this tenant's runs it parked; runs of other tenants follow by recovery."""
        async with self._books.turn() as books:
            system = halt.scope is HaltScope.SYSTEM
            table, group = (books.halts_system, None) if system else (books.halts, tenant_id)
            row = table.get(group, halt.id)
            if row is not None and row["lifted_at"] is None:
                lifted = _halt(books, tenant_id, table.change(group, halt.id, lifted_by=by, lifted_at=books.now()))
                _resume(books, tenant_id, lifted, actor)
                books.append(tenant_id, TENANT_STREAM, EventKind.HALT_LIFTED, actor, lifted.to_json())
                return lifted
        return await self.get(tenant_id, halt.id)

    async def unfinished(self, limit: int) -> Sequence[UUID]:
        """Tenants, over all, in which a standing halt has not ended everything yet."""
        async with self._books.turn() as books:
            tenants = {run["tenant_id"] for run in books.run_states.everything() if run["state"] == "running"}
            return [each for each in sorted(tenants) if any(True for _ in _open_calls(books, each))][:limit]

    async def end_halted(self, tenant_id: UUID) -> int:
        """Revoke unused grants and note calls in flight under the standing halts; none fails in memory."""
        async with self._books.turn() as books:
            for halt, grant in list(_open_calls(books, tenant_id)):
                called = {"tenant_id": tenant_id, "halt_id": halt["id"], "grant_id": grant["id"]}
                books.halt_calls.put(
                    (tenant_id, halt["id"]), grant["id"], {**called, "began": grant["state"] == "begun"}
                )
                if grant["state"] == "issued":
                    books.grants.change(tenant_id, grant["id"], state="revoked")
            for scope in books.approval_scopes.rows(tenant_id):
                over = [halt for halt in _standing(books, tenant_id) if _ends(halt, scope)]
                if over and scope["revoked_at"] is None:
                    ended = {"revoked_at": books.now(), "revoked_by": over[0]["triggered_by"]}
                    books.approval_scopes.change(tenant_id, scope["id"], **ended)
            return 0


def _same_scope(books: Books, tenant_id: UUID, scope: HaltScope, named: tuple[UUID | None, str | None]) -> list[Row]:
    if scope is HaltScope.SYSTEM:
        return books.halts_system.rows(None)
    rows = books.halts.rows(tenant_id)
    return [row for row in rows if (row["scope"], row["scope_id"], row["subject"]) == (scope.value, *named)]


def _known(books: Books, tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, subject: str | None) -> bool:
    column, value = {
        HaltScope.RUN: ("run_id", scope_id),
        HaltScope.RUN_GROUP: ("run_group_id", scope_id),
        HaltScope.AGENT: ("agent_id", subject),
    }.get(scope, ("", None))
    return not column or any(run[column] == value for run in books.run_states.rows(tenant_id))


def _standing(books: Books, tenant_id: UUID) -> list[Row]:
    system = [{**row, "scope": "system", "subject": None} for row in books.halts_system.rows(None)]
    return [row for row in (*system, *books.halts.rows(tenant_id)) if row["lifted_at"] is None]


def _ends(halt: Row, scope: Row) -> bool:
    """Whether a halt ends an approval scope."""
    named = {"agent": scope["agent"], "capability": scope["capability"]}
    return halt["scope"] in ("system", "tenant") or (halt["scope"] in named and halt["subject"] == named[halt["scope"]])


def _open_calls(books: Books, tenant_id: UUID) -> Iterator[tuple[Row, Row]]:
    """Grants that were not used, and calls in flight that are not noted, each with a standing halt that is over it."""
    for halt in _standing(books, tenant_id):
        for grant in books.grants.rows(tenant_id):
            if grant["state"] not in ("issued", "begun") or not _is_over(books, halt, grant):
                continue
            noted = books.halt_calls.get((tenant_id, halt["id"]), grant["id"])
            if noted is None or grant["state"] == "issued":
                yield halt, grant


def _stops(books: Books, halt: Row, run: Row) -> bool:
    """Whether a halt is over a run as it stands now."""
    named = {"agent": run["agent_id"], "run_group": run["run_group_id"], "run": run["run_id"]}
    named["capability"] = books.wanted(run["tenant_id"], run["run_id"])
    return halt["scope"] in ("system", "tenant") or named[halt["scope"]] == (halt["subject"] or halt["scope_id"])


def _is_over(books: Books, halt: Row, grant: Row) -> bool:
    run = books.run_states.get(grant["tenant_id"], grant["run_id"])
    step = books.run_steps.get((grant["tenant_id"], grant["run_id"]), (grant["step_index"], grant["attempt"]))
    if run is None or step is None or run["state"] != "running":
        return False
    named = {"agent": run["agent_id"], "run_group": run["run_group_id"], "run": run["run_id"]}
    named["capability"] = step["capability"]
    return halt["scope"] in ("system", "tenant") or named[halt["scope"]] == (halt["subject"] or halt["scope_id"])


def _halt(books: Books, tenant_id: UUID, row: Row) -> Halt:
    """A halt with its calls in the tenant."""
    calls = books.halt_calls.rows((tenant_id, row["id"]))
    grants = [books.grants.get(tenant_id, call["grant_id"]) for call in calls if call["began"]]
    ended = [grant["settled_at"] for grant in grants if grant is not None and grant["settled_at"] is not None]
    counted = {"revoked": len(calls) - len(grants), "in_flight": len(grants), "open": len(grants) - len(ended)}
    named = {"scope": "system", "scope_id": None, "subject": None}
    return halt_row({**named, **row, **counted, "last_ended_at": max(ended, default=None)})


def _resume(books: Books, tenant_id: UUID, halt: Halt, actor: str) -> None:
    for run in books.run_states.rows(tenant_id):
        run_id = run["run_id"]
        if run["state"] == "halted" and books.run_halt(tenant_id, run_id) is None:
            books.queue_again(tenant_id, run_id, was=RunState.HALTED)
            books.deliver(tenant_id, run_id)
            payload = {"was": RunState.HALTED.value, "halt_id": str(halt.id)}
            books.append(tenant_id, run_stream(run_id), EventKind.RUN_RESUMED, actor, payload)
