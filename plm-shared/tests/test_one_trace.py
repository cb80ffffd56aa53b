"""One trace id, from the header that came in to the last row of the ledger and back out."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import psycopg
import pytest
from plm_shared import db
from plm_shared.addresses import DatabaseUrls
from plm_shared.async_kernel_emitter import AsyncKernelEmitter
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.middleware import PlmTenantMiddleware
from plm_shared.sqlalchemy_kernel_emitter import SqlAlchemyKernelEmitter
from plm_shared.trace_context import TraceContext, child_span, current_context
from plm_shared.traceparent import parse_traceparent, traceparent_extra_headers

TRACE, CALLER = uuid.uuid4().hex, "1" * 16


@pytest.fixture
def neighbour() -> Iterator[tuple[str, list[str]]]:
    """A server next door, and the traceparent headers that it was sent."""
    heard: list[str] = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers["traceparent"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Listening) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", heard
        server.shutdown()
        thread.join()


def keyed(event_type: str, content: Any) -> tuple[TraceContext, IdempotencyKey]:
    """A span of its own below the request's, and the key of what happens in it."""
    span = child_span()
    return span, IdempotencyKey(span.tenant_id, span.trace_id, span.span_id, event_type, compute_content_hash(content))


def events(run: uuid.UUID) -> list[Any]:
    """One of each kind, as a handler makes them from nothing but the bound context."""
    found: list[Any] = []
    span, key = keyed("knowledge_call", {"run_id": str(run)})
    found.append(
        EmitTelemetryArgs(event_type="knowledge_call", span_id=span.span_id, capability="read", idempotency_key=key)
    )
    span, key = keyed("hitl_resolved", {})
    found.append(EmitGovernanceArgs(governance_event_type="hitl_resolved", span_id=span.span_id, idempotency_key=key))
    priced = {"pricing_version": "overrides-static", "cost_eur": "0.5", "cost_status": "calculated"}
    span, key = keyed("llm_call", priced)
    call = {"span_id": span.span_id, "idempotency_key": key, **priced}
    found.append(EmitLlmCallArgs.model_validate({**call, "model": "m", "prompt_tokens": 1, "completion_tokens": 1}))
    span, key = keyed("connector_call", priced)
    call = {"span_id": span.span_id, "idempotency_key": key, **priced}
    found.append(EmitConnectorCallArgs.model_validate({**call, "connector_id": "c", "capability": "read"}))
    return found


async def test_one_trace_from_the_inbound_header_to_the_last_row_and_back_out(
    kernel_database: DatabaseUrls,
    two_tenants: tuple[uuid.UUID, uuid.UUID],
    neighbour: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    db.reset_engine()
    tenant, run = two_tenants[0], uuid.uuid4()
    with psycopg.connect(kernel_database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(tenant),))
        connection.execute("INSERT INTO runs (id, tenant_id, actor_kind) VALUES (%s, %s, 'agent')", (run, tenant))
    address, heard = neighbour
    bound: list[TraceContext | None] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        bound.append(current_context())
        plain = SqlAlchemyKernelEmitter(tenant)
        telemetry, governance, llm, connector = events(run)
        await asyncio.to_thread(plain.emit_telemetry, telemetry, run_id=run)
        await asyncio.to_thread(plain.record_llm_call, llm, run_id=run)
        async with AsyncKernelEmitter(tenant) as batching:
            await batching.emit_governance(governance, run_id=run)
            await batching.record_connector_call(connector, run_id=run)
        request = urllib.request.Request(address, headers=traceparent_extra_headers())  # noqa: S310 - our own server
        (await asyncio.to_thread(urllib.request.urlopen, request)).close()

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError(message)

    headers = [(b"x-core-caller", str(tenant).encode()), (b"traceparent", f"00-{TRACE}-{CALLER}-01".encode())]
    await PlmTenantMiddleware(handler)({"type": "http", "path": "/v1/runs", "headers": headers}, receive, send)
    db.reset_engine()

    (request_span,) = bound
    assert request_span is not None
    assert (request_span.trace_id, request_span.parent_span_id) == (TRACE, CALLER)
    with psycopg.connect(kernel_database.admin) as connection:
        rows = connection.execute(
            "SELECT idempotency_key, span_id FROM telemetry_events"
            " UNION ALL SELECT idempotency_key, span_id FROM llm_calls"
            " UNION ALL SELECT idempotency_key, span_id FROM connector_calls"
        ).fetchall()
        traces = connection.execute("SELECT DISTINCT trace_id FROM telemetry_events").fetchall()
        (last,) = connection.execute("SELECT last_trace_id FROM mcrc_v1_view WHERE run_id = %s", (run,)).fetchall()
    assert len(rows) == 4
    assert {tuple(key.split(":")[:2]) for key, _ in rows} == {(str(tenant), TRACE)}
    assert len({span for _, span in rows} - {request_span.span_id}) == 4, "each has a span of its own"
    assert (traces, last) == ([(TRACE,)], (TRACE,))
    (out,) = (parse_traceparent(header) for header in heard)
    assert out is not None
    assert (out.trace_id, out.span_id) == (TRACE, request_span.span_id)
