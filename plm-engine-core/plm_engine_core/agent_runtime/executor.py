"""The Executor port: the only way from the engine to whatever carries out a granted call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from plm_engine_core.control_plane.admission.grants import Begun, Grant
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.registry import CapabilityDescriptor

Progress = Callable[[float, str], Awaitable[None]]
"""Reports a fraction from 0 to 1 (-1 when unknown) and a message."""

ARGUMENTS_REFUSED = "arguments_refused"
"""Category of a `not_started` outcome that is final: the same arguments would be refused again."""

OUTPUT_REFUSED = "output_refused"
"""Category of a `failed` outcome: the call returned, but what it returned cannot be kept."""

Begin = Callable[[], Awaitable[Begun]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One granted call. `begin` must be awaited as the last act before the call leaves the host, and accept."""

    tenant_id: UUID
    run_id: UUID
    step_id: str
    step_key: str
    capability: CapabilityDescriptor
    resource: str
    arguments: Mapping[str, Any]
    traceparent: str
    trace_id: str
    begin: Begin


class Executor(Protocol):
    """Carries out granted calls. It never raises for what a plugin does: that is an outcome."""

    def offers(self, capability: CapabilityDescriptor) -> bool:
        """Whether this node can carry the capability out."""
        ...

    async def execute(self, call: Call, grant: Grant, progress: Progress) -> Outcome:
        """Make the call and say what became of it.

        A call that never left the host is `not_started`; one whose end nobody saw is `outcome_unknown`.
        """
        ...

    async def cancel(self, grant: Grant) -> None:
        """Ask the call of this grant to stop; `execute` then returns with what became of it."""
        ...
