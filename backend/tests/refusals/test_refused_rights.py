"""What the caller may not do, what the present state does not allow, and a database that does not answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TABLE = "Rights and states"
Refusal = tuple[Any, ...]
RESOLVE = ("plm.hitl.resolve",)


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Each answers a response, and words that its `detail` must hold."""

    _platform: Any
    _client: Any
    _approver: Any
    _own_server: Callable[..., Any]
    _altered_policy: Callable[..., str]
    _launch: Callable[..., Any]
    _mortal_database: Callable[[], Any]
    _until: Callable[..., Any]
    _tmp_path: Path

    def _pending(self, somebody: Any) -> str:
        run_id = somebody.run("write")["run_id"]
        somebody.wait(run_id, "approval_requested")
        tickets = somebody.get("/v1/approvals", params={"state": "pending", "limit": 200}).json()["items"]
        return next(str(ticket["ticket_id"]) for ticket in tickets if ticket["run_id"] == run_id)

    @staticmethod
    def _decide(somebody: Any, ticket: str, word: str = "approve") -> Any:
        return somebody.post(f"/v1/approvals/{ticket}/decision", json={"decision": word})

    def creating_without_the_scope(self) -> Refusal:
        answer = self._platform.client(scopes=("plm.halt",)).post("/v1/runs", json={"agent": "echo"})
        assert answer.json()["missing_scopes"] == ["plm.runs.create"]
        return answer, "plm.runs.create", "get a token that holds it"

    def budget_above_the_policy(self) -> Refusal:
        answer = self._client.post("/v1/runs", json={"agent": "echo", "budget": {"EUR": "100"}})
        assert answer.json()["missing_scopes"] == ["plm.cost.override"]
        return answer, "allows 5 EUR", "plm.cost.override"

    def halting_without_the_scope(self) -> Refusal:
        nobody, body = self._platform.client(scopes=("plm.runs.create",)), {"scope": "tenant", "reason": "no"}
        system = self._client.post("/v1/halts", json={**body, "scope": "system"})
        assert (system.status_code, system.json()["missing_scopes"]) == (403, ["plm.halt.system"])
        return nobody.post("/v1/halts", json=body), "a tenant halt", "plm.halt"

    def deciding_without_the_scope(self) -> Refusal:
        somebody = self._platform.client(scopes=("plm.runs.create",))
        return self._decide(somebody, self._pending(self._client)), "plm.hitl.resolve", "get a token"

    def deciding_one_s_own_request(self) -> Refusal:
        somebody = self._platform.client(scopes=("plm.runs.create", "probe.write", *RESOLVE))
        answer = self._decide(somebody, self._pending(somebody))
        assert answer.json()["reason"] == "separation_of_duties"
        return answer, "requester", "have somebody else decide"

    def deciding_as_a_machine(self) -> Refusal:
        machine = self._platform.client(scopes=RESOLVE, actor_kind="agent")
        return self._decide(machine, self._pending(self._client)), "only a human", "have a person decide"

    def deciding_what_was_changed_since_it_was_read(self) -> Refusal:
        ticket = self._pending(self._client)
        path = f"/v1/approvals/{ticket}"
        looked_at = {"If-Match": self._approver.get(path).headers["ETag"]}
        assert self._approver.post(f"{path}/comments", json={"body": "do not"}).status_code == 201
        answer = self._approver.post(f"{path}/decision", json={"decision": "approve"}, headers=looked_at)
        assert answer.json()["reason"] == "changed_meanwhile"
        assert self._approver.get(path).json()["state"] == "pending"
        return answer, "since it was read", "read it again"

    def voting_the_other_way(self) -> Refusal:
        with self._own_server(PLM_POLICY=self._altered_policy(approval={"quorum": 2})) as server:
            approver, ticket = server.client(scopes=RESOLVE), self._pending(server.client())
            assert self._decide(approver, ticket).json()["state"] == "pending"
            assert self._decide(approver, ticket).json()["state"] == "pending", "the same word again"
            answer = self._decide(approver, ticket, "deny")
            assert answer.json()["reason"] == "already_voted"
            return answer, "a vote is given once", "somebody else"

    def deciding_what_was_handed_on(self) -> Refusal:
        rule = {"timeout_seconds": 0.2, "escalation": {"required_scope": "plm.hitl.duty"}}
        with self._own_server(PLM_POLICY=self._altered_policy(approval=rule)) as server:
            client, approver = server.client(), server.client(scopes=RESOLVE)
            ticket = self._pending(client)
            self._until(
                lambda: approver.get(f"/v1/approvals/{ticket}").json()["escalated_at"], "the ticket is handed on"
            )
            answer = self._decide(approver, ticket)
            assert answer.json()["missing_scopes"] == ["plm.hitl.duty"]
            duty = server.client(scopes=("plm.hitl.duty",))
            assert self._decide(duty, ticket).json()["state"] == "approved"
            return answer, "plm.hitl.duty", "get a token"

    def approval_scope_wider_than_the_policy(self) -> Refusal:
        ticket = self._pending(self._client)
        offer = {"decision": "approve", "scope": {"uses": 6, "seconds": 60}}
        answer = self._approver.post(f"/v1/approvals/{ticket}/decision", json=offer)
        assert answer.json()["reason"] == "scope_not_allowed"
        return answer, "at most 5 uses", "offer less"

    def commenting_without_the_scope(self) -> Refusal:
        somebody = self._platform.client(scopes=("plm.runs.create",))
        path = f"/v1/approvals/{self._pending(self._client)}/comments"
        return somebody.post(path, json={"body": "me too"}), "plm.hitl.resolve", "get a token"

    def deciding_what_was_decided(self) -> Refusal:
        ticket = self._pending(self._client)
        assert self._decide(self._approver, ticket).status_code == 200
        assert self._decide(self._approver, ticket).status_code == 200, "the same word again"
        assert self._decide(self._platform.client(scopes=RESOLVE), ticket).status_code == 409
        return self._decide(self._approver, ticket, "deny"), "already approved", "read the ticket"

    def deciding_after_the_deadline(self) -> Refusal:
        policy = self._altered_policy(approval={"timeout_seconds": 0.2, "required_scope": "plm.hitl.resolve"})
        with self._own_server(PLM_POLICY=policy) as server:
            client = server.client()
            run = client.finished(client.run("write")["run_id"])
            assert run["reason"] == "approval_expired"
            ticket = client.get("/v1/approvals").json()["items"][0]["ticket_id"]
            return self._decide(server.client(scopes=RESOLVE), ticket), "the deadline", "start a new run"

    def cancelling_what_has_ended(self) -> Refusal:
        run_id = self._client.run("echo")["run_id"]
        self._client.finished(run_id)
        return self._client.post(f"/v1/runs/{run_id}/cancel"), run_id, "already succeeded", "read the run"

    def cancelling_while_an_outcome_is_unknown(self) -> Refusal:
        run_id = self._client.run("fragile", journal=str(self._tmp_path / "journal"))["run_id"]
        self._until(
            lambda: self._client.get(f"/v1/runs/{run_id}").json()["state"] == "outcome_unknown", "the run is parked"
        )
        return self._client.post(f"/v1/runs/{run_id}/cancel"), run_id, "unknown", "plm-cli run reconcile"

    def halt_without_a_reason(self) -> Refusal:
        for body in ({"scope": "tenant"}, {"scope": "tenant", "reason": ""}, {"scope": "tenant", "reason": "a\x00b"}):
            assert self._client.post("/v1/halts", json=body).status_code == 422
        answer = self._client.post("/v1/halts", json={"scope": "tenant", "reason": "  "})
        return answer, "a halt needs a reason", "correct it"

    def halt_of_a_run_that_is_not_named(self) -> Refusal:
        foreign = {"scope": "tenant", "scope_id": str(uuid.uuid4()), "reason": "whose?"}
        assert self._client.post("/v1/halts", json=foreign).status_code == 422
        assert self._client.post("/v1/halts", json={"scope": "galaxy", "reason": "too far"}).status_code == 422
        return self._client.post("/v1/halts", json={"scope": "run", "reason": "which?"}), "'scope_id'", "correct it"

    def halt_of_an_agent_that_is_not_named(self) -> Refusal:
        named = {"scope": "tenant", "subject": "echo", "reason": "whose?"}
        assert self._client.post("/v1/halts", json=named).status_code == 422
        return self._client.post("/v1/halts", json={"scope": "agent", "reason": "which?"}), "'subject'", "correct it"

    def halt_of_nothing(self) -> Refusal:
        nothing = str(uuid.uuid4())
        assert self._client.delete(f"/v1/halts/{nothing}").status_code == 404
        assert self._decide(self._approver, nothing).status_code == 404
        for scope, name in (("agent", "nobody"), ("capability", "probe.nothing")):
            unknown = {"scope": scope, "subject": name, "reason": "?"}
            assert self._client.post("/v1/halts", json=unknown).status_code == 404
        body = {"scope": "run", "scope_id": nothing, "reason": "?"}
        return self._client.post("/v1/halts", json=body), nothing, "does not exist"

    def database_busy(self) -> Refusal:
        run_id = self._client.run("write")["run_id"]
        self._client.wait(run_id, "approval_requested")
        with self._platform.database() as books, books.transaction():
            books.execute("SELECT 1 FROM run_states WHERE run_id = %s FOR UPDATE", [run_id])
            answer = self._client.post(f"/v1/runs/{run_id}/cancel")
        assert self._client.post(f"/v1/runs/{run_id}/cancel").json()["state"] == "cancelled"
        return answer, "did not answer in time", "send the same request again"

    def database_gone(self) -> Refusal:
        database, like = self._mortal_database()
        with self._launch(like=like) as server:
            client = server.client()
            run = client.finished(client.run("echo")["run_id"])
            database.stop()
            ready = client.get("/v1/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert client.get("/v1/health/live").status_code == 200
            answer = client.get("/v1/runs")
            database.start()
            self._until(lambda: client.get("/v1/health/ready").status_code == 200, "the server finds its database")
            assert client.get(f"/v1/runs/{run['run_id']}").json()["state"] == "succeeded"
            assert client.finished(client.run("echo")["run_id"])["state"] == "succeeded"
            return answer, "audit record", "try again"


@pytest.fixture
def cases(
    request: pytest.FixtureRequest,
    platform: Any,
    client: Any,
    approver: Any,
    own_server: Any,
    altered_policy: Any,
    launch: Any,
    until: Any,
    tmp_path: Path,
) -> Cases:
    return Cases(
        _platform=platform,
        _client=client,
        _approver=approver,
        _own_server=own_server,
        _altered_policy=altered_policy,
        _launch=launch,
        _mortal_database=lambda: request.getfixturevalue("mortal_database"),
        _until=until,
        _tmp_path=tmp_path,
    )


def test_what_may_not_be_or_cannot_be_now_is_told_why(row: Any, cases: Cases, refused: Any) -> None:
    refused(row, *getattr(cases, row.method)())


def test_every_row_has_its_scenario(unasked: set[str]) -> None:
    assert unasked == set()
