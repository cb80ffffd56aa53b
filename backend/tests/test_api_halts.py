"""Halts over HTTP: what they stop, who may, and that lifting lets the run go on."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

SYSTEM = ("plm.runs.create", "plm.halt", "plm.halt.system")


def _lift(client: Any, halt: dict[str, Any]) -> dict[str, Any]:
    answer = client.delete(f"/v1/halts/{halt['halt_id']}")
    assert answer.status_code == 200, answer.text
    lifted: dict[str, Any] = answer.json()
    return lifted


def test_a_halted_run_parks_and_goes_on_when_the_halt_is_lifted(client: Any, gate: Any) -> None:
    run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
    gate.entered()
    answer = client.post("/v1/halts", json={"scope": "run", "scope_id": run_id, "reason": "look first"})
    assert answer.status_code == 201
    halt = answer.json()
    assert (halt["scope"], halt["scope_id"], halt["epoch"], halt["lifted_at"]) == ("run", run_id, 1, None)
    client.wait(run_id, "run_parked")
    parked = client.get(f"/v1/runs/{run_id}").json()
    assert (parked["state"], parked["reason"]) == ("halted", "halted")
    assert "look first" in parked["message"]
    gate.open()
    assert _lift(client, halt)["lifted_at"] is not None
    assert _lift(client, halt)["lifted_at"] is not None, "lifting twice answers the same"
    assert client.finished(run_id)["state"] == "succeeded"


def test_calls_in_flight_end_within_the_bound_that_the_record_of_the_halt_states(platform: Any, gate: Any) -> None:
    client = platform.client(tenant=platform.other_tenant)
    run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
    gate.entered()
    halt = client.post("/v1/halts", json={"scope": "agent", "subject": "hold-then-echo", "reason": "stop"}).json()
    assert halt["calls"] == {"revoked": 0, "in_flight": 1, "open": 1, "last_ended_at": None}
    client.wait(run_id, "run_parked")
    seen = client.get(f"/v1/halts/{halt['halt_id']}").json()
    assert seen["calls"]["open"] == 0
    ended = datetime.fromisoformat(seen["calls"]["last_ended_at"])
    assert 0 < (ended - datetime.fromisoformat(seen["triggered_at"])).total_seconds() <= seen["cancel_seconds"]
    assert halt["halt_id"] in [each["halt_id"] for each in client.get("/v1/halts?standing=true").json()["items"]]
    gate.open()
    _lift(client, halt)
    assert client.finished(run_id)["state"] == "succeeded"


@pytest.mark.parametrize("scope", ["tenant", "system"])
def test_a_wider_halt_holds_new_runs_back_until_it_is_lifted(platform: Any, scope: str) -> None:
    client = platform.client(tenant=platform.other_tenant, scopes=SYSTEM)
    halt = client.post("/v1/halts", json={"scope": scope, "reason": "maintenance"}).json()
    run_id = client.run("echo")["run_id"]
    client.wait(run_id, "run_parked")
    assert client.get(f"/v1/runs/{run_id}").json()["state"] == "halted"
    _lift(client, halt)
    assert client.finished(run_id)["state"] == "succeeded"


def test_a_standing_halt_is_answered_as_it_is(client: Any) -> None:
    run_id = client.run("write")["run_id"]
    body = {"scope": "run", "scope_id": run_id, "reason": "first"}
    first = client.post("/v1/halts", json=body).json()
    assert client.post("/v1/halts", json={**body, "reason": "second"}).json() == first
    _lift(client, first)


@pytest.mark.parametrize(
    ("scope", "scopes", "missing"),
    [
        ("run", ("plm.runs.create",), "plm.halt"),
        ("tenant", ("plm.runs.create",), "plm.halt"),
        ("system", ("plm.runs.create", "plm.halt"), "plm.halt.system"),
    ],
)
def test_a_halt_needs_the_scope_of_its_reach(platform: Any, scope: str, scopes: tuple[str, ...], missing: str) -> None:
    client = platform.client(scopes=scopes)
    target = client.run("echo")["run_id"] if scope == "run" else None
    answer = client.post("/v1/halts", json={"scope": scope, "scope_id": target, "reason": "no"})
    assert (answer.status_code, answer.json()["missing_scopes"]) == (403, [missing])


def test_lifting_needs_the_scope_too(platform: Any, client: Any) -> None:
    run_id = client.run("write")["run_id"]
    halt = client.post("/v1/halts", json={"scope": "run", "scope_id": run_id, "reason": "stay"}).json()
    assert platform.client(scopes=()).delete(f"/v1/halts/{halt['halt_id']}").status_code == 403
    assert platform.client(tenant=platform.other_tenant).delete(f"/v1/halts/{halt['halt_id']}").status_code == 404
    _lift(client, halt)


@pytest.mark.parametrize("scope", ["run", "tenant", "system"])
def test_a_running_call_is_stopped_at_once_however_long_its_lease_is(launch: Any, gate: Any, scope: str) -> None:
    with launch(PLM_LEASE_SECONDS="3600") as server:
        client = server.client(scopes=SYSTEM)
        run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
        gate.entered()
        halt = {"scope": scope, "scope_id": run_id if scope == "run" else None, "reason": "look first"}
        assert client.post("/v1/halts", json=halt).status_code == 201
        client.wait(run_id, "run_parked")
        assert client.post(f"/v1/runs/{run_id}/cancel").json()["state"] == "cancelled"


def test_a_halt_from_a_terminal_stops_a_running_call_as_one_of_the_api_does(launch: Any, gate: Any) -> None:
    with launch(PLM_LEASE_SECONDS="3600") as server:
        client = server.client()
        run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
        gate.entered()
        token = server.tokens.issue(server.tenant, scopes=SYSTEM)
        terminal = replace(server, environment={**server.environment, "PLM_TOKEN": token})
        said = terminal.cli("halt", "trigger", "tenant", "--reason", "look first", "--json")
        assert said.returncode == 0, said.stderr
        halt = json.loads(said.stdout)
        assert (halt["calls"]["in_flight"], halt["calls"]["revoked"]) == (1, 0)
        client.wait(run_id, "run_parked")
        assert client.get(f"/v1/halts/{halt['id']}").json()["calls"]["open"] == 0


def test_a_running_call_is_cancelled_at_once_however_long_its_lease_is(launch: Any, gate: Any) -> None:
    with launch(PLM_LEASE_SECONDS="3600") as server:
        client = server.client()
        run_id = client.run("hold", gate=str(gate))["run_id"]
        gate.entered()
        assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 200
        assert client.finished(run_id)["state"] == "cancelled"
