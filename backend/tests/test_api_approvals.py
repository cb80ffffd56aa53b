"""Approvals over HTTP: one decision, by somebody else with the right scope, in time."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

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
