"""Runs over HTTP: what may be created, found and cancelled."""

from __future__ import annotations

import base64
import json
import threading
import uuid
from typing import Any

import pytest

FILE = {"name": "a.txt", "mime_type": "text/plain", "text": "hello"}


def test_a_run_is_accepted_with_its_address_and_succeeds(client: Any) -> None:
    answer = client.post("/v1/runs", json={"agent": "echo", "inputs": {"value": "grüße"}})
    assert answer.status_code == 202
    run = answer.json()
    assert answer.headers["Location"] == run["links"]["self"] == f"/v1/runs/{run['run_id']}"
    ended = client.finished(run["run_id"])
    assert (ended["state"], ended["result"]) == ("succeeded", {"value": "grüße"})
    assert [step["state"] for step in ended["steps"]] == ["succeeded"]
    assert {budget["scope"] for budget in ended["budgets"]} == {"run", "tenant"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"agent": "nobody"}, "agent"),
        ({"agent": ""}, "body.agent"),
        ({"inputs": {}}, "body.agent"),
        ({"agent": "echo", "surprise": 1}, "body.surprise"),
        ({"agent": "echo", "inputs": {"volume": 1}}, "inputs.volume"),
        ({"agent": "fail"}, "inputs.kind"),
        ({"agent": "echo", "inputs": {"value": 5}}, "inputs.value"),
        ({"agent": "echo", "inputs": {"count": True}}, "inputs.count"),
        ({"agent": "echo", "inputs": {"count": "1"}}, "inputs.count"),
        ({"agent": "echo", "inputs": {"ratio": "1"}}, "inputs.ratio"),
        ({"agent": "echo", "inputs": {"flag": 1}}, "inputs.flag"),
        ({"agent": "echo", "inputs": {"table": []}}, "inputs.table"),
        ({"agent": "echo", "inputs": {"list": {}}}, "inputs.list"),
        ({"agent": "echo", "inputs": {"value": None}}, "inputs.value"),
        ({"agent": "echo", "inputs": {"value": "a\x00b"}}, "body.inputs"),
        ({"agent": "echo", "inputs": {"value": "\ud800"}}, "body.inputs"),
        ({"agent": "echo", "inputs": {"ratio": float("nan")}}, "body.inputs"),
        ({"agent": "\ud800"}, "body.agent"),
        ({"agent": "echo", "\ud800": 1}, "body"),
        ({"agent": "read-file"}, "files.file"),
        ({"agent": "read-file", "inputs": {"file": "x"}}, "inputs.file"),
        ({"agent": "echo", "files": {"value": FILE}}, "files.value"),
        ({"agent": "read-file", "files": {"file": {"name": "a"}}}, "files.file"),
        ({"agent": "read-file", "files": {"file": {**FILE, "base64": "aGk="}}}, "files.file"),
        ({"agent": "read-file", "files": {"file": {"name": "a", "base64": "%%%"}}}, "files.file"),
        ({"agent": "read-file", "files": {"file": {"name": "a", "base64": "ü"}}}, "files.file"),
        ({"agent": "read-file", "files": {"file": {**FILE, "text": "\ud800"}}}, "files.file"),
        ({"agent": "read-file", "files": {"file": {**FILE, "name": "../a"}}}, "body.files.file.name"),
        ({"agent": "read-file", "files": {"file": {**FILE, "name": "a\nb"}}}, "body.files.file.name"),
        ({"agent": "read-file", "files": {"file": {**FILE, "mime_type": "a/b\r\nX: y"}}}, "body.files.file.mime_type"),
        ({"agent": "echo", "budget": {"EUR": "-1"}}, "body.budget.EUR"),
        ({"agent": "echo", "budget": {"EUR": "NaN"}}, "body.budget.EUR"),
        ({"agent": "echo", "budget": {"EUR": "1e-9"}}, "body.budget.EUR"),
        ({"agent": "echo", "budget": {"hours": "1"}}, "budget.hours"),
        ([], "body"),
        ("text", "body"),
        (None, "body"),
    ],
)
def test_a_wrong_request_is_told_which_field_is_wrong(client: Any, body: Any, field: str) -> None:
    answer = client.post("/v1/runs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["code"] == "validation/schema_invalid"
    assert field in (problem.get("field"), *(each["field"] for each in problem.get("fields", ())))


@pytest.mark.parametrize("content", [{"text": "grüße"}, {"base64": base64.b64encode("grüße".encode()).decode()}])
def test_a_file_reaches_the_plugin_as_it_was_given(client: Any, content: dict[str, str]) -> None:
    run = client.run("read-file", files={"file": {"name": "notiz.txt", "mime_type": "text/plain", **content}})
    assert client.finished(run["run_id"])["result"] == {
        "name": "notiz.txt",
        "mime_type": "text/plain",
        "text": "grüße",
    }


def test_an_asked_budget_lowers_the_limit_and_raising_it_needs_a_scope(platform: Any, client: Any) -> None:
    run = client.post("/v1/runs", json={"agent": "echo", "budget": {"EUR": "1.5", "calls": 2}}).json()
    limits = {
        each["unit"]: each["limit"] for each in client.finished(run["run_id"])["budgets"] if each["scope"] == "run"
    }
    assert limits == {"EUR": "1.5", "calls": "2"}
    more = {"agent": "echo", "budget": {"EUR": "100"}}
    refused = client.post("/v1/runs", json=more)
    assert (refused.status_code, refused.json()["missing_scopes"]) == (403, ["plm.cost.override"])
    rich = platform.client(scopes=("plm.runs.create", "plm.cost.override"))
    assert rich.post("/v1/runs", json=more).status_code == 202


def test_a_run_shows_its_group_and_its_budgets_from_narrow_to_wide(client: Any) -> None:
    group = str(uuid.uuid4())
    run = client.post("/v1/runs", json={"agent": "echo", "run_group_id": group}).json()
    assert run["run_group_id"] == group
    ended = client.finished(run["run_id"])
    assert [(each["scope"], each["period"], each["starts_at"]) for each in ended["budgets"]] == [
        *[("run", "total", None)] * 2,
        *[("tenant", "total", None)] * 2,
    ]


def test_creating_needs_its_scope_and_leaves_no_file_behind(platform: Any) -> None:
    artifacts = platform.environment["PLM_STATE_DIR"] + "/artifacts"
    before = _files(artifacts)
    answer = platform.client(scopes=()).post("/v1/runs", json={"agent": "read-file", "files": {"file": FILE}})
    assert (answer.status_code, answer.json()["missing_scopes"]) == (403, ["plm.runs.create"])
    assert _files(artifacts) == before


def _files(folder: str) -> set[str]:
    from pathlib import Path

    return {str(path) for path in Path(folder).rglob("*") if path.is_file()}


def test_the_same_key_with_the_same_body_answers_the_same_run(platform: Any, client: Any) -> None:
    headers, body = {"Idempotency-Key": str(uuid.uuid4())}, {"agent": "read-file", "files": {"file": FILE}}
    first = client.post("/v1/runs", json=body, headers=headers)
    stored = _files(platform.environment["PLM_STATE_DIR"] + "/artifacts")
    again = client.post("/v1/runs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["run_id"] == again.json()["run_id"]
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"] == headers["Idempotency-Key"]
    assert [each.headers["Idempotent-Replayed"] for each in (first, again)] == ["false", "true"]
    assert _files(platform.environment["PLM_STATE_DIR"] + "/artifacts") == stored
    other_body = client.post("/v1/runs", json={"agent": "echo"}, headers=headers)
    assert (other_body.status_code, other_body.json()["code"]) == (409, "validation/idempotency_conflict")
    elsewhere = platform.client(tenant=platform.other_tenant).post("/v1/runs", json=body, headers=headers)
    assert elsewhere.status_code == 202
    assert elsewhere.json()["run_id"] != first.json()["run_id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_idempotency_key_has_a_bounded_length(client: Any, key: str) -> None:
    answer = client.post("/v1/runs", json={"agent": "echo"}, headers={"Idempotency-Key": key})
    assert answer.status_code == 422


def test_many_clients_with_one_key_at_once_make_one_run(client: Any) -> None:
    headers, body = {"Idempotency-Key": str(uuid.uuid4())}, {"agent": "echo"}
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/v1/runs", json=body, headers=headers)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["run_id"] for answer in answers}) == 1
    assert sorted(answer.headers["Idempotent-Replayed"] for answer in answers) == ["false", *["true"] * 5]


def test_pages_hold_every_run_once_while_others_are_added(platform: Any) -> None:
    client = platform.client(tenant=platform.other_tenant)
    made = [client.run("echo")["run_id"] for _ in range(5)]
    seen, page = [], client.get("/v1/runs", params={"limit": 2}).json()
    while True:
        seen += [run["run_id"] for run in page["items"]]
        client.run("echo")
        if page["next"] is None:
            break
        page = client.get("/v1/runs", params={"limit": 2, "cursor": page["next"]}).json()
    assert [run_id for run_id in seen if run_id in made] == made[::-1]
    assert len(seen) == len(set(seen))


def test_runs_are_filtered_by_state(client: Any) -> None:
    failed = client.finished(client.run("fail", kind="fatal")["run_id"])
    listed = client.get("/v1/runs", params={"state": "failed", "limit": 200}).json()["items"]
    assert failed["run_id"] in {run["run_id"] for run in listed}
    assert {run["state"] for run in listed} == {"failed"}


def test_the_mcrc_row_of_a_run_counts_its_calls(client: Any) -> None:
    run_id = client.run("echo")["run_id"]
    client.finished(run_id)
    row = client.get(f"/v1/runs/{run_id}/mcrc").json()
    assert (row["run_id"], row["connector_call_count"], row["quality_level"]) == (run_id, 1, "bronze")


def test_a_parked_run_is_cancelled_at_once_and_again_without_effect(client: Any) -> None:
    run_id = client.run("write")["run_id"]
    client.wait(run_id, "approval_requested")
    assert client.post(f"/v1/runs/{run_id}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/runs/{run_id}/cancel").json()["state"] == "cancelled"
    kinds = [message.event for message in client.events(run_id)]
    assert kinds.count("run_cancelled") == 1
    tickets = client.get("/v1/approvals", params={"limit": 200}).json()["items"]
    assert [ticket["state"] for ticket in tickets if ticket["run_id"] == run_id] == ["cancelled"]


def test_a_running_call_is_cancelled_through_its_plugin(client: Any, gate: Any) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    gate.entered()
    assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 200
    assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 200
    ended = client.finished(run_id)
    assert (ended["state"], ended["reason"]) == ("cancelled", "cancelled")
    assert [step["state"] for step in ended["steps"]] == ["cancelled"]
