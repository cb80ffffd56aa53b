"""A thousand runs that wait for a human are a thousand rows and nothing else; a decision starts its step at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from procrastinate.worker import FETCH_JOB_POLLING_INTERVAL

RUNS, CLIENTS = 1000, 8
DECIDED = 20
DRIVEN_AT_ONCE = 8
POOLS = 32
OPENED_AT_START = 2  # connections or threads more or fewer; one was seen of each
WITHOUT_SWEEPS = {"PLM_RECOVERY_SECONDS": "3600", "PLM_RUN_CONCURRENCY": str(DRIVEN_AT_ONCE)}

STATES = "SELECT state, count(*) FROM run_states GROUP BY state"
HELD = {
    "connections": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'plm_app'",
    "transactions": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'plm_app' "
    "AND state <> 'idle'",
    "jobs": "SELECT count(*) FROM delivery.procrastinate_jobs",
    "leases": "SELECT count(*) FROM run_states WHERE lease_owner IS NOT NULL OR lease_expires_at IS NOT NULL",
    "grants": "SELECT count(*) FROM grants WHERE state <> 'settled'",
    "reservations": "SELECT COALESCE(sum(jsonb_array_length(reserved)), 0) FROM grants WHERE charged IS NULL",
    "reserved": "SELECT COALESCE(sum(reserved), 0) FROM budgets",
}
BOOKS = HELD.keys() - {"connections"}
DELAY = """
SELECT max(occurred_at) FILTER (WHERE kind = 'step_started') - max(occurred_at) FILTER (WHERE kind = 'approval_decided')
FROM events WHERE stream = %s
"""


def _held(server: Any, books: Any) -> dict[str, Any]:
    """What the server, its children and its database hold for it."""
    own = psutil.Process(server.process.pid)
    processes = [own, *own.children(recursive=True)]
    return {
        "processes": len(processes),
        "threads": sum(each.num_threads() for each in processes),
        "descriptors": sum(each.num_fds() for each in processes),
        **{name: books.execute(query).fetchone()[0] for name, query in HELD.items()},
    }


@pytest.fixture
def parked(launch: Any, until: Any) -> Iterator[Any]:
    """A server on which a thousand runs were created over HTTP, all of which wait for an approval."""
    with launch(**WITHOUT_SWEEPS) as server:

        def create(client: Any) -> None:
            for _ in range(RUNS // CLIENTS):
                client.run("write")

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(create, [server.client() for _ in range(CLIENTS)]))
        books = server.database()
        until(lambda: dict(books.execute(STATES).fetchall()) == {"awaiting_approval": RUNS}, "every run is parked")
        yield server


def _steady(server: Any, books: Any, until: Any) -> dict[str, Any]:
    """What is held once it no longer changes: connections of clients that left are closed a moment later."""
    seen = [_held(server, books)]

    def settled() -> bool:
        seen.append(_held(server, books))
        return len(seen) > 10 and all(each == seen[-1] for each in seen[-10:])

    until(settled, "nothing changes any more")
    return seen[-1]


def test_a_thousand_parked_runs_hold_nothing_and_start_at_once_when_approved(
    launch: Any, parked: Any, until: Any, tmp_path: Path
) -> None:
    with launch(**WITHOUT_SWEEPS) as idle:
        nothing = _steady(idle, idle.database(), until)
    books = parked.database()
    left = _steady(parked, books, until)
    assert left.keys() == nothing.keys()
    # Pools of connections and threads keep what the burst of requests made them open, however many runs there were.
    assert {name: count for name, count in left.items() if count - nothing[name] > POOLS} == {}
    assert {name: left[name] for name in BOOKS} == dict.fromkeys(BOOKS, 0)
    assert parked.stop() == 0

    with launch(like=parked) as server:
        held = _steady(server, books, until)
        # How many of them a pool opens depends on who asks at once while it starts; nothing else may differ.
        more = {name: held[name] - nothing[name] for name in ("connections", "threads")}
        assert all(abs(each) <= OPENED_AT_START for each in more.values()), more
        assert held == {
            **nothing,
            "connections": held["connections"],
            "threads": held["threads"],
            "descriptors": nothing["descriptors"] + more["connections"],
        }
        _occupy_all_but_one(server, tmp_path)
        _decide(server, books)
        assert dict(books.execute(STATES).fetchall())["awaiting_approval"] == RUNS - DECIDED
        (tmp_path / "gate").touch()


def _occupy_all_but_one(server: Any, folder: Path) -> None:
    """Leave one run at a time to be driven, as it would be beside parked runs that still held their places."""
    client = server.client()
    for run_id in [client.run("hold", gate=str(folder / "gate"))["run_id"] for _ in range(DRIVEN_AT_ONCE - 1)]:
        client.wait(run_id, "step_started")


def _decide(server: Any, books: Any) -> None:
    """Decide one after the other. No sweep runs, and a job that only a poll finds would take the poll's time."""
    client, approver = server.client(), server.client(scopes=("plm.hitl.resolve",))
    delays = timedelta()
    for number, ticket in enumerate(_tickets(client)[:DECIDED]):
        path = f"/v1/approvals/{ticket['ticket_id']}/decision"
        decision = "approve" if number else "deny"
        assert approver.post(path, json={"decision": decision}).status_code == 200
        run = client.finished(ticket["run_id"])
        if decision == "approve":
            assert (run["state"], run["result"]) == ("succeeded", {"written": "v"})
            delays += books.execute(DELAY, [f"run/{ticket['run_id']}"]).fetchone()[0]
        else:
            assert (run["state"], run["reason"]) == ("failed", "approval_denied")
    # What only polls find waits half an interval in the middle.
    assert delays / DECIDED < timedelta(seconds=FETCH_JOB_POLLING_INTERVAL / 4)


def _tickets(client: Any) -> list[dict[str, Any]]:
    """Every pending ticket, page by page."""
    found, cursor = [], ""
    while cursor is not None:
        given = {"state": "pending", "limit": "200", **({"cursor": cursor} if cursor else {})}
        page = client.get("/v1/approvals", params=given).json()
        found += page["items"]
        cursor = page["next"]
    assert len({ticket["run_id"] for ticket in found}) == len(found) == RUNS
    return found
