"""The rows of a call are those that the emitters' arguments make, and what those refuse is refused."""

from __future__ import annotations

import json
import uuid
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_shared.canonical_json import JsonRefused
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitTelemetryArgs
from plm_shared.ledger import LedgerRecord, call_records, ledger_record

TODAY = date(2024, 2, 29)
TENANT, RUN = uuid.UUID(int=1), uuid.UUID(int=2)

texts = st.one_of(st.text(max_size=6), st.sampled_from(["a.b", "", "\0", "\ud800", "a:b", "é" * 1200, "x" * 1999]))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
facts = st.dictionaries(st.text(max_size=4), st.one_of(leaves, st.lists(leaves, max_size=3)), max_size=4)
costs = st.one_of(
    st.none(),
    st.decimals(min_value=-1, max_value=2 * 10**10, places=8).map(str),
    st.sampled_from(
        ["NaN", "Infinity", "1e9", "0", "9999999999.999999995", "0.000000001", "-0.000000001", "-0", "1E+5", "much"]
    ),
)
calls = st.fixed_dictionaries(
    {
        "trace_id": texts,
        "span_id": texts,
        "event_type": texts,
        "connector_id": texts,
        "capability": texts,
        "facts": facts,
        "cost_eur": costs,
    }
)


def by_the_models(call: dict[str, Any]) -> tuple[LedgerRecord, LedgerRecord]:
    document = {**call["facts"], "run_id": str(RUN)}
    cost = None if call["cost_eur"] is None else Decimal(call["cost_eur"])
    content = compute_content_hash({**document, "cost_eur": call["cost_eur"]})

    def key(event_type: str) -> IdempotencyKey:
        return IdempotencyKey(str(TENANT), call["trace_id"], call["span_id"], event_type, content)

    telemetry = EmitTelemetryArgs(
        event_type=call["event_type"],
        span_id=call["span_id"],
        capability=call["capability"],
        payload=document,
        idempotency_key=key(call["event_type"]),
    )
    connector = EmitConnectorCallArgs(
        span_id=call["span_id"],
        connector_id=call["connector_id"],
        capability=call["capability"],
        envelope=document,
        pricing_version="unavailable" if cost is None else "overrides-static",
        cost_eur=cost,
        cost_status="unavailable" if cost is None else "calculated",
        idempotency_key=key("connector_call"),
    )
    made = [ledger_record(each, tenant_id=TENANT, run_id=RUN, clock=lambda: TODAY) for each in (telemetry, connector)]
    return made[0], made[1]


def made_or_refused(make: Any) -> Any:
    try:
        records = make()
    except (ValueError, ArithmeticError):
        return "refused"
    return [(record.table, json.loads(record.text), record.priced) for record in records]


@given(calls)
def test_they_are_the_rows_that_the_models_make_and_refused_where_those_are(call: dict[str, Any]) -> None:
    made = made_or_refused(lambda: call_records(tenant_id=TENANT, run_id=RUN, **call, clock=lambda: TODAY))
    assert made == made_or_refused(lambda: by_the_models(call))


CALL: dict[str, Any] = {
    "trace_id": "t",
    "span_id": "s",
    "event_type": "capability_call",
    "connector_id": "reader",
    "capability": "bom.read",
    "facts": {"step": 1},
    "cost_eur": "0.5",
}


def test_a_plain_call_is_the_same_in_both() -> None:
    rows = made_or_refused(lambda: call_records(tenant_id=TENANT, run_id=RUN, **CALL, clock=lambda: TODAY))
    assert rows == made_or_refused(lambda: by_the_models(CALL))
    assert [row[0] for row in rows] == ["telemetry_events", "connector_calls"]


@pytest.mark.parametrize("cost", ["-1", "-0.000000001", "NaN", "sNaN", "Infinity", "9999999999.999999995", "much", ""])
def test_what_is_no_cost_is_refused(cost: str) -> None:
    with pytest.raises(ValueError, match="cost_eur"):
        call_records(tenant_id=TENANT, run_id=RUN, **{**CALL, "cost_eur": cost})


def test_facts_that_cannot_be_stored_are_named() -> None:
    with pytest.raises(JsonRefused, match=r"payload\.layers\[0\]: contains U\+0000"):
        call_records(tenant_id=TENANT, run_id=RUN, **{**CALL, "facts": {"layers": ["a\0"]}})
