"""What one emission writes: checked, and rendered as the JSON object that every writer of the ledger sends.

Nothing here touches a database, so a bad event is refused before it is queued, spooled or sent.

::

    LedgerRefused
    ├── IdempotencyConflict   the logical row exists with another content: the caller has a bug
    ├── UnknownTenant         create the tenant first
    ├── UnknownRun            create the run first, or emit without run_id
    ├── KeyMismatch           the idempotency key speaks of another tenant, span or event than the arguments
    └── TenantMismatch        the caller's connection is bound to another tenant, or holds no transaction
    JsonRefused               a payload that jsonb cannot hold; names the path (from ``canonical_json``)
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, NamedTuple, assert_never

from plm_shared.canonical_json import JsonRefused, storable_json
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.pricing import COSTLIEST, ledger_amount

__all__ = [
    "IdempotencyConflict",
    "KeyMismatch",
    "LedgerArgs",
    "LedgerRecord",
    "LedgerRefused",
    "TenantMismatch",
    "UnknownRun",
    "UnknownTenant",
    "call_records",
    "ledger_record",
    "utc_today",
    "uuid_text",
]

LedgerArgs = EmitTelemetryArgs | EmitGovernanceArgs | EmitLlmCallArgs | EmitConnectorCallArgs

_SOME_KEY: Final = ("-", "-", "-", "-", "-")
_LARGEST: Final = 16 * 1024 * 1024  # characters of one event; a batch of them must fit a statement and the memory


class LedgerRefused(Exception):
    """Nothing was written."""


class IdempotencyConflict(LedgerRefused):
    """The logical row is taken by another content."""

    def __init__(self, *, table: str, idempotency_key: str) -> None:
        super().__init__(
            f"{table}: this span and event are recorded with another content than {idempotency_key!r}; use a new span"
        )
        self.table = table
        self.idempotency_key = idempotency_key


class UnknownTenant(LedgerRefused):
    """The tenant has no row."""

    def __init__(self, tenant_id: str) -> None:
        super().__init__(f"tenant {tenant_id} does not exist; create it before anything is recorded for it")
        self.tenant_id = tenant_id


class UnknownRun(LedgerRefused):
    """The run that a call names has no row."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id} does not exist; create it before its calls are recorded, or leave run_id out")
        self.run_id = run_id


class KeyMismatch(LedgerRefused, ValueError):
    """A part of the idempotency key differs from what is being recorded."""

    def __init__(self, part: str, *, key: str, expected: str) -> None:
        super().__init__(f"idempotency_key.{part} is {key!r}, but {expected!r} is being recorded; make the key from it")
        self.part = part
        self.key = key
        self.expected = expected


class TenantMismatch(LedgerRefused, ValueError):
    """The caller's connection cannot carry this tenant's rows."""


class LedgerRecord(NamedTuple):
    """One row to be: its table, and its columns as the text of a JSON object."""

    table: str
    text: str
    priced: bool = False

    @property
    def idempotency_key(self) -> str:
        """The key's text."""
        return str(self.columns["idempotency_key"])

    @property
    def columns(self) -> dict[str, Any]:
        """The object, read back."""
        return dict(json.loads(self.text))


def utc_today() -> date:
    """The date in UTC, which prices are kept by."""
    return datetime.now(UTC).date()


@lru_cache(maxsize=4096)
def _canonical(text: str) -> str:
    return str(uuid.UUID(text))


@lru_cache(maxsize=4096)
def _text_of(number: int) -> str:
    return str(uuid.UUID(int=number))


def uuid_text(value: str | uuid.UUID) -> str:
    """The canonical text of a UUID, remembered, as few of them occur often; ``ValueError`` for anything else."""
    return _text_of(value.int) if isinstance(value, uuid.UUID) else _canonical(value)


def ledger_record(
    args: LedgerArgs,
    *,
    tenant_id: str | uuid.UUID,
    run_id: str | uuid.UUID | None = None,
    clock: Callable[[], date] = utc_today,
) -> LedgerRecord:
    """Check one emission and render it.

    Raises:
        KeyMismatch: the key's tenant, span or event type is not the one recorded; or the payload names another run.
        JsonRefused: the payload holds what jsonb cannot; the message names its path.
        ValueError: ``tenant_id`` or ``run_id`` is no UUID.
    """
    run = None if run_id is None else uuid_text(run_id)
    key = args.idempotency_key
    if key.tenant_id != (tenant := uuid_text(tenant_id)):
        raise KeyMismatch("tenant_id", key=key.tenant_id, expected=tenant)
    if key.span_id != args.span_id:
        raise KeyMismatch("span_id", key=key.span_id, expected=args.span_id)
    columns: dict[str, Any] = {"span_id": args.span_id, "idempotency_key": key.as_db_key()}
    match args:
        case EmitTelemetryArgs():
            return _telemetry(columns, args, args.event_type, args.capability, run)
        case EmitGovernanceArgs():
            return _telemetry(columns, args, args.governance_event_type, "governance", run)
        case EmitLlmCallArgs():
            return _llm_call(columns, args, run, clock)
        case EmitConnectorCallArgs():
            return _connector_call(columns, args, run, clock)
        case _:
            assert_never(args)


