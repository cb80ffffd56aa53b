"""An emitter without a database that keeps every promise of the one with a database."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection
from datetime import date
from typing import Any, Final

from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import (
    IdempotencyConflict,
    LedgerArgs,
    UnknownRun,
    UnknownTenant,
    ledger_record,
    utc_today,
    uuid_text,
)

__all__ = ["InMemoryKernelEmitter"]

_IDENTITY: Final = {
    "telemetry_events": ("trace_id", "span_id", "event_type"),
    "llm_calls": ("span_id",),
    "connector_calls": ("span_id",),
}


class InMemoryKernelEmitter:
    """A ``KernelEmitter`` that keeps rows in a list, for any number of threads.

    ``tenants`` and ``runs`` are the ids that exist; by default every one does. ``rows`` are the columns as the ledger
    would hold them, each with the name of its ``table``, in the order written.
    """

    def __init__(
        self,
        tenant_id: str | uuid.UUID,
        *,
        tenants: Collection[str | uuid.UUID] | None = None,
        runs: Collection[str | uuid.UUID] | None = None,
        clock: Callable[[], date] = utc_today,
    ) -> None:
        self._tenant = uuid_text(tenant_id)
        self._tenants = None if tenants is None else {uuid_text(each) for each in tenants}
        self._runs = None if runs is None else {uuid_text(each) for each in runs}
        self._clock = clock
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def tenant_id(self) -> str:
        """Whose ledger this is."""
        return self._tenant

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was written."""
        with self._lock:
            return list(self._rows.values())

    def emit_telemetry(self, args: EmitTelemetryArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record an event."""
        self._write(args, run_id)

    def emit_governance(self, args: EmitGovernanceArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a decision."""
        self._write(args, run_id)

    def record_llm_call(self, args: EmitLlmCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a model call and its cost."""
        self._write(args, run_id)

    def record_connector_call(self, args: EmitConnectorCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a connector call and its cost."""
        self._write(args, run_id)

    def _write(self, args: LedgerArgs, run_id: str | uuid.UUID | None) -> None:
        record = ledger_record(args, tenant_id=self._tenant, run_id=run_id, clock=self._clock)
        columns = record.columns
        identity = (record.table, *(columns[name] for name in _IDENTITY[record.table]))
        with self._lock:
            there = self._rows.get(identity)
            if there is not None:
                if there["idempotency_key"] != columns["idempotency_key"]:
                    raise IdempotencyConflict(table=record.table, idempotency_key=columns["idempotency_key"])
                return
            if self._tenants is not None and self._tenant not in self._tenants:
                raise UnknownTenant(self._tenant)
            run = columns.get("run_id")
            if run is not None and self._runs is not None and run not in self._runs:
                raise UnknownRun(run)
            self._rows[identity] = {"table": record.table, "tenant_id": self._tenant, **columns}
