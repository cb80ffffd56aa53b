"""At every crash point the process that reaches it is killed, and what was asked for still happens, once.

The points are those of the ports, so an operation that is added to a port has no story here until somebody writes it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from plm_backend.artifacts import Artifacts
from plm_engine_core.testing.crash_points import PORTS, crash_points

OF_THE_LIBRARY = ("runs.mark.",)  # no process of the platform is asked for these
EVERY_POINT = tuple(
    point for point in crash_points({**PORTS, "artifacts": Artifacts}) if not point.startswith(OF_THE_LIBRARY)
)
WHOLE = float(os.environ.get("SOAK", "0.05")) >= 1
# Short of a soak each operation is struck on one of its sides, in turn before and after it.
POINTS = EVERY_POINT if WHOLE else tuple(EVERY_POINT[place + place // 2 % 2] for place in range(0, len(EVERY_POINT), 2))
EFFECTS = Counter(warm=1, act=1, sign=1)
FILE = {"name": "note.txt", "mime_type": "text/plain", "text": "a note"}

Story = Callable[[Any, Any, Any], None]


@pytest.fixture(scope="module")
def cluster(open_cluster: Callable[..., Any]) -> Iterator[Any]:
    with open_cluster("serve", "serve") as opened:
        yield opened
        opened.consistent()


def a_run(cluster: Any, journal: Any, trap: Any) -> None:
    """Create with a file, watch it work, approve."""
    journal.close("act")
    request = {"agent": "filed", "inputs": {"journal": str(journal.folder)}, "files": {"file": FILE}}
    run_id = _created(cluster, journal, request)
    cluster.until(lambda: trap.has_caught or journal.entered("act"), "the run is at work")
    if trap.point.startswith("runs.renew"):
        trap.reached()
    journal.open("act")
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def a_repeated_request(cluster: Any, journal: Any, trap: Any) -> None:
    """The same request with its file twice: the second file belongs to nothing and is discarded."""
    request = {"agent": "filed", "inputs": {"journal": str(journal.folder)}, "files": {"file": FILE}}
    first, second = (_created(cluster, journal, request) for _ in range(2))
    assert first == second
    run, _ = cluster.finish(first, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def a_halt(cluster: Any, journal: Any, trap: Any) -> None:
    """Halt a run whose call is at work, and lift that."""
    journal.close("act")
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: journal.entered("act"), "the run is at work")
    scope = {"scope": "run", "scope_id": run_id, "reason": "to be sure"}
    assert cluster.ask("POST", "/v1/halts", json=scope).status_code == 201
    cluster.until(lambda: cluster.run(run_id)["state"] == "halted", "the run is parked")
    journal.open("act")
    for (halt_id,) in cluster.query("SELECT id FROM halts WHERE scope_id = %s", run_id):
        answer = cluster.ask("DELETE", f"/v1/halts/{halt_id}")
        assert answer.status_code == 200, answer.text
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def a_standing_approval(cluster: Any, journal: Any, trap: Any) -> None:
    """Comment on the run's ticket, approve it for further calls too, and take that back."""
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: cluster.run(run_id)["state"] == "awaiting_approval", "the run is parked")
    tickets = cluster.ask("GET", "/v1/approvals?state=pending&limit=200").json()["items"]
    (ticket,) = (each["ticket_id"] for each in tickets if each["run_id"] == run_id)
    path = f"/v1/approvals/{ticket}"
    assert cluster.ask("POST", f"{path}/comments", token=cluster.approver, json={"body": "fine"}).status_code == 201
    said = {comment["body"] for comment in cluster.ask("GET", path).json()["comments"]}
    assert said == {"fine"}
    approval = {"decision": "approve", "scope": {"uses": 2, "seconds": 600}}
    answer = cluster.ask("POST", f"{path}/decision", token=cluster.approver, json=approval)
    assert answer.status_code == 200, answer.text
    ((scope,),) = cluster.query("SELECT id FROM approval_scopes WHERE ticket_id = %s", ticket)
    answer = cluster.ask("DELETE", f"/v1/approval-scopes/{scope}", token=cluster.approver)
    assert answer.status_code == 200, answer.text
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run  # a grant that died with its process has to be asked for again
    assert journal.effects() == EFFECTS


def an_ask(cluster: Any, journal: Any, trap: Any) -> None:
    """The run asks for the name of its effect, and is told; whoever answered asks again when the reply is lost."""
    run_id = cluster.create("asking", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: cluster.run(run_id)["reason"] == "input_required", "the run asks")
    tickets = cluster.ask("GET", "/v1/approvals?state=pending&limit=200").json()["items"]
    (ticket,) = (each["ticket_id"] for each in tickets if each["run_id"] == run_id)
    answer = {"decision": "provide_input", "input": "act"}
    given = cluster.ask("POST", f"/v1/approvals/{ticket}/decision", token=cluster.approver, json=answer)
    assert (given.status_code, given.json()["input"]) == (200, "act"), given.text
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    asked = [step for step in run["steps"] if step["capability"] == "provide_input"]
    assert [(step["state"], step["output"]) for step in asked] == [("succeeded", "act")], "asked once, answered once"
    assert journal.effects() == EFFECTS


def a_cancel(cluster: Any, journal: Any, trap: Any) -> None:
    """Cancel a run whose call is at work."""
    journal.close("act")
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: journal.entered("act"), "the run is at work")
    answer = cluster.ask("POST", f"/v1/runs/{run_id}/cancel")
    assert answer.status_code == 200, answer.text
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "cancelled", run
    assert journal.effects() == Counter(warm=1, act=1)


