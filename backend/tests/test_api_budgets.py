"""Budgets over HTTP: what is spent and why a call is refused, and what an operator does about it."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

TREASURER = ("plm.runs.create", "plm.budgets")


@pytest.fixture
def treasurer(platform: Any) -> Any:
    """Somebody who may change budgets, of a tenant in which nobody else spends."""
    return platform.client(tenant=platform.other_tenant, scopes=TREASURER)


def budgets_of(client: Any, scope: str, subject: str) -> list[dict[str, Any]]:
    answer = client.get("/v1/budgets", params={"scope": scope, "subject": subject})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


def test_what_a_run_spent_is_listed_and_corrected_once_by_a_counter_entry(treasurer: Any) -> None:
    run = treasurer.finished(treasurer.run("echo")["run_id"])
    name = {"scope": "run", "subject": run["run_id"], "unit": "calls"}
    spent = {each["unit"]: each["spent"] for each in budgets_of(treasurer, "run", run["run_id"])}
    assert spent["calls"] == "1"
    body = {**name, "amount": "-1", "reason": "a trial"}
    for _ in range(2):
        answer = treasurer.post("/v1/budgets/corrections", json=body, headers={"Idempotency-Key": run["run_id"]})
        assert (answer.status_code, answer.json()["spent"]) == (200, "0")
    other = treasurer.post(
        "/v1/budgets/corrections", json={**body, "amount": "1"}, headers={"Idempotency-Key": run["run_id"]}
    )
    assert (other.status_code, other.json()["reason"]) == (409, "idempotency_conflict")
    too_much = treasurer.post("/v1/budgets/corrections", json=body, headers={"Idempotency-Key": str(uuid.uuid4())})
    assert (too_much.status_code, too_much.json()["field"]) == (422, "amount")


def test_a_limit_that_is_set_binds_the_next_call_and_is_explained(treasurer: Any, platform: Any) -> None:
    tenant = str(platform.other_tenant)
    name = {"scope": "tenant", "subject": tenant, "unit": "calls"}
    (before,) = [each for each in budgets_of(treasurer, "tenant", tenant) if each["unit"] == "calls"]
    try:
        made = treasurer.put("/v1/budgets", json={**name, "limit": before["spent"]}).json()
        assert (made["limit"], made["pinned"]) == (before["spent"], True)
        run_id = treasurer.run("echo")["run_id"]
        assert treasurer.finished(run_id)["reason"] == "budget_exceeded"
        told = treasurer.get("/v1/why", params={"id": run_id}).json()
        assert told["because"]["limit"]["scope"] == "tenant"
        budget = treasurer.get("/v1/why", params={"id": f"tenant/{tenant}/calls"}).json()
        assert (budget["state"], budget["rule"]) == ("exhausted", "set by an operator")
        assert "a higher limit" in budget["unblocked_by"]
    finally:
        treasurer.put("/v1/budgets", json={**name, "limit": before["limit"]})


def test_a_window_of_any_subject_and_counted_unit_is_opened_listed_and_explained(treasurer: Any) -> None:
    name = {"scope": "model", "subject": "Maker/Model 2", "unit": "gpu_seconds", "per": "month"}
    assert treasurer.put("/v1/budgets", json={**name, "limit": "7.5"}).json()["subject"] == "maker/model 2"
    (found,) = budgets_of(treasurer, "model", "maker/model 2")
    assert (found["limit"], found["period"], found["spent"]) == ("7.5", "month", "0")
    there = ZoneInfo("Asia/Kolkata")
    starts, ends = (datetime.fromisoformat(found[name]).astimezone(there) for name in ("starts_at", "ends_at"))
    midnight = {"hour": 0, "minute": 0, "second": 0, "microsecond": 0}
    assert (starts, ends) == (
        starts.replace(day=1, **midnight),
        (starts + timedelta(days=31)).replace(day=1, **midnight),
    )
    assert (found["time_zone"], starts <= datetime.now(there) < ends) == ("Asia/Kolkata", True)
    told = treasurer.get("/v1/why", params={"id": "model/maker/model 2/gpu_seconds/month"}).json()
    assert (told["state"], told["limit"]["limit"], told["limit"]["time_zone"]) == ("open", "7.5", "Asia/Kolkata")


def test_budgets_come_in_pages_and_a_cursor_of_nobody_is_refused(treasurer: Any) -> None:
    for subject in ("paged/1", "paged/2", "paged/é"):
        name = {"scope": "model", "subject": subject, "unit": "calls"}
        assert treasurer.put("/v1/budgets", json={**name, "limit": "1"}).status_code == 200
    found, cursor = [], None
    while True:
        asked = {"scope": "model", "limit": 1, **({"cursor": cursor} if cursor else {})}
        page = treasurer.get("/v1/budgets", params=asked).json()
        assert len(page["items"]) <= 1
        found += page["items"]
        if (cursor := page["next"]) is None:
            break
    whole = treasurer.get("/v1/budgets", params={"scope": "model", "limit": 200}).json()
    assert (found, whole["next"]) == (whole["items"], None)
    assert {"paged/1", "paged/2", "paged/é"} <= {each["subject"] for each in found}
    for junk in ("x", "W10=", "W1tbW1tb"):
        answer = treasurer.get("/v1/budgets", params={"cursor": junk})
        assert (answer.status_code, answer.json()["field"]) == (422, "cursor")


def test_who_may_not_change_a_budget_and_what_is_no_budget_is_refused(client: Any, treasurer: Any) -> None:
    name = {"scope": "agent", "subject": "echo", "unit": "calls"}
    for method, path, body in (
        ("PUT", "/v1/budgets", {**name, "limit": "1"}),
        ("POST", "/v1/budgets/corrections", {**name, "amount": "1", "reason": "x"}),
    ):
        refused = client.request(method, path, json=body, headers={"Idempotency-Key": "x"})
        assert (refused.status_code, refused.json()["missing_scopes"]) == (403, ["plm.budgets"])
    uncounted = treasurer.put("/v1/budgets", json={**name, "limit": "1"})
    assert (uncounted.status_code, uncounted.json()["field"]) == (422, "unit")
    assert "under 'limits'" in uncounted.json()["detail"]
    unnamed = treasurer.put("/v1/budgets", json={**name, "scope": "user", "limit": "1"})
    assert (unnamed.status_code, unnamed.json()["field"]) == (422, "subject")
    assert treasurer.get("/v1/budgets?subject=echo").status_code == 422
    assert treasurer.get("/v1/why?id=agent/nobody/calls").status_code == 404
    assert treasurer.get("/v1/why?id=nothing").status_code == 422
