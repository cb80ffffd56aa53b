"""One resource, many processes: never two calls at once, and whoever is killed, the lock comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psycopg
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants

SOAK = float(os.environ.get("SOAK", "0.05"))
PROCESSES = 16 if SOAK >= 1 else 6
CALLS = 10  # that each process is granted
KILLS = max(3, int(10 * SOAK))
SCRIPT = Path(__file__).with_name("locker.py")
LONGEST = 300.0  # seconds that anything here may take on a loaded machine

SETUP = (
    "CREATE TABLE deliveries (tenant_id uuid, run_id uuid); GRANT INSERT ON deliveries TO plm_engine_writer",
    # Every call here is on one resource, so this is what the lock promises; who breaks it fails.
    "CREATE UNIQUE INDEX one_call_at_a_time ON grants (tenant_id) WHERE state = 'begun'",
)
HOLDERS = """
    SELECT r.lease_owner::integer FROM grants AS g
    JOIN run_states AS r ON r.tenant_id = g.tenant_id AND r.run_id = g.run_id WHERE g.state = 'begun'
"""
TAKEN_OVER = "SELECT count(*) FROM grants WHERE outcome = 'superseded'"
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
EXPIRED = "SELECT count(*) FROM grants WHERE outcome = 'not_started' AND begun_at IS NULL"
HELD = "SELECT count(*) FROM resource_locks AS l WHERE engine_lock_holder_v1(l) <> 'expired'"


def rows(urls: DatabaseUrls, query: str) -> list[int]:
    with psycopg.connect(urls.admin) as connection:
        return [int(row[0]) for row in connection.execute(query.encode())]


@contextmanager
def locking(urls: DatabaseUrls, tenant: UUID) -> Iterator[Callable[[], dict[int, subprocess.Popen[str]]]]:
    """Answers the processes; each one that ended well or was killed is replaced by then."""
    running: dict[int, subprocess.Popen[str]] = {}

    def processes() -> dict[int, subprocess.Popen[str]]:
        for pid, each in list(running.items()):
            if each.poll() is not None:
                _, errors = running.pop(pid).communicate()
                assert each.returncode in (0, -signal.SIGKILL), errors
        while len(running) < PROCESSES:
            arguments = [sys.executable, str(SCRIPT), urls.app, str(tenant), str(CALLS)]
            started = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running[started.pid] = started
        return running

    try:
        yield processes
    finally:
        for each in running.values():
            each.kill()
        for each in running.values():
            each.communicate()


def test_of_many_processes_one_at_a_time_has_it_and_of_whoever_is_killed_it_comes_back(
    engine_database: DatabaseUrls,
) -> None:
    with psycopg.connect(engine_database.admin, autocommit=True) as connection:
        for statement in SETUP:
            connection.execute(statement.encode())
    (tenant,) = create_tenants(engine_database, "locking")
    end = time.monotonic() + LONGEST
    with locking(engine_database, tenant) as processes:
        while rows(engine_database, TAKEN_OVER) < [KILLS]:
            assert time.monotonic() < end, "no lock of a killed process came back"
            running = processes()
            for victim in (running.get(pid) for pid in rows(engine_database, HOLDERS)):
                if victim is not None:
                    victim.kill()
                    victim.wait()
            time.sleep(0.3)  # to let some go on
        last = [(each, each.communicate(timeout=LONGEST)) for each in processes().values()]
        assert [each.returncode for each, _ in last] == [0] * PROCESSES, [errors for _, (_, errors) in last]
    assert rows(engine_database, HELD) == [0]
    assert rows(engine_database, EXPIRED) > [0]
    assert rows(engine_database, DEADLOCKS) == [0]
