"""Locks of resources, as `resource_locks_v1.sql` has them: the same questions, the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.limits.locks import ResourceLock
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.rows import resource_lock_row
from plm_engine_core.control_plane.vocabulary import LockHolder, LockScope

_EXPIRED = "expired"
_LONGEST_NAME = 200


class MemoryResourceLocks:
    """Locks of resources in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLock]:
        """The locks that are held now, the longest held first."""
        async with self._books.turn() as books:
            rows = sorted(books.resource_locks.rows(tenant_id), key=lambda row: (row["taken_at"], row["grant_id"]))
            held = ({**row, "held": _holder(books, row)} for row in rows)
            return [resource_lock_row(row) for row in islice((row for row in held if _holds(row["held"])), limit)]

    async def sweep(self, tenant_id: UUID, *, limit: int) -> int:
        """Remove records of locks whose call is over."""
        async with self._books.turn() as books:
            locks = books.resource_locks.items(tenant_id)
            over = [name for name, row in locks if _holder(books, row) is None][:limit]
            for name in over:
                books.resource_locks.remove(tenant_id, name)
            return len(over)


def take_lock(books: Books, c: Mapping[str, Any]) -> dict[str, Any]:
    """Take the lock that a command names, for its grant, or answer how that is refused."""
    tenant_id, run_id, scope = UUID(c["tenant_id"]), UUID(c["run_id"]), LockScope(c["lock"])
    name = (scope.value, {LockScope.RUN: run_id, LockScope.TENANT: tenant_id}[scope], c["resource"])
    row = books.resource_locks.get(tenant_id, name)
    held = _holder(books, row) if row is not None else None
    if row is not None and _holds(held):
        return _locked(c, row, held)
    taken: dict[str, Any] = {"tenant_id": tenant_id, "scope": name[0], "scope_id": name[1], "resource": name[2]}
    taken |= {"run_id": run_id, "step_index": c["step_index"], "attempt": c["attempt"]}
    books.resource_locks.put(tenant_id, name, {**taken, "grant_id": UUID(c["grant"]["id"]), "taken_at": books.now()})
    return {}


def _holder(books: Books, row: Row) -> str | None:
    """How the holder of a lock stands: one of `LockHolder`, or expired; None for a call that is over or never was."""
    grant = books.grants.get(row["tenant_id"], row["grant_id"])
    if grant is None:
        return None
    if grant["state"] == "issued" and grant["expires_at"] <= books.now():
        return _EXPIRED
    if grant["state"] in ("issued", "begun"):
        return str(grant["state"])
    if grant["state"] == "settled" and grant["outcome"] == "outcome_unknown":
        step = books.run_steps.get((row["tenant_id"], row["run_id"]), (row["step_index"], row["attempt"]))
        return LockHolder.UNKNOWN.value if step is not None and step["state"] == "outcome_unknown" else None
    return None


def _holds(held: str | None) -> bool:
    return held is not None and held != _EXPIRED


def _locked(c: Mapping[str, Any], row: Row, held: str | None) -> dict[str, Any]:
    """How a lock refuses: it says which call holds it, and nothing else of that."""
    run_id = str(row["run_id"])
    unknown = f"finding out whether that call took place, then plm-cli run reconcile {run_id}"
    return {
        "outcome": "deny",
        "reason": "resource_locked",
        "rule": "lock",
        "retry_after_ms": 1000,
        "lock": {
            "scope": row["scope"],
            "resource": c["resource"],
            "run_id": run_id,
            "step": row["step_index"],
            "held": held,
        },
        "message": f"{c['resource'][:_LONGEST_NAME]} is locked by step {row['step_index']} of run {run_id}",
        "unblock": unknown if held == LockHolder.UNKNOWN else "the end of that call",
    }
