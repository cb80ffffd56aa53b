"""Plugins good and bad, through the whole platform: what each does to its run, its books and its effects."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = {"name": "a.txt", "mime_type": "text/plain", "text": "hello"}


def _spent(run: dict[str, Any]) -> dict[str, str]:
    return {each["unit"]: each["spent"] for each in run["budgets"] if each["scope"] == "run"}


def test_a_call_that_fails_is_charged_and_its_error_recorded(client: Any) -> None:
    run = client.finished(client.run("fail", kind="fatal")["run_id"])
    assert (run["steps"][-1]["error"]["category"], _spent(run)["calls"]) == ("fatal", "1")


@pytest.mark.parametrize(
    ("unit", "amount", "eur"),
    [("page", "10", "0.1"), ("unpriced", "5", "0"), ("page", "1e12", "0.75")],
)
def test_measured_usage_is_charged_and_the_reservation_where_it_cannot_be(
    client: Any, unit: str, amount: str, eur: str
) -> None:
    run = client.finished(client.run("usage", unit=unit, amount=amount)["run_id"])
    assert (run["state"], _spent(run)["EUR"]) == ("succeeded", eur)
    assert {each["reserved"] for each in run["budgets"]} == {"0"}


@pytest.mark.parametrize(("unit", "amount"), [("page", "nan"), ("page", "inf")])
def test_a_usage_that_means_nothing_fails_the_call(client: Any, unit: str, amount: str) -> None:
    run = client.finished(client.run("usage", unit=unit, amount=amount)["run_id"])
    assert run["state"] == "failed"
    assert {each["reserved"] for each in run["budgets"]} == {"0"}


@pytest.mark.parametrize(
    ("name", "mime_type"), [("../../etc/passwd", "text/plain"), ("a\x01b", "text/plain"), ("a", "text"), ("", "a/b")]
)
def test_a_file_with_an_odd_name_or_type_is_the_plugins_failure(client: Any, name: str, mime_type: str) -> None:
    run = client.finished(client.run("make-file", name=name, mime_type=mime_type, text="x")["run_id"])
    assert (run["state"], run["reason"]) == ("failed", "user_input")


@pytest.fixture
def foreign(platform: Any, client: Any) -> dict[str, Any]:
    """References that a call must not follow."""

    def stored(owner: Any) -> dict[str, Any]:
        run_id = owner.run("make-file", name="a.txt", mime_type="text/plain", text="mine")["run_id"]
        reference: dict[str, Any] = owner.finished(run_id)["result"]["file"]
        return reference

    return {
        "of another run": stored(client),
        "of another tenant": stored(platform.client(tenant=platform.other_tenant)),
        "of nothing": {"$artifact": str(uuid.uuid4())},
        "of no id": {"$artifact": "../secrets/plm_owner"},
    }


def test_a_call_sees_no_file_but_those_of_its_own_run(client: Any, foreign: dict[str, Any]) -> None:
    for whose, reference in foreign.items():
        run = client.finished(client.run("read-reference", file=reference)["run_id"])
        assert run["state"] == "failed", whose
        assert (run["reason"], [step["state"] for step in run["steps"]]) == ("arguments_refused", ["not_started"])
        assert _spent(run) == {"EUR": "0", "calls": "0"}
        assert "mine" not in json.dumps(run)


def test_an_idempotent_call_whose_worker_dies_is_repeated_under_its_key_and_has_one_effect(
    client: Any, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    run = client.finished(client.run("journal", journal=str(journal))["run_id"])
    assert [step["state"] for step in run["steps"]] == ["superseded", "succeeded"]
    assert journal.read_text().splitlines() == [run["result"]["step_key"]]
    assert _spent(run)["calls"] == "1"


@pytest.mark.parametrize(("word", "effects"), [("--happened", 1), ("--did-not", 2)])
def test_an_unknown_outcome_waits_for_a_word_and_is_repeated_only_on_did_not(
    platform: Any, client: Any, until: Any, tmp_path: Path, word: str, effects: int
) -> None:
    journal = tmp_path / "journal"
    run_id = client.run("fragile", journal=str(journal))["run_id"]
    until(lambda: client.get(f"/v1/runs/{run_id}").json()["state"] == "outcome_unknown", "the run is parked")
    assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 409
    done = platform.cli("run", "reconcile", run_id, "--tenant-id", str(platform.tenant), word, "--json")
    assert done.returncode == 0, done.stderr
    run = client.finished(run_id)
    assert run["state"] == "succeeded"
    assert len(journal.read_text().splitlines()) == effects
    again = platform.cli("run", "reconcile", run_id, "--tenant-id", str(platform.tenant), word)
    assert again.returncode == 1


def test_a_call_deaf_to_cancels_is_ended_by_force(client: Any, gate: Any) -> None:
    run_id = client.run("stubborn", gate=str(gate))["run_id"]
    gate.entered()
    client.post(f"/v1/runs/{run_id}/cancel")
    run = client.finished(run_id)
    assert (run["state"], run["steps"][-1]["state"]) == ("cancelled", "superseded")


def test_a_grant_that_expires_while_its_call_waits_is_not_used_and_the_step_is_admitted_again(
    launch: Any, platform: Any, until: Any, gate: Any, tmp_path: Path
) -> None:
    policy = yaml.safe_load(Path(platform.environment["PLM_POLICY"]).read_text(encoding="utf-8"))
    policy["grant_seconds"] = 0.5
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
    with launch(PLM_POLICY=str(tmp_path / "policy.yaml"), PLM_PLUGIN_CONCURRENCY="1") as server:
        client = server.client()
        holder = client.run("hold", gate=str(gate))["run_id"]
        gate.entered()
        waiting = client.run("echo")["run_id"]
        client.wait(waiting, "step_granted")
        books = server.database()
        expired = "SELECT count(*) FROM grants WHERE run_id = %s AND expires_at < clock_timestamp()"
        until(lambda: books.execute(expired, [waiting]).fetchone()[0], "the waiting call's grant expires")
        gate.open()
        run = client.finished(waiting)
        assert [step["state"] for step in run["steps"]] == ["not_started", "succeeded"]
        assert run["steps"][0]["error"]["category"] == "grant_expired"
        assert _spent(run)["calls"] == "1"
        assert client.finished(holder)["state"] == "succeeded"


def test_runs_of_two_tenants_never_share_a_worker_of_a_plugin_that_keeps_something(platform: Any, client: Any) -> None:
    other = platform.client(tenant=platform.other_tenant)
    seen: dict[str, list[dict[str, Any]]] = {"mine": [], "theirs": []}
    for _ in range(2):
        for owner, secret in ((client, "mine"), (other, "theirs")):
            seen[secret].append(owner.finished(owner.run("remember", value=secret)["run_id"])["result"])
    pids = {whose: {result["pid"] for result in results} for whose, results in seen.items()}
    assert not pids["mine"] & pids["theirs"]
    assert seen["mine"][1]["memory"][-1:] == ["mine"], "the worker of a tenant is kept"
    assert seen["theirs"][1]["memory"][-1:] == ["theirs"]
    assert "theirs" not in str(seen["mine"])
    assert "mine" not in str(seen["theirs"])


def test_a_confidential_plugin_has_a_worker_for_each_run_and_holds_the_required_layers(launch: Any) -> None:
    with launch(PLM_PLUGINS_CONFIDENTIAL="probe", PLM_PLUGIN_REQUIRE="seccomp,no_new_privs") as server:
        client = server.client()
        runs = [client.finished(client.run("remember", value="x")["run_id"]) for _ in range(2)]
    assert [run["state"] for run in runs] == ["succeeded", "succeeded"]
    first, second = (run["result"] for run in runs)
    assert first["pid"] != second["pid"]
    assert second["memory"] == [], "there is no memory of the run before"


def test_a_plugin_that_is_confined_by_less_than_is_required_carries_out_nothing(launch: Any) -> None:
    with launch(PLM_PLUGIN_REQUIRE="landlock:900") as server:
        client = server.client()
        run = client.finished(client.run("echo")["run_id"])
    assert run["state"] == "failed"
    assert "landlock:900" in str(run["steps"])
