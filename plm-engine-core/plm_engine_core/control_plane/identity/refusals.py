"""Refused tokens: recorded for whom they name, and never more of them than an audit log can bear."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from uuid import UUID

from plm_engine_core.control_plane.identity.audit import (
    AuditError,
    AuditSink,
    AuditTenantUnknown,
    Surface,
    anonymous_record,
    reject_record,
)
from plm_engine_core.control_plane.identity.errors import IdentityValidationError

_BURST = 60.0
_PER_SECOND = 1.0
_MOST_ALLOWANCES = 1_000
_LONGEST_CLIENT = 64  # an address has fewer; what a proxy hands on as one may be anything

_log = logging.getLogger(__name__)


def _log_unrecorded(tenant_id: UUID | None, failure: AuditError) -> None:
    _log.error("identity.reject of %s is not in the audit log", tenant_id or "the installation", exc_info=failure)


class _Allowance:
    """How many records may still be written for one tenant, or for the installation."""

    def __init__(self, now: float) -> None:
        self._left, self._filled_at = _BURST, now
        self.omitted = 0
        self.of_nobody = False  # the last record said that there is no such tenant

    def take(self, now: float) -> bool:
        """Whether one more may be written."""
        self._left = min(_BURST, self._left + (now - self._filled_at) * _PER_SECOND)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Refusals:
    """Writes them to the audit log of the tenant that a signature proved, or else of the installation.

    Whoever has a token that was good once can cause the first kind for ever, and anybody the second. So they are
    bounded: 60 at once and then one a second, for each tenant and for the installation, in each process. What is left
    out is counted, and the next record says how many there were; for a tenant that does not exist, or was forgotten for
    others, the installation's next one. What cannot be written goes to `unrecorded`, by default the log.
    """

    def __init__(
        self,
        audit: AuditSink,
        *,
        provider: str,
        clock: Callable[[], float] = time.monotonic,
        unrecorded: Callable[[UUID | None, AuditError], None] = _log_unrecorded,
    ) -> None:
        self._audit = audit
        self._provider = provider
        self._clock = clock
        self._unrecorded = unrecorded
        self._installation = _Allowance(clock())
        self._allowances: dict[UUID, _Allowance] = {}  # the last that was asked for is the last

    async def record(self, error: IdentityValidationError, *, client: str, surface: Surface = Surface.HTTP) -> None:
        """Record one, or count it; a failure is told, for the request is refused all the same."""
        tenant_id = error.tenant_id
        try:
            await self._write(error, tenant_id, surface, client)
        except AuditTenantUnknown:  # a signature named it, and it does not exist
            await self._write(error, None, surface, client)

    async def _write(
        self, error: IdentityValidationError, tenant_id: UUID | None, surface: Surface, client: str
    ) -> None:
        allowance = self._installation if tenant_id is None else self._allowance(tenant_id)
        if not allowance.take(self._clock()):
            (self._installation if allowance.of_nobody else allowance).omitted += 1
            return
        omitted, allowance.omitted = allowance.omitted, 0
        if tenant_id is not None:
            record = reject_record(tenant_id, error, provider=self._provider, surface=surface, omitted=omitted)
        else:
            shown = client[:_LONGEST_CLIENT]
            record = anonymous_record(error, provider=self._provider, surface=surface, client=shown, omitted=omitted)
        try:
            await self._audit.write(record)
        except AuditError as failure:
            if tenant_id is not None and isinstance(failure, AuditTenantUnknown):
                self._installation.omitted += omitted + allowance.omitted
                allowance.omitted, allowance.of_nobody = 0, True
                raise
            allowance.omitted += omitted + 1
            self._unrecorded(tenant_id, failure)
        else:
            allowance.of_nobody = False

    def _allowance(self, tenant_id: UUID) -> _Allowance:
        allowance = self._allowances.pop(tenant_id, None) or _Allowance(self._clock())
        if len(self._allowances) >= _MOST_ALLOWANCES:
            forgotten = self._allowances.pop(next(iter(self._allowances)))
            self._installation.omitted += forgotten.omitted
        self._allowances[tenant_id] = allowance
        return allowance
