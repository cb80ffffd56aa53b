"""Who nobody is let in, and what another tenant sees: nothing."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

TABLE = "Identity and tenant"
Refusal = tuple[Any, ...]


@dataclass(frozen=True)
class Cases:
    """Each answers a response, and words that its `detail` must hold."""

    _platform: Any
    _client: Any
    _signed: Callable[..., str]
    _gate: Any

    def _with_token(self, token: str, *says: str) -> Refusal:
        return self._platform.anonymous(token).get("/v1/runs"), *says

    def no_token(self) -> Refusal:
        return self._with_token("", "no bearer token", "Authorization: Bearer")

    def something_else_than_a_bearer_token(self) -> Refusal:
        answer = self._platform.anonymous().get("/v1/runs", headers={"Authorization": "Basic cGxtOnBsbQ=="})
        return answer, "no bearer token"

    def two_tokens_at_once(self) -> Refusal:
        token = self._platform.tokens.issue(self._platform.tenant)
        answer = self._platform.anonymous().get("/v1/runs", headers=[("Authorization", f"Bearer {token}")] * 2)
        return answer, "several Authorization headers", "send only that"

    def text_that_is_no_token(self) -> Refusal:
        return self._with_token("junk.junk.junk", "cannot be read")

    def expired_token(self) -> Refusal:
        return self._with_token(self._signed(times={"iat": -60, "exp": -10}), "has expired", "get a new one")

    def forged_token(self) -> Refusal:
        return self._with_token(self._signed(key=secrets.token_hex(32)), "signature does not match")

    def unsigned_token(self) -> Refusal:
        return self._with_token(self._signed(algorithm="none"), "algorithm")

    def future_token(self) -> Refusal:
        return self._with_token(self._signed(times={"iat": 600, "exp": 1200}), "not yet valid")

    def foreign_token_of_a_tenant_that_does_not_exist(self) -> Refusal:
        return self._with_token(self._signed(tenant_id=str(uuid.uuid4())), "tenant does not exist")

    def token_made_for_longer_than_a_day(self) -> Refusal:
        return self._with_token(self._signed(times={"iat": 0, "exp": 86_401}), "at most 86400 seconds")

    def token_that_expires_while_its_stream_is_open(self) -> Refusal:
        run_id = self._client.run("hold", gate=str(self._gate))["run_id"]
        self._gate.entered()
        brief = self._platform.anonymous(self._signed(times={"iat": 0, "exp": 2}))
        seen = [message.event for message in brief.events(run_id)]
        assert seen == ["run_created", "run_taken", "step_granted", "step_started"]
        return brief.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": "4"}), "has expired"

    def another_tenant_in_x_core_caller(self) -> Refusal:
        answer = self._client.get("/v1/runs", headers={"X-Core-Caller": str(self._platform.other_tenant)})
        return answer, "X-Core-Caller", "another tenant", "leave it out"

    def no_tenant_in_x_core_caller(self) -> Refusal:
        answer = self._client.get("/v1/runs", headers={"X-Core-Caller": "me" + "e" * 20_000})
        return answer, "X-Core-Caller", "'mee", "correct it"

    def another_tenant_s_run(self) -> Refusal:
        run_id = self._client.run("echo")["run_id"]
        stranger = self._stranger()
        for method, path in (("GET", "/events"), ("GET", "/mcrc"), ("POST", "/cancel"), ("GET", "")):
            answer = stranger.request(method, f"/v1/runs/{run_id}{path}")
            assert answer.status_code == 404
        listed = stranger.get("/v1/runs", params={"limit": 200}).json()["items"]
        assert run_id not in {run["run_id"] for run in listed}
        return answer, run_id, "does not exist in your tenant", "check the id"

    def another_tenant_s_ticket(self) -> Refusal:
        run_id = self._client.run("write")["run_id"]
        self._client.wait(run_id, "approval_requested")
        tickets = self._client.get("/v1/approvals", params={"limit": 200, "state": "pending"}).json()["items"]
        ticket = next(each["ticket_id"] for each in tickets if each["run_id"] == run_id)
        stranger = self._stranger()
        assert ticket not in stranger.get("/v1/approvals", params={"limit": 200}).text
        return stranger.post(f"/v1/approvals/{ticket}/decision", json={"decision": "approve"}), "ticket", ticket

    def another_tenant_s_halt(self) -> Refusal:
        run_id = self._client.run("write")["run_id"]
        halt = self._client.post("/v1/halts", json={"scope": "run", "scope_id": run_id, "reason": "stay"}).json()
        body = {"scope": "run", "scope_id": run_id, "reason": "mine now"}
        assert self._stranger().post("/v1/halts", json=body).status_code == 404
        answer = self._stranger().delete(f"/v1/halts/{halt['halt_id']}")
        assert self._client.delete(f"/v1/halts/{halt['halt_id']}").status_code == 200
        return answer, "halt", halt["halt_id"]

    def another_tenant_s_artifact(self) -> Refusal:
        run = self._client.run("make-file", name="a.txt", mime_type="text/plain", text="mine")
        artifact = self._client.finished(run["run_id"])["result"]["file"]["$artifact"]
        assert self._client.get(f"/v1/artifacts/{artifact}").text == "mine"
        return self._stranger().get(f"/v1/artifacts/{artifact}"), "artifact", artifact

    def id_of_nothing(self) -> Refusal:
        nothing = str(uuid.uuid4())
        for path in ("/v1/runs/{}/events", "/v1/runs/{}/mcrc", "/v1/artifacts/{}", "/v1/runs/{}"):
            answer = self._client.get(path.format(nothing))
            assert answer.status_code == 404
        return answer, f"run {nothing} does not exist"

    def id_that_is_none(self) -> Refusal:
        for path in ("/v1/runs/{}/events", "/v1/runs/{}/mcrc", "/v1/artifacts/{}", "/v1/runs/{}"):
            for junk in ("no-uuid", "%00", "%ff", "..%2f..", "0" * 5000):
                answer: httpx.Response = self._client.get(path.format(junk))
                assert answer.status_code in (404, 422), answer.text
        answer = self._client.get("/v1/runs/no-uuid")
        return answer, "path.run_id", "valid UUID", "not 'no-uuid'", "correct it"

    def _stranger(self) -> Any:
        return self._platform.client(
            tenant=self._platform.other_tenant, scopes=("plm.runs.create", "plm.halt", "plm.hitl.resolve")
        )


@pytest.fixture
def cases(platform: Any, client: Any, signed: Callable[..., str], gate: Any) -> Cases:
    return Cases(platform, client, signed, gate)


def test_nobody_unknown_comes_in_and_no_tenant_sees_another(row: Any, cases: Cases, refused: Any) -> None:
    refused(row, *getattr(cases, row.method)())


def test_every_row_has_its_scenario(unasked: set[str]) -> None:
    assert unasked == set()
