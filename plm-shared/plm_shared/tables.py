"""The seven tables as SQLAlchemy knows them, for queries and for comparing a database with what it should be.

Tables, columns, keys and indexes only: triggers, policies, grants and the view live in the migrations. Names that are
not given are PostgreSQL's own, which are part of the contract.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ENUM, JSONB

__all__ = [
    "METADATA",
    "artifacts",
    "connector_calls",
    "llm_calls",
    "pricing_snapshots",
    "runs",
    "telemetry_events",
    "tenants",
]

METADATA: Final = MetaData()

_quality_level = ENUM("pending", "bronze", "silver", "gold", name="quality_level", metadata=METADATA)
_actor_kind = ENUM("human", "agent", "system", name="actor_kind", metadata=METADATA)
_cost_status = ENUM("pending", "calculated", "unavailable", name="cost_status", metadata=METADATA)
_PENDING: Final = text("'pending'")
_EMPTY: Final = text("'{}'")
_RUN_OF_PAYLOAD: Final = (
    "CASE WHEN payload ->> 'run_id' ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'"
    " THEN (payload ->> 'run_id')::uuid END"
)


def _text(name: str, *, nullable: bool = False, unique: bool = False) -> Column[str]:
    return Column(name, Text, nullable=nullable, unique=unique)


def _id() -> Column[Any]:
    return Column("id", Uuid, primary_key=True)


def _tenant() -> Column[Any]:
    return Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False)


def _run() -> Column[Any]:
    return Column("run_id", Uuid, ForeignKey("runs.id", ondelete="SET NULL"))


def _created() -> Column[Any]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _cost() -> list[Column[Any]]:
    return [
        Column("cost_eur", Numeric(18, 8)),
        Column("cost_status", _cost_status, nullable=False, server_default=_PENDING),
        _text("pricing_version"),
        _text("idempotency_key", unique=True),
        _created(),
        Column("pricing_snapshot_id", Uuid, ForeignKey("pricing_snapshots.id", ondelete="SET NULL")),
    ]


tenants = Table("tenants", METADATA, _id(), _text("name"), _created())
runs = Table(
    "runs",
    METADATA,
    _id(),
    _tenant(),
    Column("quality_level", _quality_level, nullable=False, server_default=_PENDING),
    Column("actor_kind", _actor_kind, nullable=False),
    _created(),
    Column("updated_at", DateTime(timezone=True)),
    Index("ix_runs_tenant_id", "tenant_id"),
)
telemetry_events = Table(
    "telemetry_events",
    METADATA,
    _id(),
    _tenant(),
    _text("trace_id"),
    _text("span_id"),
    _text("parent_span_id", nullable=True),
    _text("event_type"),
    _text("capability"),
    Column("payload", JSONB, nullable=False, server_default=_EMPTY),
    _text("idempotency_key", unique=True),
    _created(),
    Column("payload_run_id", Uuid, Computed(_RUN_OF_PAYLOAD, persisted=True)),
    UniqueConstraint("tenant_id", "trace_id", "span_id", "event_type", name="uq_telemetry_events_logical"),
    Index("ix_telemetry_events_tenant_trace_span", "tenant_id", "trace_id", "span_id"),
    Index("ix_telemetry_events_tenant_payload_run", "tenant_id", "payload_run_id"),
)
llm_calls = Table(
    "llm_calls",
    METADATA,
    _id(),
    _tenant(),
    _run(),
    _text("span_id"),
    _text("model"),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    *_cost(),
    UniqueConstraint("tenant_id", "span_id", name="uq_llm_calls_logical"),
    Index("ix_llm_calls_run_id", "run_id"),
    Index("ix_llm_calls_pricing_snapshot_id", "pricing_snapshot_id"),
)
connector_calls = Table(
    "connector_calls",
    METADATA,
    _id(),
    _tenant(),
    _run(),
    _text("span_id"),
    _text("connector_id"),
    _text("capability"),
    Column("envelope", JSONB, nullable=False, server_default=_EMPTY),
    *_cost(),
    UniqueConstraint("tenant_id", "span_id", name="uq_connector_calls_logical"),
    Index("ix_connector_calls_run_id", "run_id"),
    Index("ix_connector_calls_pricing_snapshot_id", "pricing_snapshot_id"),
)
artifacts = Table(
    "artifacts",
    METADATA,
    _id(),
    _tenant(),
    _text("trace_id"),
    _run(),
    _text("mime_type"),
    Column("size_bytes", BigInteger, nullable=False),
    _text("backend"),
    _text("storage_uri"),
    Column("retention_until", DateTime(timezone=True)),
    _created(),
    Index("ix_artifacts_tenant_trace", "tenant_id", "trace_id"),
    Index("ix_artifacts_run_id", "run_id"),
)
pricing_snapshots = Table(
    "pricing_snapshots",
    METADATA,
    _id(),
    _tenant(),
    _text("model"),
    Column("snapshot_date", Date, nullable=False),
    Column("input_rate_per_1k", Numeric(18, 8)),
    Column("output_rate_per_1k", Numeric(18, 8)),
    _text("pricing_version"),
    _created(),
    UniqueConstraint("tenant_id", "model", "snapshot_date", name="uq_pricing_snapshots_tenant_model_date"),
    Index("ix_pricing_snapshots_tenant_id", "tenant_id"),
)
