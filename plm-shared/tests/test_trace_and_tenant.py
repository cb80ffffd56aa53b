"""Trace contexts, the traceparent header, and the middleware that binds a request to a tenant."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from plm_shared.middleware import (
    CORE_CALLER_HEADER,
    InvalidCoreCallerError,
    PlmTenantMiddleware,
    cors_allowed_headers,
    parse_core_caller,
)
from plm_shared.trace_context import (
    TraceContext,
    child_span,
    current_context,
    new_root_context,
    reset_context,
    set_context,
)
from plm_shared.traceparent import (
    generate_traceparent,
    get_traceparent,
    is_valid_traceparent,
    parse_or_generate_traceparent,
    traceparent_extra_headers,
)

TRACE, SPAN = "ab" * 16, "cd" * 8
HEADER = f"00-{TRACE}-{SPAN}-01"
MINE, THEIRS = uuid.uuid4(), uuid.uuid4()


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (HEADER, True),
        (HEADER.upper(), True),
        (f"cc-{TRACE}-{SPAN}-00-more", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE[:-1]}-{SPAN}-01", False),
        ("", False),
    ],
)
def test_a_traceparent_is_judged_as_w3c_says(text: str, valid: bool) -> None:
    assert is_valid_traceparent(text) == valid
    kept = parse_or_generate_traceparent(text)
    assert is_valid_traceparent(kept)
    assert (kept == text.lower()) == valid


def test_a_generated_traceparent_carries_the_sampling_flag() -> None:
    assert generate_traceparent().endswith("-01")
    assert generate_traceparent(sampled=False).endswith("-00")


def test_contexts_nest_and_carry_their_header() -> None:
    assert current_context() is None
    outer, inner = new_root_context(tenant_id="t"), TraceContext("t", TRACE, SPAN)
    first = set_context(outer)
    assert traceparent_extra_headers() == {"traceparent": f"00-{outer.trace_id}-{outer.span_id}-01"}
    second = set_context(inner)
    assert get_traceparent() == HEADER
    reset_context(second)
    assert current_context() is outer
    assert get_traceparent() == f"00-{outer.trace_id}-{outer.span_id}-01"
    reset_context(first)
    assert (current_context(), get_traceparent(), traceparent_extra_headers()) == (None, None, {})


@pytest.mark.parametrize(
    ("trace", "span"), [("short", "s"), ("z" * 32, SPAN), ("0" * 32, SPAN), (TRACE, "0" * 16), (TRACE, "-" * 16)]
)
def test_ids_that_w3c_does_not_know_write_no_header(trace: str, span: str) -> None:
    handle = set_context(TraceContext("t", trace, span))
    assert get_traceparent() is None
    reset_context(handle)


def test_a_header_is_written_in_lower_case() -> None:
    handle = set_context(TraceContext("t", TRACE.upper(), SPAN.upper()))
    assert get_traceparent() == HEADER
    reset_context(handle)


def test_a_child_span_hangs_below_its_parent_and_is_not_bound() -> None:
    parent = new_root_context(tenant_id="t")
    child = child_span(parent=parent)
    assert (child.tenant_id, child.trace_id, child.parent_span_id) == ("t", parent.trace_id, parent.span_id)
    assert len(child.span_id) == 16
    assert current_context() is None
    with pytest.raises(LookupError, match="parent="):
        child_span()


async def ask(
    *headers: tuple[bytes, bytes], identity: uuid.UUID | None = None, path: str = "/v1/runs", kind: str = "http"
) -> tuple[int, Any, TraceContext | None]:
    """Send one request through the middleware; the status, the refusal's body, the context the app saw."""
    seen: list[TraceContext | None] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_context())

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = PlmTenantMiddleware(app, identity_tenant=lambda: identity)
    await middleware({"type": kind, "path": path, "headers": list(headers)}, receive, send)
    assert current_context() is None
    if sent:
        return sent[0]["status"], json.loads(sent[1]["body"]), None
    return 200, None, seen[0]


