"""One suite for every emitter: with a database or without, one by one or in batches, the outcomes are the same."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from plm_shared import db
from plm_shared.addresses import DatabaseUrls
from plm_shared.async_kernel_emitter import AsyncKernelEmitter
from plm_shared.batching_emitter import BatchingKernelEmitter
from plm_shared.canonical_json import JsonRefused
from plm_shared.idempotency import IdempotencyKey
from plm_shared.kernel_api import (
    EmitConnectorCallArgs,
    EmitGovernanceArgs,
    EmitLlmCallArgs,
    EmitTelemetryArgs,
    KernelEmitter,
)
from plm_shared.ledger import IdempotencyConflict, KeyMismatch, LedgerRefused, UnknownRun, UnknownTenant
from plm_shared.sqlalchemy_kernel_emitter import SqlAlchemyKernelEmitter
from plm_shared.testing.memory import InMemoryKernelEmitter

KINDS = ("telemetry", "governance", "llm", "connector")
METHODS = {
    "telemetry": "emit_telemetry",
    "governance": "emit_governance",
    "llm": "record_llm_call",
    "connector": "record_connector_call",
}
SOAK = float(os.environ.get("SOAK", "0.05"))
EMITTERS = ("memory", "sqlalchemy", "batching", "async")


def event(tenant: str, kind: str, content: int, *, span: str = "s1", trace: str = "t1") -> Any:
    key = IdempotencyKey(tenant, trace, span, "e1", str(content))
    match kind:
        case "telemetry":
            return EmitTelemetryArgs(
                event_type="e1", span_id=span, capability="read", payload={"c": content}, idempotency_key=key
            )
        case "governance":
            return EmitGovernanceArgs(
                governance_event_type="e1", span_id=span, payload={"c": content}, idempotency_key=key
            )
        case "llm":
            return EmitLlmCallArgs(
                span_id=span,
                model="m",
                prompt_tokens=content,
                completion_tokens=0,
                pricing_version="overrides-static",
                cost_eur=1,
                cost_status="calculated",
                idempotency_key=key,
            )
    return EmitConnectorCallArgs(
        span_id=span,
        connector_id="c",
        capability="read",
        envelope={"c": content},
        pricing_version="unavailable",
        cost_status="unavailable",
        idempotency_key=key,
    )


class Blocking:
    """The coroutines' emitter with the face of the others, for this suite only."""

    def __init__(self, tenant: str, **options: Any) -> None:
        self._emitter = AsyncKernelEmitter(tenant, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._emitter, name)
        return lambda *args, **options: asyncio.run(method(*args, **options))


@pytest.fixture(params=EMITTERS)
def make(
    request: pytest.FixtureRequest,
    kernel_database: DatabaseUrls,
    two_tenants: tuple[uuid.UUID, uuid.UUID],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Any]]:
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    db.reset_engine()
    opened: list[Any] = []

    def factory(tenant: str) -> Any:
        match request.param:
            case "memory":
                return InMemoryKernelEmitter(tenant, tenants=two_tenants, runs=())
            case "sqlalchemy":
                return SqlAlchemyKernelEmitter(tenant)
        opened.append(BatchingKernelEmitter(tenant) if request.param == "batching" else Blocking(tenant))
        return opened[-1]

    yield factory
    for emitter in opened:
        emitter.close(10)
    db.reset_engine()


@pytest.fixture
def tenant(two_tenants: tuple[uuid.UUID, uuid.UUID]) -> str:
    return str(two_tenants[0])


@pytest.mark.parametrize("kind", KINDS)
def test_new_is_written_same_is_silent_and_other_content_is_a_conflict(
    make: Callable[[str], Any], tenant: str, kind: str
) -> None:
    emit = getattr(make(tenant), METHODS[kind])
    assert emit(event(tenant, kind, 1)) is None
    assert emit(event(tenant, kind, 1)) is None
    with pytest.raises(IdempotencyConflict) as caught:
        emit(event(tenant, kind, 2))
    assert caught.value.idempotency_key == event(tenant, kind, 2).idempotency_key.as_db_key()
    assert emit(event(tenant, kind, 1)) is None


def test_a_call_of_the_same_span_in_another_trace_is_a_conflict(make: Callable[[str], Any], tenant: str) -> None:
    emitter = make(tenant)
    for kind in ("llm", "connector"):
        emit = getattr(emitter, METHODS[kind])
        emit(event(tenant, kind, 1))
        with pytest.raises(IdempotencyConflict):
            emit(event(tenant, kind, 1, trace="t2"))
    emitter.emit_telemetry(event(tenant, "telemetry", 1))
    emitter.emit_telemetry(event(tenant, "telemetry", 1, trace="t2"))