def call_records(
    *,
    tenant_id: uuid.UUID,
    run_id: uuid.UUID,
    trace_id: str,
    span_id: str,
    event_type: str,
    connector_id: str,
    capability: str,
    facts: Mapping[str, Any],
    cost_eur: str | None,
    clock: Callable[[], date] = utc_today,
) -> tuple[LedgerRecord, LedgerRecord]:
    """The telemetry row and the connector row of one call of a run; `facts` stand in both, under that `run_id`.

    They are what `ledger_record` makes of `EmitTelemetryArgs` and `EmitConnectorCallArgs` with one content hash, over
    the facts, the run and the cost as it is given; but names are checked once for all calls, and the facts rendered
    once for both rows, because every settlement waits for this. The cost is by prices of our own; None says that it is
    not known.

    Raises:
        ValueError: a name, the trace, the span or the cost is what those models refuse.
        JsonRefused: the facts hold what jsonb cannot; the message names its path.
    """
    event_type, connector_id, capability = _checked_names(event_type, connector_id, capability)
    tenant, run = uuid_text(tenant_id), uuid_text(run_id)
    document = {**facts, "run_id": run}
    content = compute_content_hash({**document, "cost_eur": cost_eur})
    text = storable_json(document, root="payload")
    price: dict[str, Any] = {"cost_eur": None, "cost_status": "unavailable", "pricing_version": "unavailable"}
    if cost_eur is not None:
        price = {
            "cost_eur": _own_cost(cost_eur),
            "cost_status": "calculated",
            "pricing_version": "overrides-static",
            "priced_model": f"{connector_id}:{capability}",
            "snapshot_date": clock().isoformat(),
        }

    def columns(event: str) -> dict[str, Any]:
        key = IdempotencyKey(tenant, trace_id, span_id, event, content)
        return {"span_id": span_id, "idempotency_key": key.as_db_key(), "capability": capability}

    return (
        _rendered(
            "telemetry_events", {**columns(event_type), "trace_id": trace_id, "event_type": event_type}, "payload", text
        ),
        _rendered(
            "connector_calls",
            {**columns("connector_call"), "run_id": run, "connector_id": connector_id, **price},
            "envelope",
            text,
        ),
    )


@lru_cache(maxsize=1024, typed=True)
def _checked_names(event_type: str, connector_id: str, capability: str) -> tuple[str, str, str]:
    """As the models have them, or refused by them; few names occur often."""
    key = IdempotencyKey(*_SOME_KEY)
    telemetry = EmitTelemetryArgs(event_type=event_type, span_id="-", capability=capability, idempotency_key=key)
    connector = EmitConnectorCallArgs(
        span_id="-",
        connector_id=connector_id,
        capability=capability,
        pricing_version="unavailable",
        cost_status="unavailable",
        idempotency_key=key,
    )
    return telemetry.event_type, connector.connector_id, connector.capability


def _own_cost(text: str) -> str:
    try:
        cost = Decimal(text)
        amount = ledger_amount(cost)
        fits = cost >= 0 and amount < COSTLIEST
    except ArithmeticError:
        fits = False
    if not fits:
        raise ValueError(f"cost_eur must be from 0 to below {COSTLIEST} EUR, rounded to eight decimals: {text}")
    return str(amount)


def _telemetry(
    columns: dict[str, Any],
    args: EmitTelemetryArgs | EmitGovernanceArgs,
    event_type: str,
    capability: str,
    run: str | None,
) -> LedgerRecord:
    key = args.idempotency_key
    if key.event_type != event_type:
        raise KeyMismatch("event_type", key=key.event_type, expected=event_type)
    payload = args.payload
    if run is not None:
        named = payload.get("run_id", run)
        if named != run:
            raise KeyMismatch("payload.run_id", key=str(named), expected=run)
        payload = {**payload, "run_id": run}
    columns |= {"trace_id": key.trace_id, "event_type": event_type, "capability": capability}
    return _record("telemetry_events", columns, "payload", payload)


def _llm_call(
    columns: dict[str, Any], args: EmitLlmCallArgs, run: str | None, clock: Callable[[], date]
) -> LedgerRecord:
    columns |= {
        "model": args.model,
        "prompt_tokens": args.prompt_tokens,
        "completion_tokens": args.completion_tokens,
        **_cost(args, run, args.model, clock),
    }
    if args.rates is not None:
        columns |= {
            "input_rate_per_1k": str(ledger_amount(args.rates.input_per_1k)),
            "output_rate_per_1k": str(ledger_amount(args.rates.output_per_1k)),
        }
    return _record("llm_calls", columns)


def _connector_call(
    columns: dict[str, Any], args: EmitConnectorCallArgs, run: str | None, clock: Callable[[], date]
) -> LedgerRecord:
    priced = f"{args.connector_id}:{args.capability}"
    columns |= {"connector_id": args.connector_id, "capability": args.capability, **_cost(args, run, priced, clock)}
    return _record("connector_calls", columns, "envelope", args.envelope)


def _cost(
    args: EmitLlmCallArgs | EmitConnectorCallArgs, run: str | None, priced_model: str, clock: Callable[[], date]
) -> dict[str, Any]:
    cost = args.cost_eur
    if isinstance(cost, float):
        cost = Decimal(str(cost))
    columns = {
        "run_id": run,
        "cost_eur": None if cost is None else str(ledger_amount(cost)),
        "cost_status": args.cost_status,
        "pricing_version": args.pricing_version,
    }
    if args.pricing_version != "unavailable":
        columns |= {"priced_model": priced_model, "snapshot_date": clock().isoformat()}
    return columns


def _record(table: str, columns: dict[str, Any], name: str = "", document: Any = None) -> LedgerRecord:
    return _rendered(table, columns, name, "" if document is None else storable_json(document, root=name))


def _rendered(table: str, columns: dict[str, Any], name: str, document: str) -> LedgerRecord:
    """The columns, and the text of one more that is JSON."""
    text = storable_json(columns, root=table)
    if document:
        text = f'{text[:-1]},"{name}":{document}}}'
    if len(text) > _LARGEST:
        raise JsonRefused(name or "model", f"makes an event of {len(text)} characters; {_LARGEST} is the limit")
    return LedgerRecord(table, text, "priced_model" in columns)
