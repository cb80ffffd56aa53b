"""The storage in memory as one object."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.storage.memory.admission import MemoryAdmission
from plm_engine_core.control_plane.storage.memory.approvals import MemoryApprovals
from plm_engine_core.control_plane.storage.memory.books import Books, Clock, Deliver, deliver_nothing, system_clock
from plm_engine_core.control_plane.storage.memory.budget_desk import MemoryBudgets
from plm_engine_core.control_plane.storage.memory.events import MemoryCheckpoints, MemoryEvents
from plm_engine_core.control_plane.storage.memory.halts import MemoryHalts
from plm_engine_core.control_plane.storage.memory.idempotency import MemoryIdempotency
from plm_engine_core.control_plane.storage.memory.policies import MemoryPolicies
from plm_engine_core.control_plane.storage.memory.resource_leases import MemoryResourceLeases
from plm_engine_core.control_plane.storage.memory.resource_locks import MemoryResourceLocks
from plm_engine_core.control_plane.storage.memory.runs import MemoryRuns
from plm_engine_core.control_plane.storage.memory.values import storable_text


class MemoryStorage:
    """All ports over dictionaries and one lock, for one process; it answers as PostgreSQL does and forgets at its end.

    Any thread and any event loop may use it at the same time: no operation waits for anything but the lock. `deliver`
    notes down "drive this run" inside the transaction, so it must neither wait nor come back to the storage; what it
    raises undoes the transaction. Nothing but idempotency records is ever dropped, so the books grow with what happens.
    """

    def __init__(self, *, clock: Clock = system_clock, deliver: Deliver = deliver_nothing) -> None:
        self.books = Books(clock, deliver)
        self.admission = MemoryAdmission(self.books)
        self.runs = MemoryRuns(self.books)
        self.approvals = MemoryApprovals(self.books)
        self.budgets = MemoryBudgets(self.books)
        self.halts = MemoryHalts(self.books)
        self.leases = MemoryResourceLeases(self.books)
        self.locks = MemoryResourceLocks(self.books)
        self.events = MemoryEvents(self.books)
        self.checkpoints = MemoryCheckpoints(self.books)
        self.policies = MemoryPolicies(self.books)
        self.idempotency = MemoryIdempotency(self.books)

    def add_tenant(self, tenant_id: UUID, *, name: str = "") -> UUID:
        """Make a tenant, as `plm-cli db create-tenant` does in PostgreSQL; one that exists stays as it is."""
        with self.books.transaction() as books:
            if books.tenants.get(None, tenant_id) is None:
                books.tenants.put(None, tenant_id, {"id": tenant_id, "name": storable_text(name)})
        return tenant_id