def test_bad_events_are_refused_with_the_same_errors(make: Callable[[str], Any], tenant: str) -> None:
    emitter = make(tenant)
    good = event(tenant, "telemetry", 1)
    with pytest.raises(KeyMismatch):
        emitter.emit_telemetry(good.model_copy(update={"event_type": "other"}))
    with pytest.raises(KeyMismatch):
        emitter.emit_telemetry(event(str(uuid.uuid4()), "telemetry", 1))
    with pytest.raises(JsonRefused):
        emitter.emit_telemetry(good.model_copy(update={"payload": {"x": {1, 2}}}))
    with pytest.raises(UnknownRun):
        emitter.record_llm_call(event(tenant, "llm", 1), run_id=uuid.uuid4())
    with pytest.raises(ValueError, match="badly formed"):
        emitter.record_llm_call(event(tenant, "llm", 1), run_id="no-uuid")
    emitter.emit_telemetry(good)


def test_an_unknown_tenant_is_a_typed_error(make: Callable[[str], Any]) -> None:
    stranger = str(uuid.uuid4())
    with pytest.raises(UnknownTenant):
        make(stranger).emit_telemetry(event(stranger, "telemetry", 1))


def test_the_memory_emitter_is_a_kernel_emitter_and_shows_what_it_wrote(tenant: str) -> None:
    emitter = InMemoryKernelEmitter(tenant)
    typed: KernelEmitter = emitter
    typed.emit_governance(event(tenant, "governance", 5))
    (row,) = emitter.rows
    assert (row["table"], row["capability"], row["payload"]) == ("telemetry_events", "governance", {"c": 5})


Drawn = tuple[str, int, str, str]
EVENTS = st.tuples(
    st.sampled_from(KINDS), st.integers(0, 2), st.sampled_from(["s1", "s2"]), st.sampled_from(["t1", "t2"])
)


def outcome_of(emit: Callable[[Any], None], args: Any) -> str:
    try:
        emit(args)
    except LedgerRefused as refusal:
        return type(refusal).__name__
    return "ok"


