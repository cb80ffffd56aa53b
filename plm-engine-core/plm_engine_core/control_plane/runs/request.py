"""What somebody asks to be run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.runs.run import ArtifactRow
from plm_engine_core.control_plane.vocabulary import RunKind


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What somebody asks to be run. `budget` lowers the policy's limits; raising one needs `plm.cost.override`.

    A run of kind `external` is not delivered to run workers: whoever made it takes its lease and moves it.
    """

    tenant_id: UUID
    run_id: UUID
    agent: Mapping[str, Any]
    input: Mapping[str, Any]
    trace_id: str
    root_span_id: str = field(default_factory=lambda: secrets.token_hex(8))
    budget: Mapping[str, Decimal] = field(default_factory=dict)
    run_group_id: UUID | None = None
    kind: RunKind = RunKind.HOSTED
    artifacts: Sequence[ArtifactRow] = ()
    idempotency_key: str | None = None
    request_digest: str = ""
