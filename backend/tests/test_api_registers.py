"""The registers over HTTP: what is registered, and suspending an agent in one tenant."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

AGENTS = [
    {"id": "echo", "owner": "the tests", "autonomy": "L2", "budget": {"calls": "5"}},
    {"id": "echo", "version": "0", "owner": "the tests", "status": "retired"},
]

POLICY = {
    "version": "1",
    "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
    "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
    "budgets": {"run": {"EUR": 1, "calls": 1}, "tenant": {"EUR": 1, "calls": 1}},
}


@pytest.fixture(scope="module")
def registering(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server where agents are registered."""
    register: Path = tmp_path_factory.mktemp("register") / "agents.yaml"
    register.write_text(yaml.safe_dump({"agents": AGENTS}), encoding="utf-8")
    with launch(PLM_AGENT_REGISTER=str(register)) as server:
        yield server


def test_what_is_registered_is_shown_with_versions_owner_and_ceilings(registering: Any, client: Any) -> None:
    shown = registering.client().get("/v1/agents").json()
    assert shown["registered"] is True
    assert [(each["id"], each["version"], each["status"]) for each in shown["items"]] == [
        ("echo", "1", "active"),
        ("echo", "0", "retired"),
    ]
    assert (shown["items"][0]["owner"], shown["items"][0]["budget"]) == ("the tests", {"calls": "5"})
    assert client.get("/v1/agents").json() == {"registered": False, "items": []}
    capabilities = {each["id"]: each for each in client.get("/v1/capabilities").json()["items"]}
    assert capabilities["probe.write"]["mode"] == "execute-write"


def test_each_tenant_is_shown_what_is_for_it_and_no_name_of_another(
    registering: Any, launch: Any, tmp_path: Path
) -> None:
    one, other = str(registering.tenant), str(registering.other_tenant)
    base = {"description": "x", "mode": "read", "plugin": "probe"}
    written = [
        {**base, "id": "probe.all"},
        {**base, "id": "probe.both", "allowed_tenants": [one, other]},
        {**base, "id": "probe.mine", "allowed_tenants": [one]},
        {**base, "id": "probe.theirs", "denied_tenants": [one]},
    ]
    plans = tmp_path / "agents"
    plans.mkdir()
    for name, document in (("capabilities", {"capabilities": written}), ("policy", POLICY)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    settings = {
        "PLM_CAPABILITIES": str(tmp_path / "capabilities.yaml"),
        "PLM_POLICY": str(tmp_path / "policy.yaml"),
        "PLM_AGENTS": str(plans),
        "PLM_RUN_CONCURRENCY": "0",
    }
    with launch(like=registering, **settings) as server:
        shown = {
            tenant: server.client(tenant=tenant).get("/v1/capabilities")
            for tenant in (registering.tenant, registering.other_tenant)
        }
    for tenant, ids in ((one, ["all", "both", "mine"]), (other, ["all", "both", "theirs"])):
        answer = shown[uuid.UUID(tenant)]
        assert [each["id"] for each in answer.json()["items"]] == [f"probe.{each}" for each in ids]
        assert answer.json()["items"][1]["allowed_tenants"] == [tenant]
        assert (other if tenant == one else one) not in answer.text


def test_an_agent_is_suspended_in_one_tenant_and_works_again(registering: Any) -> None:
    client, other = registering.client(), registering.client(tenant=registering.other_tenant)
    suspended = client.put("/v1/agents/echo/status", json={"status": "suspended", "reason": "it loops"})
    assert (suspended.status_code, suspended.json()["status"]) == (200, "suspended")
    run_id = client.run("echo")["run_id"]
    client.wait(run_id, "run_parked")
    assert other.get("/v1/agents").json()["items"][0]["status"] == "active"
    assert other.finished(other.run("echo")["run_id"])["state"] == "succeeded"
    assert client.put("/v1/agents/echo/status", json={"status": "active"}).json()["halt_id"] is None
    done = client.finished(run_id)
    assert (done["state"], done["principal"]["delegated_by"]) == ("succeeded", [])


def test_who_may_not_suspend_and_who_is_not_registered_is_refused(registering: Any) -> None:
    body = {"status": "suspended", "reason": "x"}
    nobody = registering.client(scopes=("plm.runs.create",))
    refused = nobody.put("/v1/agents/echo/status", json=body)
    assert (refused.status_code, refused.json()["missing_scopes"]) == (403, ["plm.halt"])
    assert registering.client().put("/v1/agents/unheard-of/status", json=body).status_code == 404
    for wrong in ({"status": "retired"}, {"status": "suspended"}):
        assert registering.client().put("/v1/agents/echo/status", json=wrong).status_code == 422