def an_unknown_outcome(cluster: Any, journal: Any, trap: Any) -> None:
    """A worker dies over an effect that cannot be repeated; somebody says that it happened."""
    journal.close("act")
    run_id = cluster.create("unrepeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: journal.entered("act"), "the run is at work")
    cluster.kill(cluster.holder(run_id))
    cluster.until(lambda: cluster.run(run_id)["state"] == "outcome_unknown", "the run waits for a word")
    word = ["run", "reconcile", run_id, "--tenant-id", str(cluster.tenant), "--happened"]
    if cluster.cli(*word).returncode != 0 and cluster.run(run_id)["state"] == "outcome_unknown":
        done = cluster.cli(*word)
        assert done.returncode == 0, done.stderr
    run, acted = cluster.finish(run_id, journal)
    assert acted.count("outcome_unknown") == 0
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def a_dead_worker(cluster: Any, journal: Any, trap: Any) -> None:
    """A worker dies over an effect that may be repeated; another finds the run."""
    journal.close("act")
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: journal.entered("act"), "the run is at work")
    cluster.kill(cluster.holder(run_id))
    journal.open("act")
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def a_refused_run(cluster: Any, journal: Any, trap: Any) -> None:
    """What an evaluator does not let a run be given creates none, and is on record once it is answered."""
    request = {"agent": "filed", "inputs": {"journal": "poisoned"}, "files": {"file": FILE}}
    key = str(journal.folder)
    answer = cluster.ask("POST", "/v1/runs", json=request, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["reason"]) == (403, "evaluator_denied"), answer.text
    assert cluster.query("SELECT 1 FROM run_states WHERE idempotency_key = %s", key) == []
    ((recorded,),) = cluster.query("SELECT count(*) FROM events WHERE stream = 'tenant' AND kind = 'run_refused'")
    assert recorded >= 1


def a_clock_set_back(cluster: Any, journal: Any, trap: Any) -> None:
    """A worker dies while the database's clock is twelve years ahead, which is then set back."""
    journal.close("act")
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    cluster.until(lambda: journal.entered("act"), "the run is at work")
    cluster.kill(cluster.holder(run_id))
    cluster.query(
        "UPDATE run_states SET updated_at = updated_at + interval '12 years', "
        "lease_expires_at = lease_expires_at + interval '12 years' WHERE run_id = %s RETURNING run_id",
        run_id,
    )
    journal.open("act")
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS


def an_unused_grant(cluster: Any, journal: Any, trap: Any) -> None:
    """A worker waits with a grant until that is over, and renews its run; a sweep gives back what the grant holds."""
    waiting = cluster.points.hold("executor.execute.before")
    run_id = cluster.create("repeatable", key=str(journal.folder), journal=str(journal.folder))
    waiting.reached()
    cluster.query(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE run_id = %s AND state = 'issued' RETURNING id", run_id
    )
    closed = "SELECT 1 FROM run_steps WHERE run_id = %s AND error ->> 'category' = 'grant_expired'"
    cluster.until(lambda: cluster.query(closed, run_id), "what the grant holds comes back")
    waiting.release()
    run, _ = cluster.finish(run_id, journal)
    assert run["state"] == "succeeded", run
    assert journal.effects() == EFFECTS
    ((held,),) = cluster.query("SELECT count(*) FROM grants WHERE run_id = %s AND state <> 'settled'", run_id)
    assert held == 0


STORIES: dict[str, Story] = {
    "admission.expire": an_unused_grant,
    "approvals.ask": an_ask,
    "approvals.provide_input": an_ask,
    "approvals.comment": a_standing_approval,
    "approvals.revoke_scope": a_standing_approval,
    "artifacts.discard": a_repeated_request,
    "executor.cancel": a_halt,
    "halts.end_halted": a_halt,
    "halts.lift": a_halt,
    "halts.trigger": a_halt,
    "runs.reconcile": an_unknown_outcome,
    "runs.refuse": a_refused_run,
    "runs.request_cancel": a_cancel,
    "runs.revive": a_dead_worker,
    "runs.set_back": a_clock_set_back,
    "signals.interrupt": a_halt,
    **dict.fromkeys(
        (
            "admission.admit",
            "admission.admit_as_assumed",
            "admission.begin",
            "admission.settle",
            "admission.prepare",
            "approvals.decide",
            "artifacts.store",
            "audit.write",
            "delivery.enqueue",
            "driver.drive",
            "executor.execute",
            "runs.create",
            "runs.finish",
            "runs.renew",
            "runs.take",
            "signals.changed",
            "signals.progress",
        ),
        a_run,
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_there_loses_nothing(cluster: Any, point: str, journal: Any) -> None:
    cluster.repair()
    story = STORIES[point.rpartition(".")[0]]
    trap = cluster.points.kill(point)
    try:
        story(cluster, journal("journal"), trap)
        assert trap.reached(), "the story goes past its point"
    finally:
        cluster.points.release_all()


def test_every_story_is_of_a_point_that_exists() -> None:
    assert {point.rpartition(".")[0] for point in POINTS} == STORIES.keys()


def _created(cluster: Any, journal: Any, request: dict[str, Any]) -> str:
    answer = cluster.ask("POST", "/v1/runs", json=request, headers={"Idempotency-Key": str(journal.folder)})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["run_id"])
