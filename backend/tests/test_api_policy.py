"""The policy over HTTP: activated once, followed by every process, and kept over a restart with another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import yaml

OPERATOR = ("plm.policy.activate", "plm.runs.create")
FILE = Path(__file__).parent / "platform" / "policy.yaml"


def _policy(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(FILE.read_text(encoding="utf-8")), **changes}


def _body(policy: dict[str, Any] | None, previous: str | None, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "previous": previous, "reason": "a test", **more}


def test_every_process_follows_an_activation_and_a_restart_with_another_file_says_so(
    launch: Any, until: Any, tmp_path: Path
) -> None:
    with launch() as first:
        client = first.client(scopes=OPERATOR)
        before = client.get("/v1/policy").json()
        assert before["deciding"] == before["file"]
        assert (before["activated"], before["shadow"]) == (None, None)
        blocking = _policy(version="strict", tiers={"probe.echo": "blocked"})
        with launch(like=first, PLM_RUN_CONCURRENCY="0") as second:
            answer = client.post("/v1/policy/activations", json=_body(blocking, None))
            assert answer.status_code == 201, answer.text
            made = answer.json()
            assert (made["number"], made["version"], made["previous"]) == (1, "strict", None)
            for server in (first, second):
                other = server.client()
                until(
                    lambda other=other: other.get("/v1/policy").json()["deciding"]["digest"] == made["digest"],
                    "the process decides by the activated policy",
                )
        refused = first.client().finished(first.client().run("echo")["run_id"])
        assert (refused["state"], refused["reason"]) == ("failed", "capability_blocked")
        conflict = client.post("/v1/policy/activations", json=_body(_policy(), None))
        assert (conflict.status_code, conflict.json()["reason"]) == (409, "policy_changed")
        with launch(like=first, PLM_RUN_CONCURRENCY="0") as restarted:
            assert restarted.client().get("/v1/policy").json()["deciding"]["digest"] == made["digest"]
            assert "does not decide" in restarted.log.read_text(encoding="utf-8")
        again = client.post("/v1/policy/activations", json=_body(_policy(), made["digest"])).json()
        assert again["digest"] == before["file"]["digest"]
        until(lambda: client.get("/v1/policy").json()["deciding"] == before["file"], "the file's policy is back")
        assert first.client().finished(first.client().run("echo")["run_id"])["state"] == "succeeded"


def test_a_process_that_cannot_load_the_active_policy_is_not_ready_and_says_so(launch: Any, until: Any) -> None:
    with launch() as server:
        client = server.client(scopes=OPERATOR)
        text = json.dumps({"version": "of a later release", "unheard_of": True})
        with psycopg.connect(server.environment["PG_ADMIN_DSN"], autocommit=True) as owner:
            owner.execute(
                "INSERT INTO policy_versions SELECT encode(sha256(%s), 'hex'), 'x', %s", [text.encode(), text]
            )
            owner.execute(
                "INSERT INTO policy_activations (number, role, digest, reason, activated_by) "
                "SELECT 1, 'active', digest, 'x', gen_random_uuid() FROM policy_versions"
            )
        until(lambda: client.get("/v1/health/ready").status_code == 503, "the process is not ready any more")
        checks = client.get("/v1/health/ready").json()["checks"]
        assert (checks["database"], checks["policy"]) == ("ok", "the active policy cannot be loaded")
        refused = client.post("/v1/runs", json={"agent": "echo"})
        assert (refused.status_code, refused.json()["code"]) == (503, "dependency/policy_missing")
        digest = client.post("/v1/policy/activations", json=_body(_policy(), None)).json()
        assert digest["reason"] == "policy_changed"


def test_who_may_not_activate_is_refused_and_what_is_no_policy_is_named(platform: Any, client: Any) -> None:
    answer = client.post("/v1/policy/activations", json=_body(_policy(), None))
    assert (answer.status_code, answer.json()["missing_scopes"]) == (403, ["plm.policy.activate"])
    operator = platform.client(scopes=OPERATOR)
    for body, field in (
        (_body(_policy(tier_by_mode={}), None), "tier_by_mode"),
        (_body(_policy(tiers={"no.such": "blocked"}), None), ""),
        (_body(None, None), "policy"),
        (_body(_policy(), None, role="king"), "role"),
    ):
        answer = operator.post("/v1/policy/activations", json=body)
        assert answer.status_code == 422, answer.text
        assert "file" not in answer.json()["detail"], "none was given"
        assert field in answer.text
    assert client.get("/v1/policy").json()["activated"] is None
