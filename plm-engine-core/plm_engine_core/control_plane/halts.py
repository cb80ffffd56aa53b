"""Halts: what the kill switch creates. While one stands, nothing new starts in its scope."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.storage.ports import HaltStore
from plm_engine_core.control_plane.vocabulary import HaltScope

OPERATOR_SCOPE = "plm.halt"
SYSTEM_OPERATOR_SCOPE = "plm.halt.system"


@dataclass(frozen=True, kw_only=True)
class Halt:
    """One halt. `epoch` grows with every halt; `scope_id` is empty for the whole system."""

    id: UUID
    scope: HaltScope
    scope_id: UUID | None
    epoch: int
    reason: str
    triggered_by: UUID
    triggered_at: datetime
    lifted_by: UUID | None = None
    lifted_at: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """What the events of a halt carry."""
        return {
            "halt_id": str(self.id),
            "scope": self.scope.value,
            "scope_id": str(self.scope_id) if self.scope_id else None,
            "epoch": self.epoch,
            "reason": self.reason,
        }


class KillSwitch:
    """Triggers and lifts halts. A committed halt is followed by no grant and no begin in its scope."""

    def __init__(self, store: HaltStore) -> None:
        self._store = store

    async def trigger(
        self, tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, *, reason: str, by: Principal
    ) -> Halt:
        """Halt a run, the tenant or the system; a halt that already stands in that scope is answered as it is.

        Raises:
            Forbidden: the caller lacks `plm.halt`, or `plm.halt.system` for the system.
            InvalidRequest: no reason, or a run scope without a run.
            NotFound: no such run in this tenant.
        """
        _authorise(scope, by)
        if not reason.strip():
            raise InvalidRequest("a halt needs a reason, which everyone it stops will read", field="reason")
        if (scope is HaltScope.RUN) != (scope_id is not None):
            raise InvalidRequest("'scope_id' names the run of a run halt, and nothing else", field="scope_id")
        return await self._store.trigger(tenant_id, scope, scope_id, reason=reason, by=by.user_id, actor=by.actor)

    async def lift(self, tenant_id: UUID, halt_id: UUID, *, by: Principal) -> Halt:
        """Lift a halt; the runs it parked are queued again in the same commit. Lifting twice answers the same.

        Raises:
            Forbidden: as for `trigger`.
            NotFound: no such halt.
        """
        halt = await self._store.get(tenant_id, halt_id)
        _authorise(halt.scope, by)
        return await self._store.lift(tenant_id, halt, by=by.user_id, actor=by.actor)


def _authorise(scope: HaltScope, by: Principal) -> None:
    required = SYSTEM_OPERATOR_SCOPE if scope is HaltScope.SYSTEM else OPERATOR_SCOPE
    if required not in by.scopes:
        raise Forbidden(
            f"a {scope.value} halt needs the OAuth scope {required}",
            reason="missing_scopes",
            missing_scopes=(required,),
        )