def caller(tenant: object) -> tuple[bytes, bytes]:
    return (b"x-core-caller", str(tenant).encode())


@pytest.mark.parametrize(
    ("headers", "identity", "status", "answer"),
    [
        ([], None, 400, "MISSING_CORE_CALLER"),
        ([caller(" ")], None, 400, "MISSING_CORE_CALLER"),
        ([caller("me")], None, 400, "INVALID_CORE_CALLER"),
        ([caller("me")], MINE, 400, "INVALID_CORE_CALLER"),
        ([caller(MINE), caller(THEIRS)], None, 400, "INVALID_CORE_CALLER"),
        ([caller(MINE)], None, 200, MINE),
        ([], MINE, 200, MINE),
        ([caller(MINE)], MINE, 200, MINE),
        ([caller(THEIRS)], MINE, 403, "CORE_CALLER_MISMATCH"),
    ],
)
async def test_the_tenant_follows_from_identity_and_header(
    headers: list[tuple[bytes, bytes]], identity: uuid.UUID | None, status: int, answer: Any
) -> None:
    got, body, context = await ask(*headers, identity=identity)
    assert got == status
    if context is None:
        assert (body["code"], body["status"]) == (answer, status)
        assert "; " in body["detail"], "it says what to do"
        assert body["message"] == body["detail"], "the older name"
    else:
        assert context.tenant_id == str(answer)


async def test_an_inbound_trace_is_continued_and_a_bad_one_replaced() -> None:
    _, _, context = await ask(caller(MINE), (b"traceparent", HEADER.encode()))
    assert context is not None
    assert (context.trace_id, context.parent_span_id) == (TRACE, SPAN)
    assert context.span_id != SPAN
    for bad in ([(b"traceparent", b"nonsense")], [(b"traceparent", HEADER.encode())] * 2):
        _, _, context = await ask(caller(MINE), *bad)
        assert context is not None
        assert context.parent_span_id is None
        assert context.trace_id != TRACE


@pytest.mark.parametrize("path", ["/v1/health", "/v1/health/live", "/v1/health/ready"])
async def test_health_needs_no_tenant(path: str) -> None:
    assert (await ask(path=path))[0] == 200


async def test_what_is_no_http_passes_through() -> None:
    assert (await ask(kind="lifespan"))[0] == 200


def test_a_caller_is_parsed_leniently_but_must_be_a_uuid() -> None:
    assert parse_core_caller(f" {{{MINE}}} ") == MINE
    for bad in (None, "", "x"):
        with pytest.raises(InvalidCoreCallerError, match=CORE_CALLER_HEADER):
            parse_core_caller(bad)


def test_cors_headers_appear_once_in_order() -> None:
    assert cors_allowed_headers(["authorization", "Idempotency-Key", "IDEMPOTENCY-KEY"]) == [
        "Authorization",
        "Content-Type",
        "X-Core-Caller",
        "Idempotency-Key",
    ]


@pytest.mark.parametrize("extension", [True, False])
async def test_a_websocket_is_held_to_the_same_rules_before_its_handshake(extension: bool) -> None:
    seen: list[TraceContext | None] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_context())

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = PlmTenantMiddleware(app, identity_tenant=lambda: MINE)
    extensions = {"websocket.http.response": {}} if extension else None
    scope = {"type": "websocket", "path": "/v1/live", "headers": [], "extensions": extensions}
    await middleware(scope, receive, send)
    assert [context and context.tenant_id for context in seen] == [str(MINE)]
    await middleware({**scope, "headers": [caller(THEIRS)]}, receive, send)
    assert len(seen) == 1
    if extension:
        assert [message["type"] for message in sent] == [
            "websocket.http.response.start",
            "websocket.http.response.body",
        ]
        assert sent[0]["status"] == 403
        assert json.loads(sent[1]["body"])["code"] == "CORE_CALLER_MISMATCH"
    else:
        assert sent == [{"type": "websocket.close", "code": 1008, "reason": "CORE_CALLER_MISMATCH"}]
