"""Halts: what the kill switch creates. While one stands, nothing new starts in its scope."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.signals import NoSignals, Signals
from plm_engine_core.control_plane.registry import AgentRegistry, CapabilityRegistry
from plm_engine_core.control_plane.storage.ports import HaltStore
from plm_engine_core.control_plane.texts import LONGEST_NAME, LONGEST_REASON, check_text, word_of
from plm_engine_core.control_plane.vocabulary import HaltScope, RunState

logger = logging.getLogger(__name__)

OPERATOR_SCOPE = "plm.halt"
SYSTEM_OPERATOR_SCOPE = "plm.halt.system"
CANCEL_SECONDS = 30.0
LONGEST_CANCEL_SECONDS = 86_400.0

_MOST_TENANTS = 10_000

BY_ID = frozenset({HaltScope.RUN_GROUP, HaltScope.RUN})
BY_NAME = frozenset({HaltScope.AGENT, HaltScope.CAPABILITY})


def check_cancel_seconds(seconds: float) -> None:
    """Raises: InvalidRequest: it is no bound of calls after a halt: not more than 0, or more than a day."""
    if not 0 < seconds <= LONGEST_CANCEL_SECONDS:
        raise InvalidRequest(
            f"calls end more than 0 and at most {LONGEST_CANCEL_SECONDS:g} s after a halt, not {seconds}",
            field="cancel_seconds",
        )


@dataclass(frozen=True, kw_only=True)
class HaltCalls:
    """What a halt met in the tenant that asks: grants it revoked, and calls in flight, which it had cancelled.

    Of the calls `open` have not been seen to end yet; `last_ended_at` is when the last one of those that have was.
    """

    revoked: int = 0
    in_flight: int = 0
    open: int = 0
    last_ended_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Halt:
    """One halt. `epoch` grows with every halt of its scope.

    `scope_id` is the run or run group, `subject` the name of the agent or capability; both are empty for what is wider.
    Calls in flight are to have ended `cancel_seconds` after `triggered_at`, the bound that was in force then.
    """

    id: UUID
    scope: HaltScope
    scope_id: UUID | None
    epoch: int
    reason: str
    triggered_by: UUID
    triggered_at: datetime
    subject: str | None = None
    lifted_by: UUID | None = None
    lifted_at: datetime | None = None
    cancel_seconds: float | None = None
    calls: HaltCalls = HaltCalls()

    @property
    def created_at(self) -> datetime:
        """When it came to be, as listings are ordered."""
        return self.triggered_at

    def to_json(self) -> dict[str, Any]:
        """What the events of a halt carry."""
        named = {"subject": self.subject} if self.subject is not None else {}
        return {
            "halt_id": str(self.id),
            "scope": self.scope.value,
            "scope_id": str(self.scope_id) if self.scope_id else None,
            **named,
            "epoch": self.epoch,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class HaltDrill:
    """What a halt would meet now in the tenant that asks: runs that have not ended, unused grants, calls in flight.

    Of a capability, the runs whose newest attempt still wants to use it.
    """

    scope: HaltScope
    scope_id: UUID | None
    subject: str | None
    runs: Mapping[RunState, int]
    grants: int
    calls: int


class KillSwitch:
    """Triggers and lifts halts. A committed halt is followed by no grant and no begin in its scope.

    `cancel_seconds` is what each halt's record promises of calls in flight: whoever drives them hears of the halt by
    `signals`, or else with the next heartbeat, and has them ended within it.

    Raises:
        InvalidRequest: `cancel_seconds` is no bound: not more than 0, or more than a day.
    """

    def __init__(
        self,
        store: HaltStore,
        *,
        registry: CapabilityRegistry | None = None,
        agents: AgentRegistry | None = None,
        signals: Signals | None = None,
        cancel_seconds: float = CANCEL_SECONDS,
    ) -> None:
        check_cancel_seconds(cancel_seconds)
        self._store = store
        self._registry = registry
        self._agents = agents
        self._signals: Signals = signals or NoSignals()
        self._cancel_seconds = cancel_seconds

    async def trigger(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        reason: str,
        by: Principal,
        subject: str | None = None,
    ) -> Halt:
        """Halt a run, run group, agent, capability, the tenant or the system.

        A halt that already stands in that scope is answered as it is. When this answers nothing begins in the scope any
        more, unused grants are revoked, and calls in flight are being cancelled. One damaged row prevents none of it.

        Raises:
            Forbidden: the caller lacks `plm.halt`, or `plm.halt.system` for the system.
            InvalidRequest: no reason; or the scope is not named as it must be.
            NotFound: nothing of that name in this tenant, so that a slip of the pen halts nothing unnoticed.
        """
        scope = word_of(HaltScope, scope, field="scope")
        _authorise(scope, by)
        if isinstance(reason, str) and not reason.strip():
            raise InvalidRequest("a halt needs a reason, which everyone it stops will read", field="reason")
        check_text(reason, field="reason", longest=LONGEST_REASON)
        self._check_named(scope, scope_id, subject)
        halt = await self._store.trigger(
            tenant_id,
            scope,
            scope_id,
            subject=subject,
            reason=reason,
            by=by.user_id,
            actor=by.actor,
            cancel_seconds=self._cancel_seconds,
            registered=scope is HaltScope.AGENT and self._is_registered(subject or ""),
        )
        try:
            await self._end_halted(tenant_id, scope)
            halt = await self._store.get(tenant_id, halt.id)
        except Exception:
            logger.exception("what a halt ends is not known yet", extra={"halt_id": str(halt.id)})
        # Only now: a call in flight has to be in the halt's record before it is stopped.
        await self._tell(tenant_id, halt)
        return halt

    async def drill(
        self, tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, *, by: Principal, subject: str | None = None
    ) -> HaltDrill:
        """Say what a halt would stop in this tenant now. Nothing is stopped, nothing waits for it, nothing is recorded.

        Raises:
            Forbidden, InvalidRequest, NotFound: as for `trigger`, so that a drill finds what would refuse the halt.
        """
        scope = word_of(HaltScope, scope, field="scope")
        _authorise(scope, by)
        self._check_named(scope, scope_id, subject)
        registered = scope is HaltScope.AGENT and self._is_registered(subject or "")
        return await self._store.met(tenant_id, scope, scope_id, subject=subject, registered=registered)

    def _check_named(self, scope: HaltScope, scope_id: UUID | None, subject: str | None) -> None:
        """Refuse what is not named as its scope must be."""
        if (scope in BY_ID) != (scope_id is not None):
            raise InvalidRequest(
                "'scope_id' names the run or run group of its halt, and nothing else", field="scope_id"
            )
        if (scope in BY_NAME) != bool(subject):
            raise InvalidRequest(
                "'subject' names the agent or capability of its halt, and nothing else", field="subject"
            )
        if scope is HaltScope.CAPABILITY and self._registry is not None and self._registry.get(subject or "") is None:
            raise NotFound("capability", subject)
        if subject is not None:
            check_text(subject, field="subject", longest=LONGEST_NAME)

    def _is_registered(self, agent_id: str) -> bool:
        return self._agents is not None and self._agents.get(agent_id) is not None

    async def _tell(self, tenant_id: UUID, halt: Halt) -> None:
        run_id = halt.scope_id if halt.scope is HaltScope.RUN else None
        await self._signals.interrupt(None if halt.scope is HaltScope.SYSTEM else tenant_id, run_id)
        if run_id is not None:
            await self._signals.changed(tenant_id, run_id)

    async def _end_halted(self, tenant_id: UUID, scope: HaltScope) -> None:
        """The halt stands already, whatever happens here; recovery finds what could not be ended."""
        others = await self._store.unfinished(_MOST_TENANTS) if scope is HaltScope.SYSTEM else ()
        for each in dict.fromkeys([tenant_id, *others]):
            try:
                damaged = await self._store.end_halted(each)
            except Exception:
                logger.exception("what a halt ends in tenant %s could not be ended yet", each)
                continue
            if damaged:
                logger.error(
                    "a halt could not end %d grants or approval scopes; nothing begins under them while it stands",
                    damaged,
                )

    async def lift(self, tenant_id: UUID, halt_id: UUID, *, by: Principal) -> Halt:
        """Lift a halt; the runs it parked are queued again in the same commit. Lifting twice answers the same.

        A run whose record is damaged is left to recovery, so that the others go on.

        Raises:
            Forbidden: as for `trigger`.
            NotFound: no such halt.
        """
        halt = await self._store.get(tenant_id, halt_id)
        _authorise(halt.scope, by)
        return await self._store.lift(tenant_id, halt, by=by.user_id, actor=by.actor)


def _authorise(scope: HaltScope, by: Principal) -> None:
    check_principal(by, field="by")
    required = SYSTEM_OPERATOR_SCOPE if scope is HaltScope.SYSTEM else OPERATOR_SCOPE
    if required not in by.scopes:
        raise Forbidden(
            f"a {scope.value} halt needs the OAuth scope {required}",
            reason="missing_scopes",
            missing_scopes=(required,),
        )
