"""Approvals over HTTP: one decision, by somebody else with the right scope, in time."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

RESOLVE = ("plm.hitl.resolve",)


@pytest.fixture
def pending(client: Any) -> dict[str, Any]:
    """A ticket that waits, of a run of `client`."""
    run_id = client.run("write", value="exactly this")["run_id"]
    client.wait(run_id, "approval_requested")
    return _ticket(client, run_id)


def _ticket(client: Any, run_id: str) -> dict[str, Any]:
    tickets = client.get("/v1/approvals", params={"state": "pending", "limit": 200}).json()["items"]
    found: dict[str, Any] = next(ticket for ticket in tickets if ticket["run_id"] == run_id)
    return found


def test_a_ticket_shows_exactly_what_would_be_done(pending: dict[str, Any]) -> None:
    assert pending["capability"] == "probe.write"
    assert pending["arguments"] == {"value": "exactly this"}
    assert (pending["tier"], pending["risk"], pending["state"]) == ("always_approve", "high", "pending")
    assert pending["deadline"] > pending["created_at"]


def test_an_approved_call_is_made(client: Any, approver: Any, pending: dict[str, Any]) -> None:
    path = f"/v1/approvals/{pending['ticket_id']}/decision"
    decided = approver.post(path, json={"decision": "approve", "comment": "seen"})
    assert decided.status_code == 200
    assert (decided.json()["state"], decided.json()["comment"]) == ("approved", "seen")
    assert client.finished(pending["run_id"])["result"] == {"written": "exactly this"}


def test_a_denied_call_is_not_made(client: Any, approver: Any, pending: dict[str, Any]) -> None:
    approver.post(f"/v1/approvals/{pending['ticket_id']}/decision", json={"decision": "deny"})
    ended = client.finished(pending["run_id"])
    assert (ended["state"], ended["reason"]) == ("failed", "approval_denied")


def test_a_ticket_is_decided_once(platform: Any, approver: Any, pending: dict[str, Any]) -> None:
    path = f"/v1/approvals/{pending['ticket_id']}/decision"
    assert approver.post(path, json={"decision": "approve"}).status_code == 200
    assert approver.post(path, json={"decision": "approve"}).status_code == 200, "the same word again"
    for somebody, word in ((approver, "deny"), (platform.client(scopes=RESOLVE), "approve")):
        answer = somebody.post(path, json={"decision": word})
        assert (answer.status_code, answer.json()["code"]) == (409, "validation/hitl_decision_conflict")


def test_the_requester_cannot_approve_its_own_call(platform: Any) -> None:
    somebody = platform.client(scopes=("plm.runs.create", "probe.write", *RESOLVE))
    run_id = somebody.run("write")["run_id"]
    somebody.wait(run_id, "approval_requested")
    answer = somebody.post(
        f"/v1/approvals/{_ticket(somebody, run_id)['ticket_id']}/decision", json={"decision": "approve"}
    )
    assert (answer.status_code, answer.json()["reason"]) == (403, "separation_of_duties")


def test_only_a_human_with_the_scope_may_decide(platform: Any, client: Any, pending: dict[str, Any]) -> None:
    path = f"/v1/approvals/{pending['ticket_id']}/decision"
    without = platform.client(scopes=("plm.runs.create",)).post(path, json={"decision": "approve"})
    assert (without.status_code, without.json()["missing_scopes"]) == (403, list(RESOLVE))
    machine = platform.client(scopes=RESOLVE, actor_kind="agent").post(path, json={"decision": "approve"})
    assert (machine.status_code, machine.json()["reason"]) == (403, "not_human")


def test_another_tenant_neither_sees_nor_decides_a_ticket(platform: Any, pending: dict[str, Any]) -> None:
    stranger = platform.client(tenant=platform.other_tenant, scopes=RESOLVE)
    answer = stranger.post(f"/v1/approvals/{pending['ticket_id']}/decision", json={"decision": "approve"})
    assert answer.status_code == 404
    assert stranger.get("/v1/approvals").json()["items"] == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"decision": "perhaps"},
        {"decision": "approve", "by": "me"},
        {"decision": "approve", "comment": "x" * 10_001},
        {"decision": "approve", "comment": "a\x00b"},
    ],
)
def test_a_wrong_decision_is_refused(approver: Any, pending: dict[str, Any], body: dict[str, Any]) -> None:
    assert approver.post(f"/v1/approvals/{pending['ticket_id']}/decision", json=body).status_code == 422


def test_a_ticket_that_does_not_exist_is_not_found(approver: Any) -> None:
    assert approver.post(f"/v1/approvals/{uuid.uuid4()}/decision", json={"decision": "deny"}).status_code == 404


def test_after_the_deadline_nobody_decides_and_the_run_fails(launch: Any, platform: Any, tmp_path: Path) -> None:
    policy = yaml.safe_load(Path(platform.environment["PLM_POLICY"]).read_text(encoding="utf-8"))
    policy["approval"]["timeout_seconds"] = 0.2
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
    with launch(PLM_POLICY=str(tmp_path / "policy.yaml")) as server:
        client = server.client()
        run_id = client.run("write")["run_id"]
        ended = client.finished(run_id)
        assert (ended["state"], ended["reason"]) == ("failed", "approval_expired")
        ticket = client.get("/v1/approvals").json()["items"][0]
        assert ticket["state"] == "expired"
        answer = server.client(scopes=RESOLVE).post(
            f"/v1/approvals/{ticket['ticket_id']}/decision", json={"decision": "approve"}
        )
        assert (answer.status_code, answer.json()["code"]) == (409, "timeout/hitl_timeout")
