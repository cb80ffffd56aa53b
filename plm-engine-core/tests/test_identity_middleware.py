"""The door, driven as an ASGI server drives it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from opentelemetry.metrics import NoOpMeter
from plm_engine_core.control_plane.identity import (
    AuditRecord,
    AuditTenantUnknown,
    AuditUnavailable,
    Hs256JwtIdentityProvider,
    IdentityContext,
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMetrics,
    IdentityMiddleware,
    InMemoryAuditSink,
    get_current_identity,
    require_identity,
)
from plm_engine_core.control_plane.identity.refusals import Refusals

SECRET = "a-secret-for-tests-of-forty-characters!!"
USER, TENANT = uuid.UUID(int=1), uuid.UUID(int=2)
PROVIDER = Hs256JwtIdentityProvider(active_secret=SECRET)


class FailingSink:
    def __init__(self, error: type[AuditUnavailable | AuditTenantUnknown]) -> None:
        self._error = error

    async def write(self, record: AuditRecord) -> None:
        raise self._error("not written", tenant_id=record.tenant_id)


class Application:
    """Remembers the identities that reached it."""

    def __init__(self) -> None:
        self.seen: list[IdentityContext | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(get_current_identity())
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204, "headers": []})


class Door:
    """One middleware before one application."""

    def __init__(self, audit: Any = None, **options: Any) -> None:
        self.app = Application()
        self.audit = audit or InMemoryAuditSink()
        self.middleware = IdentityMiddleware(self.app, provider=PROVIDER, audit=self.audit, **options)

    async def call(
        self, *authorization: str, path: str = "/v1/runs", kind: str = "http", **scope: Any
    ) -> list[MutableMapping[str, Any]]:
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return {"type": f"{kind}.connect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
        await self.middleware({"type": kind, "path": path, "headers": headers, **scope}, receive, send)
        return sent

    async def status(self, *authorization: str, **scope: Any) -> int:
        return int((await self.call(*authorization, **scope))[0]["status"])


def token(**changes: Any) -> str:
    now = int(time.time())
    claims = {"sub": str(USER), "tenant_id": str(TENANT), "actor_kind": "human", "scopes": ["b", "a"], "iat": now}
    return jwt.encode(claims | {"exp": now + 600} | changes, SECRET, "HS256")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
async def test_a_good_token_binds_the_identity_and_writes_one_record(scheme: str) -> None:
    door = Door()
    assert await door.status(f"{scheme} {token(session_id='s-1')}") == 204
    (identity,) = door.app.seen
    assert identity is not None
    assert (identity.user_id, identity.tenant_id) == (USER, TENANT)
    (record,) = door.audit.records
    assert (record.tenant_id, record.user_id, record.event_type) == (TENANT, USER, "identity.bind")
    assert record.payload == {"provider": "hs256", "scopes": ["a", "b"], "session_id": "s-1", "surface": "http"}
    assert get_current_identity() is None


@pytest.mark.parametrize(
    "authorization", [[], [""], ["Bearer"], ["Bearer "], ["Basic dTpw"], ["BearerX"], ["Token Bearer"]]
)
async def test_without_a_bearer_token_nothing_passes_and_nothing_is_recorded(authorization: list[str]) -> None:
    door = Door()
    start, body = await door.call(*authorization)
    assert start["status"] == 401
    assert json.loads(body["body"])["code"] == "IDENTITY_MISSING"
    assert door.app.seen == []
    assert door.audit.records == []


async def test_a_refusal_is_problem_details_with_the_older_members_beside() -> None:
    start, body = await Door().call()
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"www-authenticate"] == b'Bearer realm="plm"'
    assert int(headers[b"content-length"]) == len(body["body"])
    problem = json.loads(body["body"])
    assert problem["type"] == "urn:plm:problem:identity_missing"
    assert (problem["status"], problem["code"], problem["technical_detail"]) == (401, problem["error_code"], None)
    assert problem["title"]
    assert problem["detail"] == problem["message"]


async def test_two_authorization_headers_are_refused() -> None:
    door = Door()
    assert await door.status(f"Bearer {token()}", f"Bearer {token()}") == 401
    assert door.app.seen == []


async def test_an_expired_token_of_ours_is_recorded_for_its_tenant() -> None:
    door = Door()
    assert await door.status(f"Bearer {token(iat=1_000_000, exp=1_000_600)}") == 401
    (record,) = door.audit.records
    assert (record.tenant_id, record.user_id, record.actor_kind) == (TENANT, None, "system")
    assert record.event_type == "identity.reject"
    facts = {"provider": "hs256", "reason": "expired", "code": "IDENTITY_EXPIRED"}
    assert record.payload == {**facts, "surface": "http"}


async def test_a_forged_token_is_recorded_for_the_installation_and_not_in_the_tenant_it_claims() -> None:
    door = Door()
    forged = jwt.encode(jwt.decode(token(), SECRET, ["HS256"]), "another-secret-of-more-than-32-bytes", "HS256")
    assert await door.status(f"Bearer {forged}") == 401
    assert await door.status(f"Bearer {'x' * 50_000}") == 401
    assert [record.tenant_id for record in door.audit.records] == [None, None]
    assert [record.payload["reason"] for record in door.audit.records] == ["bad_signature", "malformed_token"]
    assert forged not in str(door.audit.records)
    assert door.app.seen == []


async def test_forgers_cannot_fill_the_audit_log_and_are_counted() -> None:
    audit, moment = InMemoryAuditSink(), [0.0]
    anonymous = Refusals(audit, provider="hs256", clock=lambda: moment[0])
    error = IdentityInvalidSignatureError()
    for _ in range(1000):
        await anonymous.record(error, client="192.0.2.1")
    assert len(audit.records) == 60
    moment[0] = 1.0
    await anonymous.record(error, client="192.0.2.2")
    last = audit.records[-1].payload
    assert (len(audit.records), last["omitted"], last["client"]) == (61, 940, "192.0.2.2")


async def test_what_a_proxy_calls_an_address_fills_no_audit_log() -> None:
    door = Door()
    assert await door.status("Bearer nonsense", client=("x" * 60_000, 0)) == 401
    (record,) = door.audit.records
    assert record.payload["client"] == "x" * 64


async def test_an_old_token_cannot_fill_its_tenants_audit_log_nor_hide_what_concerns_others() -> None:
    audit, moment = InMemoryAuditSink(), [0.0]
    refusals = Refusals(audit, provider="hs256", clock=lambda: moment[0])
    for _ in range(1000):
        await refusals.record(IdentityExpiredError(tenant_id=TENANT), client="192.0.2.1")
    assert len(audit.records) == 60
    await refusals.record(IdentityExpiredError(tenant_id=USER), client="192.0.2.1")
    await refusals.record(IdentityInvalidSignatureError(), client="192.0.2.1")
    assert [record.tenant_id for record in audit.records[60:]] == [USER, None]
    moment[0] = 1.0
    await refusals.record(IdentityExpiredError(tenant_id=TENANT), client="192.0.2.1")
    assert (audit.records[-1].tenant_id, audit.records[-1].payload["omitted"]) == (TENANT, 940)


async def test_however_many_tenants_are_named_a_thousand_are_remembered_and_all_that_was_left_out_is_counted() -> None:
    audit, moment = InMemoryAuditSink(), [0.0]
    refusals = Refusals(audit, provider="hs256", clock=lambda: moment[0])
    for _ in range(61):
        await refusals.record(IdentityExpiredError(tenant_id=TENANT), client="")
    for number in range(5_000):
        moment[0] += 1.0
        await refusals.record(IdentityExpiredError(tenant_id=uuid.UUID(int=number + 100)), client="")
    assert len(refusals._allowances) <= 1_000
    await refusals.record(IdentityInvalidSignatureError(), client="")
    assert audit.records[-1].payload["omitted"] == 1


async def test_whoever_is_refused_over_and_over_is_not_forgotten_for_others() -> None:
    audit = InMemoryAuditSink()
    refusals = Refusals(audit, provider="hs256", clock=lambda: 0.0)
    for number in range(3_000):
        await refusals.record(IdentityExpiredError(tenant_id=TENANT), client="")
        await refusals.record(IdentityExpiredError(tenant_id=uuid.UUID(int=number + 100)), client="")
    assert sum(record.tenant_id == TENANT for record in audit.records) == 60


class Nobodys(InMemoryAuditSink):
    """Of an installation without tenants."""

    def __init__(self) -> None:
        super().__init__()
        self.tried = 0

    async def write(self, record: AuditRecord) -> None:
        if record.tenant_id is not None:
            self.tried += 1
            raise AuditTenantUnknown("no such tenant", tenant_id=record.tenant_id)
        await super().write(record)


async def test_refusals_of_a_tenant_that_does_not_exist_keep_the_database_busy_no_more_than_those_of_others() -> None:
    audit, moment = Nobodys(), [0.0]
    refusals = Refusals(audit, provider="hs256", clock=lambda: moment[0])
    for _ in range(1000):
        await refusals.record(IdentityExpiredError(tenant_id=TENANT), client="192.0.2.1")
    assert (audit.tried, len(audit.records)) == (60, 60)
    moment[0] = 1.0
    await refusals.record(IdentityInvalidSignatureError(), client="192.0.2.1")
    assert audit.records[-1].payload["omitted"] == 940


async def test_a_refusal_of_a_tenant_that_does_not_exist_is_recorded_for_the_installation() -> None:
    door = Door(audit=Nobodys())
    assert await door.status(f"Bearer {token(iat=1_000_000, exp=1_000_600)}") == 401
    assert [record.payload["reason"] for record in door.audit.records] == ["expired"]


async def test_a_refusal_that_cannot_be_recorded_is_a_refusal_all_the_same_and_is_counted() -> None:
    class Away(InMemoryAuditSink):
        async def write(self, record: AuditRecord) -> None:
            if not self.records:
                self.records.append(record)
                raise AuditUnavailable("away", tenant_id=None)
            await super().write(record)

    audit = Away()
    door = Door(audit=audit)
    for _ in range(2):
        assert await door.status("Bearer nonsense") == 401
    assert [record.payload["omitted"] for record in audit.records] == [0, 1]


@pytest.mark.parametrize("path", ["/v1/health", "/v1/health/", "/v1/health/live", "/v1/health/ready"])
async def test_health_needs_no_token(path: str) -> None:
    door = Door()
    assert await door.status(path=path) == 204
    assert door.app.seen == [None]


@pytest.mark.parametrize("path", ["/v1/health/../runs", "/v1/healthy", "/v1/health/live/x", "/V1/HEALTH", "/", ""])
async def test_nothing_near_a_health_path_is_exempt(path: str) -> None:
    assert await Door().status(path=path) == 401


async def test_a_websocket_without_a_token_is_answered_401_or_closed_before_it_opens() -> None:
    door = Door()
    start, body = await door.call(kind="websocket", extensions={"websocket.http.response": {}})
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert json.loads(body["body"])["code"] == "IDENTITY_MISSING"
    (close,) = await door.call(kind="websocket")
    assert (close["type"], close["code"]) == ("websocket.close", 1008)
    (close,) = await door.call(kind="websocket", path="/v1/health")
    assert close["type"] == "websocket.close"
    assert door.app.seen == []


async def test_a_websocket_with_a_token_carries_its_identity() -> None:
    door = Door()
    await door.call(f"Bearer {token()}", kind="websocket")
    assert [identity and identity.user_id for identity in door.app.seen] == [USER]
    assert [record.payload["surface"] for record in door.audit.records] == ["websocket"]


async def test_lifespan_passes_through() -> None:
    door = Door()
    await door.call(kind="lifespan")
    assert door.app.seen == [None]


async def test_without_an_audit_record_nobody_acts(caplog: pytest.LogCaptureFixture) -> None:
    door = Door(FailingSink(AuditUnavailable))
    start, body = await door.call(f"Bearer {token()}")
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    document = json.loads(body["body"])
    assert (document["code"], document["retry_after_ms"]) == ("AUDIT_UNAVAILABLE", 1000)
    assert door.app.seen == []
    assert "not in the audit log" in caplog.text


async def test_where_the_audit_is_not_required_a_failed_write_is_logged_and_the_request_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    door = Door(FailingSink(AuditUnavailable), audit_required=False)
    assert await door.status(f"Bearer {token()}") == 204
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_refused_token_stays_refused_when_its_record_cannot_be_written() -> None:
    door = Door(FailingSink(AuditUnavailable))
    assert await door.status(f"Bearer {token(iat=1_000_000, exp=1_000_600)}") == 401


async def test_a_token_for_a_tenant_that_does_not_exist_is_refused_even_without_required_audit() -> None:
    door = Door(FailingSink(AuditTenantUnknown), audit_required=False)
    assert await door.status(f"Bearer {token()}") == 401
    assert door.app.seen == []


async def test_the_binding_ends_when_the_application_raises() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        require_identity()
        raise ZeroDivisionError

    door = Door()
    door.middleware = IdentityMiddleware(broken, provider=PROVIDER, audit=door.audit)
    with pytest.raises(ZeroDivisionError):
        await door.call(f"Bearer {token()}")
    assert get_current_identity() is None


async def test_a_websocket_is_closed_when_its_token_expires() -> None:
    heard: list[Any] = []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "websocket.disconnect":
            heard.append(message["type"])
        await send({"type": "websocket.send", "text": "too late"})
        heard.append(message)

    door = Door()
    door.middleware = IdentityMiddleware(listening, provider=PROVIDER, audit=door.audit)
    messages = iter(["websocket.connect", "websocket.receive"])
    sent: list[Any] = []

    async def receive() -> Any:
        kind = next(messages, None)
        if kind is None:
            await asyncio.Event().wait()
        return {"type": kind}

    async def send(message: Any) -> None:
        sent.append(message)

    now = int(time.time())
    bearer = f"Bearer {token(iat=now, exp=now + 3)}".encode()
    await door.middleware(
        {"type": "websocket", "path": "/v1/x", "headers": [(b"authorization", bearer)]}, receive, send
    )
    assert (heard[-1]["type"], heard[-1]["code"]) == ("websocket.disconnect", 4401)
    assert [(message["type"], message.get("code")) for message in sent] == [("websocket.close", 4401)]


class Meter(NoOpMeter):
    """Remembers what was counted, by instrument."""

    def __init__(self) -> None:
        super().__init__("test")
        self.seen: list[tuple[str, float, dict[str, Any]]] = []

    def _instrument(self, name: str) -> Any:
        def note(amount: float, attributes: Any = None, **_: Any) -> None:
            self.seen.append((name, amount, attributes))

        return SimpleNamespace(add=note, record=note)

    def create_counter(self, name: str, *_: Any, **__: Any) -> Any:
        return self._instrument(name)

    def create_histogram(self, name: str, *_: Any, **__: Any) -> Any:
        return self._instrument(name)


async def test_every_attempt_is_counted_by_its_outcome_and_every_token_timed() -> None:
    meter = Meter()
    door = Door(metrics=IdentityMetrics("hs256", meter=meter))
    forged = jwt.encode({"sub": "x"}, "another-secret-of-more-than-32-bytes", "HS256")
    expired = token(iat=1_000_000, exp=1_000_600)
    for authorization in ([f"Bearer {token()}"], [], [f"Bearer {expired}"], [f"Bearer {forged}"], ["Bearer x"]):
        await door.call(*authorization)
    counted = [labels for name, amount, labels in meter.seen if name == "identity_bind_total" and amount == 1]
    assert [each["outcome"] for each in counted] == ["success", "missing", "expired", "bad_signature", "malformed"]
    assert [each["actor_kind"] for each in counted] == ["human", *["unknown"] * 4]
    assert {each["provider"] for each in counted} == {"hs256"}
    timed = [amount for name, amount, _ in meter.seen if name == "identity_validation_latency_seconds"]
    assert len(timed) == 4  # a request without a token has none to look at
    assert min(timed) >= 0


async def test_nobody_let_in_for_want_of_an_audit_record_is_counted_as_other() -> None:
    meter = Meter()
    door = Door(FailingSink(AuditUnavailable), metrics=IdentityMetrics("hs256", meter=meter))
    await door.call(f"Bearer {token()}")
    assert [labels["outcome"] for name, _, labels in meter.seen if name == "identity_bind_total"] == ["other"]
