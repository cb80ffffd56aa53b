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


def test_a_decision_may_be_about_the_ticket_as_it_was_read(client: Any, approver: Any, pending: dict[str, Any]) -> None:
    path = f"/v1/approvals/{pending['ticket_id']}"
    tag = approver.get(path).headers["ETag"]
    assert approver.get(path).headers["ETag"] == tag
    approver.post(f"{path}/comments", json={"body": "look again"})
    changed = approver.post(f"{path}/decision", json={"decision": "approve"}, headers={"If-Match": tag})
    assert (changed.status_code, changed.json()["reason"]) == (412, "changed_meanwhile")
    for junk in (tag.strip('"'), f"W/{tag}", f'{tag}, "x"', ""):
        refused = approver.post(f"{path}/decision", json={"decision": "approve"}, headers={"If-Match": junk})
        assert (refused.status_code, refused.json()["field"]) == (422, "If-Match")
    tag = approver.get(path).headers["ETag"]
    decided = approver.post(f"{path}/decision", json={"decision": "approve"}, headers={"If-Match": tag})
    assert decided.json()["state"] == "approved"
    again = approver.post(f"{path}/decision", json={"decision": "approve"}, headers={"If-Match": "*"})
    assert again.json()["state"] == "approved"
    assert client.finished(pending["run_id"])["state"] == "succeeded"


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


class TestAsk:
    """A ticket that asks for an input."""

    @pytest.fixture
    def ask(self, client: Any) -> dict[str, Any]:
        run_id = client.run("ask")["run_id"]
        client.wait(run_id, "approval_requested")
        return _ticket(client, run_id)

    def decide(self, somebody: Any, ticket: dict[str, Any], **body: Any) -> Any:
        return somebody.post(f"/v1/approvals/{ticket['ticket_id']}/decision", json=body)

    def test_it_shows_the_question_and_the_schema_and_the_run_says_that_it_asks(
        self, client: Any, ask: dict[str, Any]
    ) -> None:
        assert (ask["kind"], ask["state"], ask["input"]) == ("input", "pending", None)
        assert ask["arguments"]["question"] == "How many are wanted?"
        assert ask["arguments"]["schema"]["properties"]["count"] == {"type": "integer", "minimum": 1}
        run = client.get(f"/v1/runs/{ask['run_id']}").json()
        assert (run["state"], run["reason"], run["message"]) == (
            "awaiting_approval",
            "input_required",
            "How many are wanted?",
        )

    def test_what_is_given_goes_on_in_the_run(self, client: Any, approver: Any, ask: dict[str, Any]) -> None:
        decided = self.decide(approver, ask, decision="provide_input", input={"count": 3}, comment="three")
        assert decided.status_code == 200, decided.text
        assert (decided.json()["state"], decided.json()["input"]) == ("approved", {"count": 3})
        assert client.finished(ask["run_id"])["state"] == "succeeded"
        shown = approver.get(f"/v1/approvals/{ask['ticket_id']}").json()
        assert (shown["input"], shown["comment"], shown["votes"]) == ({"count": 3}, "three", [])
        why = client.get("/v1/why", params={"id": ask["ticket_id"]}).json()
        assert why["message"].endswith('the input is {"count":3}')
        late = self.decide(approver, ask, decision="deny")
        assert (late.status_code, late.json()["code"]) == (409, "validation/hitl_decision_conflict")

    def test_a_denial_ends_a_plan_that_needs_it(self, client: Any, approver: Any, ask: dict[str, Any]) -> None:
        assert self.decide(approver, ask, decision="deny", comment="no").status_code == 200
        run = client.finished(ask["run_id"])
        assert (run["state"], run["reason"]) == ("failed", "input_denied")

    @pytest.mark.parametrize(
        "body",
        [
            {"decision": "provide_input"},
            {"decision": "approve", "input": {"count": 3}},
            {"decision": "deny", "input": None},
            {"decision": "provide_input", "input": {"count": 3}, "scope": {"uses": 1, "seconds": 1}},
            {"decision": "provide_input", "input": {"count": "hunter2"}},
            {"decision": "provide_input", "input": {"count": "hunter2\x00"}},
            {"decision": "provide_input", "input": "hunter2" * 4000},
        ],
        ids=range(7),
    )
    def test_what_is_no_answer_is_refused_and_not_repeated(
        self, approver: Any, ask: dict[str, Any], body: dict[str, Any]
    ) -> None:
        refused = self.decide(approver, ask, **body)
        assert refused.status_code == 422, refused.text
        assert "hunter2" not in refused.text
        assert approver.get(f"/v1/approvals/{ask['ticket_id']}").json()["state"] == "pending"

    def test_the_path_of_what_is_wrong_is_named(self, approver: Any, ask: dict[str, Any]) -> None:
        refused = self.decide(approver, ask, decision="provide_input", input={"count": 0})
        assert refused.json()["detail"].startswith("input.count breaks 'minimum' of its schema")

    def test_the_other_word_is_refused_with_the_right_one(
        self, approver: Any, ask: dict[str, Any], pending: dict[str, Any]
    ) -> None:
        approved = self.decide(approver, ask, decision="approve")
        assert (approved.status_code, approved.json()["code"]) == (409, "validation/hitl_decision_conflict")
        assert "give it with provide_input, or deny it" in approved.json()["detail"]
        given = self.decide(approver, pending, decision="provide_input", input=1)
        assert (given.status_code, given.json()["code"]) == (409, "validation/hitl_decision_conflict")
        assert "approve or deny it" in given.json()["detail"]

    def test_who_lacks_the_scope_gives_nothing(self, client: Any, ask: dict[str, Any]) -> None:
        refused = self.decide(client, ask, decision="provide_input", input={"count": 3})
        assert (refused.status_code, refused.json()["missing_scopes"]) == (403, ["plm.hitl.resolve"])
