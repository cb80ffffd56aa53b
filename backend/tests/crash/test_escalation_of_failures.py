"""Killed between a failure and the end of its escalation: the run goes on once, or ends for its first reason.

The file of a run's second call cannot be read for a while, so that the call comes to nothing until humans are asked.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil
import pytest

FILE = {"name": "note.txt", "mime_type": "text/plain", "text": "a note"}
SERVER = "PostgreSQL"
SIDES = ("before", "after")
OPERATIONS = {
    "raise": ("approvals.ask", "admission.settle", "driver.drive", "signals.changed"),
    "again": ("approvals.provide_input", "runs.take"),
    "deny": ("approvals.decide", "runs.take", "runs.finish", "driver.drive"),
    "deadline": ("runs.revive", "runs.take"),
}
"""What is crossed while the failure is raised, and after each answer to it."""

SOME = [("raise", "approvals.ask.after"), ("again", "admission.begin.after"), ("deadline", SERVER)]
POINTS = [(part, f"{name}.{side}") for part, names in OPERATIONS.items() for name in names for side in SIDES]
EVERY_CASE = [*SOME, *(case for case in POINTS if case not in SOME)]
WHOLE = float(os.environ.get("SOAK", "0.05")) >= 1


@pytest.fixture(scope="module")
def cluster(open_cluster: Callable[..., Any]) -> Iterator[Any]:
    with open_cluster("serve", "serve") as opened:
        yield opened
        opened.consistent()


@pytest.mark.parametrize(("part", "point"), EVERY_CASE if WHOLE else SOME)
def test_whoever_is_killed_an_escalation_has_one_end(cluster: Any, part: str, point: str, journal: Any) -> None:
    cluster.repair()
    folder = journal("journal")
    run_id, mend = _to_its_failure(cluster, folder)
    trap = _strike(cluster, run_id, point) if part == "raise" else None
    folder.open("warm")
    cluster.until(lambda: cluster.run(run_id)["reason"] == "input_required", "a human is asked")
    try:
        if part != "raise":
            trap = _strike(cluster, run_id, point)
        answer = "again" if part == "raise" else part
        if answer == "again":
            mend()
        _answer(cluster, run_id, answer)
        run = _end(cluster, run_id)
        assert trap is None or trap.reached(), "the story goes past its point"
    finally:
        cluster.points.release_all()
        mend()
    assert _raised(cluster, run_id) == ["attempts_exhausted"], cluster.story(run_id)
    tickets = cluster.query("SELECT state FROM approval_tickets WHERE run_id = %s", run_id)
    went_on = answer == "again"
    assert tickets == [({"again": "approved", "deny": "denied", "deadline": "expired"}[answer],)]
    assert (run["state"], run["reason"]) == (("succeeded", None) if went_on else ("failed", "attempts_exhausted"))
    assert folder.effects() == (Counter(warm=1, act=1) if went_on else Counter(warm=1))
    done = [step["step_id"] for step in run["steps"] if step["state"] == "succeeded"]
    assert done == (["warm", "act/escalation", "act"] if went_on else ["warm"])
    spent = "SELECT spent, reserved FROM budgets WHERE scope_kind = 'run' AND scope_id = %s AND unit = 'calls'"
    assert cluster.query(spent, run_id) == [(1 + went_on, 0)], "each call is charged once, and nothing is left reserved"


def _to_its_failure(cluster: Any, journal: Any) -> tuple[str, Callable[[], None]]:
    """A run in its first call whose file is out of reach by now, and what puts that back."""
    journal.close("warm")
    request = {"agent": "needing", "inputs": {"journal": str(journal.folder)}, "files": {"file": FILE}}
    made = cluster.ask("POST", "/v1/runs", json=request, headers={"Idempotency-Key": str(journal.folder)})
    assert made.status_code == 202, made.text
    run_id = str(made.json()["run_id"])
    cluster.until(lambda: journal.entered("warm"), "the first call begins")
    ((uri,),) = cluster.query("SELECT storage_uri FROM artifacts WHERE run_id = %s", run_id)
    file = Path(unquote(urlsplit(uri).path))
    kept = file.rename(journal.folder / "kept")
    file.mkdir()  # where a file should be, so that the store fails

    def mend() -> None:
        if kept.exists():
            file.rmdir()
            kept.rename(file)

    return run_id, mend


def _strike(cluster: Any, run_id: str, point: str) -> Any:
    """Kill who comes to this point next; the server at once, where it is its turn."""
    if point != SERVER:
        return cluster.points.kill(point, run_id=run_id if point.startswith(("admission.", "runs.finish")) else None)
    postmaster = psutil.Process(int((cluster.postgres.cluster_dir / "postmaster.pid").read_text().splitlines()[0]))
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)
    cluster.postgres.start()
    return None


def _answer(cluster: Any, run_id: str, answer: str) -> None:
    if answer == "deadline":
        passed = "UPDATE approval_tickets SET deadline = now() WHERE run_id = %s AND state = 'pending' RETURNING id"
        assert cluster.query(passed, run_id) != []
        return
    ((ticket,),) = cluster.query("SELECT id FROM approval_tickets WHERE run_id = %s", run_id)
    word = {"decision": "provide_input", "input": "again"} if answer == "again" else {"decision": "deny"}
    said = cluster.ask("POST", f"/v1/approvals/{ticket}/decision", token=cluster.approver, json=word)
    assert said.status_code == 200, said.text


def _end(cluster: Any, run_id: str) -> dict[str, Any]:
    """How it ends, with nobody saying anything more."""

    def ended() -> dict[str, Any] | None:
        cluster.repair()
        run: dict[str, Any] = cluster.run(run_id)
        return run if run["finished_at"] else None

    run: dict[str, Any] = cluster.until(ended, f"run {run_id} ends")
    return run


def _raised(cluster: Any, run_id: str) -> list[str]:
    raised = "SELECT payload::jsonb ->> 'reason' FROM events WHERE stream = %s AND kind = 'escalation_raised'"
    return [reason for (reason,) in cluster.query(raised, f"run/{run_id}")]
