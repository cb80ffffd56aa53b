"""The way in: identity, tenant, health, artifacts, and that nothing a client sends is our failure."""

from __future__ import annotations

import json
import socket
import uuid
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONGEST_HEAD = 64 * 1024


def test_health_needs_no_token(platform: Any) -> None:
    anyone = platform.anonymous()
    assert anyone.get("/v1/health/live").json() == {"status": "alive", "checks": {}}
    assert anyone.get("/v1/health/ready").json() == {
        "status": "ready",
        "checks": {"database": "ok", "policy": "ok"},
    }


def test_the_caller_header_may_repeat_the_token_s_tenant(platform: Any) -> None:
    assert platform.client().get("/v1/runs", headers={"X-Core-Caller": str(platform.tenant)}).status_code == 200


def test_a_caller_s_trace_is_continued(client: Any) -> None:
    trace = uuid.uuid4().hex
    answer = client.post("/v1/runs", json={"agent": "echo"}, headers={"traceparent": f"00-{trace}-{'1' * 16}-01"})
    assert answer.json()["trace_id"] == trace


def test_pages_of_other_sites_are_not_let_in(platform: Any, launch: Any) -> None:
    def allowed(server: Any, origin: str) -> str | None:
        answer = server.client().get("/v1/runs", headers={"Origin": origin})
        found: str | None = answer.headers.get("access-control-allow-origin")
        return found

    assert allowed(platform, "https://console.example") is None
    with launch(like=platform, PLM_CORS_ALLOWED_ORIGINS="https://console.example") as server:
        assert allowed(server, "https://console.example") == "https://console.example"
        assert allowed(server, "https://evil.example") is None


def test_a_preflight_from_a_page_of_another_site_is_refused(platform: Any) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = platform.anonymous().options("/v1/runs", headers=asked)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "text/plain; charset=utf-8")
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("line", [b"a" * 1000, b"a\r\nX-Next: "], ids=["in one header", "in many"])
def test_a_head_without_an_end_is_refused_and_not_kept(platform: Any, line: bytes) -> None:
    url = httpx.URL(platform.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection, connection.makefile("rb") as answer:
        connection.sendall(b"GET /v1/runs HTTP/1.1\r\nHost: plm\r\nX-First: ")
        sent = 0
        with suppress(ConnectionError):  # once it is refused, nobody listens any more
            while sent < 100 * LONGEST_HEAD:
                connection.sendall(line * (4096 // len(line)))
                sent += 4096
            pytest.fail("nobody minds")
        with suppress(ConnectionError):
            assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"
    assert platform.anonymous().get("/v1/health/live").status_code == 200


def test_an_artifact_is_its_bytes_and_never_runs_in_a_browser(platform: Any, client: Any) -> None:
    script = "<script>alert(document.cookie)</script>ü"
    run = client.run("make-file", name="page.html", mime_type="text/html", text=script)
    reference = client.finished(run["run_id"])["result"]["file"]
    path = f"/v1/artifacts/{reference['$artifact']}"
    answer = client.get(path)
    assert answer.content == script.encode()
    assert reference["size_bytes"] == len(answer.content)
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert platform.client(tenant=platform.other_tenant).get(path).status_code == 404


junk_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
keys = st.sampled_from(["agent", "inputs", "files", "budget", "decision", "comment", "scope", "scope_id", "reason"])
agents = st.sampled_from(["echo", "read-file", "nobody"])
bodies = junk_values | st.dictionaries(keys, junk_values) | st.fixed_dictionaries(
    {"agent": agents},
    optional={
        "inputs": st.dictionaries(st.sampled_from(["value", "table", "list", "ratio"]) | st.text(), junk_values),
        "files": st.dictionaries(
            st.just("file"),
            st.fixed_dictionaries(
                {"name": st.text(max_size=20)},
                optional={"text": st.text(), "base64": st.text(), "mime_type": st.text(max_size=20)},
            ),
        ),
        "budget": st.dictionaries(st.sampled_from(["EUR", "calls"]), junk_values),
    },
)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/runs", "/v1/halts", "/v1/approvals/{}/decision"]), body=bodies)
def test_no_body_is_answered_with_a_failure_of_ours(client: Any, path: str, body: Any) -> None:
    target = path.format(uuid.uuid4())
    answer = client.post(target, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text


latin = st.text(alphabet=st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["Idempotency-Key", "Last-Event-ID", "X-Core-Caller", "traceparent"]),
    value=latin.map(str.strip),
)
def test_no_header_is_answered_with_a_failure_of_ours(client: Any, name: str, value: str) -> None:
    headers = {name: value.encode("latin-1")}
    assert client.post("/v1/runs", json={"agent": "nobody"}, headers=headers).status_code < 500
    assert client.get(f"/v1/runs/{uuid.uuid4()}/events", headers=headers).status_code < 500


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cursor=st.text(max_size=50) | st.binary(max_size=60).map(lambda raw: raw.hex()), state=st.text(max_size=10))
def test_no_query_is_answered_with_a_failure_of_ours(client: Any, cursor: str, state: str) -> None:
    parameters = {"cursor": cursor.encode("utf-8", "replace").decode(), "state": state.encode("utf-8", "replace")}
    assert client.get("/v1/runs", params=parameters).status_code < 500


@pytest.mark.parametrize(
    "position",
    [["0001-01-01T00:00:00+23:59", 0], ["9999-12-31T23:59:59-23:59", 0], ["2026-01-01", 0], [[], {}], {"a": 1, "b": 2}],
)
def test_a_cursor_that_somebody_made_up_is_no_failure_of_ours(client: Any, position: Any) -> None:
    import base64

    if isinstance(position, list) and position[1] == 0:
        position = [position[0], str(uuid.uuid4())]
    cursor = base64.urlsafe_b64encode(json.dumps(position).encode()).decode()
    assert client.get("/v1/runs", params={"cursor": cursor}).status_code in (200, 422)