def test_any_sequence_has_the_outcomes_of_a_dictionary(make: Callable[[str], Any], tenant: str) -> None:
    emitter = make(tenant)

    class Sequences(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.prefix = uuid.uuid4().hex
            self.oracle: dict[tuple[str, ...], tuple[Any, ...]] = {}

        @rule(drawn=EVENTS)
        def emit(self, drawn: Drawn) -> None:
            kind, content, span, trace = drawn
            args = event(tenant, kind, content, span=self.prefix + span, trace=trace)
            table = "events" if kind in ("telemetry", "governance") else kind
            identity = (table, span) if table != "events" else (table, trace, span)
            expected = self.oracle.setdefault(identity, (content, trace)) == (content, trace)
            found = outcome_of(getattr(emitter, METHODS[kind]), args)
            assert found == ("ok" if expected else "IdempotencyConflict")

    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


WRITER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
from test_emitter_suite import METHODS, event, outcome_of, opened_emitter
tenant = sys.argv[2]
emitter = opened_emitter(sys.argv[3], tenant)
def write(drawn):
    kind, content, span, trace = drawn
    return outcome_of(getattr(emitter, METHODS[kind]), event(tenant, kind, content, span=span, trace=trace))
with ThreadPoolExecutor(8) as pool:
    for line in sys.stdin:
        print(json.dumps(list(pool.map(write, json.loads(line)))), flush=True)
"""


def opened_emitter(which: str, tenant: str) -> Any:
    match which:
        case "batching":
            return BatchingKernelEmitter(tenant, most=7)
        case "connection":
            return OnCallersConnection(tenant)
    return SqlAlchemyKernelEmitter(tenant)


def written(database: DatabaseUrls) -> dict[tuple[str, ...], str]:
    """Per logical identity the key that won."""
    with psycopg.connect(database.admin) as connection:
        rows = connection.execute(
            "SELECT 'events', trace_id || '/' || span_id || '/' || event_type, idempotency_key FROM telemetry_events"
            " UNION ALL SELECT 'llm', span_id, idempotency_key FROM llm_calls"
            " UNION ALL SELECT 'connector', span_id, idempotency_key FROM connector_calls"
        ).fetchall()
    assert len(rows) == len({row[:2] for row in rows})
    return {(table, identity): key for table, identity, key in rows}


class Writers:
    """Processes of eight threads each, which write what they are given at the same time."""

    def __init__(self, tenant: str, which: tuple[str, ...]) -> None:
        words = [sys.executable, "-c", WRITER, str(Path(__file__).parent), tenant]
        self._processes = [
            subprocess.Popen([*words, each], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for each in which
        ]

    def write(self, drawn: list[list[Drawn]]) -> list[list[str]]:
        for process, events in zip(self._processes, drawn, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(events) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self._processes if process.stdout is not None]

    def close(self) -> None:
        for process in self._processes:
            process.communicate()
            assert process.returncode == 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", [("sqlalchemy", "sqlalchemy"), ("batching", "batching"), ("batching", "sqlalchemy")])
def test_two_processes_and_sixteen_threads_with_overlapping_keys_agree_with_some_serial_order(
    kernel_database: DatabaseUrls, tenant: str, monkeypatch: pytest.MonkeyPatch, which: tuple[str, str]
) -> None:
    """In every serial order the first of an identity wins for good, its replays are silent and all others conflict."""
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    writers = Writers(tenant, which)

    class Overlaps(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.prefix = uuid.uuid4().hex
            self.won: dict[tuple[str, ...], str] = {}

        @rule(drawn=st.lists(st.lists(EVENTS, max_size=40), min_size=2, max_size=2))
        def write_at_once(self, drawn: list[list[Drawn]]) -> None:
            sent = [
                [(kind, content, self.prefix + span, trace) for kind, content, span, trace in events]
                for events in drawn
            ]
            outcomes = writers.write(sent)
            winners = {key: won for key, won in written(kernel_database).items() if self.prefix in key[1]}
            assert winners.items() >= self.won.items()
            asked = set()
            for events, said in zip(sent, outcomes, strict=True):
                for (kind, content, span, trace), outcome in zip(events, said, strict=True):
                    key = event(tenant, kind, content, span=span, trace=trace).idempotency_key.as_db_key()
                    table = "events" if kind in ("telemetry", "governance") else kind
                    identity = (table, f"{trace}/{span}/e1" if table == "events" else span)
                    asked.add((identity, key))
                    assert outcome == ("ok" if winners[identity] == key else "IdempotencyConflict")
            assert winners.items() - self.won.items() <= asked
            self.won = winners

    try:
        run_state_machine_as_test(
            Overlaps,
            settings=settings(
                max_examples=max(4, int(80 * SOAK)),
                stateful_step_count=6,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        writers.close()


UNIQUE_INDEXES = """
    SELECT format('REINDEX INDEX CONCURRENTLY %I', i.indexrelid::regclass::text) FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indrelid
    WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE 'alembic%'
    ORDER BY 1
"""


class OnCallersConnection:
    """The emitter in a transaction of the caller's, one for each call."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    def __getattr__(self, name: str) -> Any:
        def emit(args: Any) -> None:
            with psycopg.connect(os.environ["PG_DSN"]) as connection:
                getattr(SqlAlchemyKernelEmitter(self._tenant, connection=connection), name)(args)

        return emit


@pytest.mark.every_postgres
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["sqlalchemy", "batching", "connection"])
def test_rebuilding_every_unique_index_meanwhile_changes_no_outcome(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    tenant = str(two_tenants[0])
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    db.reset_engine()
    emitter = opened_emitter(which, tenant)
    rebuilt = threading.Event()
    problems: list[object] = []

    def emit(place: int) -> int:
        number = 0
        while not rebuilt.is_set():
            number += 1
            for kind in KINDS:
                span = f"{place}-{kind}-{number}"
                for content, expected in ((1, "ok"), (1, "ok"), (2, "IdempotencyConflict")):
                    args = event(tenant, kind, content, span=span)
                    found = outcome_of(getattr(emitter, METHODS[kind]), args)
                    if found != expected:
                        problems.append((span, content, found))
        return number

    with ThreadPoolExecutor(4) as pool, psycopg.connect(kernel_database.owner, autocommit=True) as connection:
        counts = [pool.submit(emit, place) for place in range(4)]
        try:
            for _ in range(max(2, int(40 * SOAK))):
                for (statement,) in connection.execute(UNIQUE_INDEXES.encode()).fetchall():
                    connection.execute(statement.encode())
        finally:
            rebuilt.set()
        total = sum(count.result() for count in counts)
    if which == "batching":
        emitter.close()
    db.reset_engine()
    assert problems == []
    assert len(written(kernel_database)) == 4 * total
