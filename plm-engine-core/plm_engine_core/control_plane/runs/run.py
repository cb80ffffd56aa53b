"""A run and its steps, as read from the books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.limits.subjects import Subjects
from plm_engine_core.control_plane.vocabulary import (
    TERMINAL_RUN_STATES,
    Evidence,
    RunKind,
    RunState,
    StepState,
)


@dataclass(frozen=True, kw_only=True)
class ArtifactRow:
    """A stored file as the database knows it; its bytes are in the artifact store under `storage_uri`."""

    id: UUID
    run_id: UUID | None
    trace_id: str
    mime_type: str
    size_bytes: int
    backend: str
    storage_uri: str


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """Everything needed to create a run.

    `budget` replaces the policy's limits per unit; `evaluations` are what evaluators said of its input.
    """

    tenant_id: UUID
    run_id: UUID
    kind: RunKind
    agent: Mapping[str, Any]
    input: Mapping[str, Any]
    principal: Principal
    policy_digest: str
    trace_id: str
    root_span_id: str
    budget: Mapping[str, Decimal]
    tenant_budget: Mapping[str, Decimal]
    subjects: Subjects = field(default_factory=Subjects)
    artifacts: Sequence[ArtifactRow] = ()
    idempotency_key: str | None = None
    request_digest: str = ""
    evaluations: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as it stands."""

    tenant_id: UUID
    id: UUID
    kind: RunKind
    state: RunState
    agent: Mapping[str, Any]
    input: Mapping[str, Any]
    principal: Principal
    policy_digest: str
    trace_id: str
    root_span_id: str
    fencing_token: int
    cancel_requested: bool
    created_at: datetime
    updated_at: datetime
    subjects: Subjects = field(default_factory=Subjects)
    finished_at: datetime | None = None
    reason: str | None = None
    message: str | None = None
    result: Any = None

    @property
    def finished(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in TERMINAL_RUN_STATES


_OPEN = frozenset({"awaiting_approval", "granted", "running", "not_started", "cancelled", "superseded"})


def still_wants(state: str, error: Mapping[str, Any] | None) -> bool:
    """Whether a run whose newest attempt stands so wants to use its capability, as `engine_run_halt_v2` has it."""
    return state in _OPEN or (error or {}).get("reason") == "halted"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One attempt of one step as it stands."""

    step_index: int
    attempt: int
    step_id: str
    step_key: str
    capability: str
    resource: str
    arguments: Mapping[str, Any]
    state: StepState
    decision: Mapping[str, Any]
    grant_id: UUID | None = None
    span_id: str | None = None
    grant_expires_at: datetime | None = None
    ticket_id: UUID | None = None
    evidence: Evidence | None = None
    output: Any = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to move one run forward, until somebody else takes it: every write presents the fencing token."""

    run: Run
    fencing_token: int


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """A run of kind `external` that its holder left; `forsaken` when it was queued and nobody took it for long."""

    tenant_id: UUID
    run_id: UUID
    fencing_token: int
    forsaken: bool


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a run worker learns when it renews its lease."""

    held: bool
    cancel_requested: bool = False
    halt: Mapping[str, Any] | None = None
