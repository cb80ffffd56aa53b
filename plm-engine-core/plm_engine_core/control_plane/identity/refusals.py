"""Refusals that prove no tenant: recorded for the installation, and never more of them than it can bear."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from plm_engine_core.control_plane.identity.audit import AuditError, AuditSink, anonymous_record
from plm_engine_core.control_plane.identity.errors import IdentityValidationError

_BURST = 60.0
_PER_SECOND = 1.0

_log = logging.getLogger(__name__)


class AnonymousRefusals:
    """Writes them to the audit log of the installation.

    Anybody can cause them without a token of ours, so they are bounded: 60 at once and then one a second, in each
    process. What is left out is counted, and the next record says how many there were.
    """

    def __init__(self, audit: AuditSink, *, provider: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._provider = provider
        self._clock = clock
        self._tokens = _BURST
        self._filled_at = clock()
        self._omitted = 0

    async def record(self, error: IdentityValidationError, *, client: str) -> None:
        """Record one, or count it; a failure is logged, for the request is refused all the same."""
        if not self._may_write():
            self._omitted += 1
            return
        omitted, self._omitted = self._omitted, 0
        try:
            await self._audit.write(anonymous_record(error, provider=self._provider, client=client, omitted=omitted))
        except AuditError:
            self._omitted += omitted + 1
            _log.exception("identity.reject is not in the audit log of the installation")

    def _may_write(self) -> bool:
        now = self._clock()
        self._tokens = min(_BURST, self._tokens + (now - self._filled_at) * _PER_SECOND)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
