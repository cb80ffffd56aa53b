"""One budget, many processes: what is granted is exactly the limit, and what the killed had reserved comes back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from plm_engine_core import migrations
from plm_shared import migrations as kernel_migrations
from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plm_shared.testing.databases import create_tenants

SOAK = float(os.environ.get("SOAK", "0.05"))
CALLS = 200  # as `spender` has it
PROCESSES = 16
DELIVERIES = b"CREATE TABLE deliveries (tenant_id uuid, run_id uuid); GRANT INSERT ON deliveries TO plm_engine_writer"
SCRIPT = Path(__file__).with_name("spender.py")
LONGEST = 300.0  # seconds that anything here may take on a loaded machine


def start(command: str, urls: DatabaseUrls, tenant: UUID, number: int, face: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(SCRIPT), command, urls.app, str(tenant), str(number), face]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {LONGEST:g} s"
        time.sleep(0.05)


def count(urls: DatabaseUrls, query: str) -> int:
    with psycopg.connect(urls.admin) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


OVER = "SELECT count(*) FROM budgets WHERE spent + reserved > limit_amount"


def test_a_demand_of_four_times_the_budget_is_granted_exactly_once(engine_database: DatabaseUrls) -> None:
    """Sixteen processes at once, through both faces, with a run each."""
    with psycopg.connect(engine_database.admin, autocommit=True) as connection:
        connection.execute(DELIVERIES)
    (tenant,) = create_tenants(engine_database, "spending")
    crowd = start("crowd", engine_database, tenant, PROCESSES, "both")
    output, errors = crowd.communicate(timeout=LONGEST)
    assert crowd.returncode == 0, errors
    said = [line.split() for line in output.splitlines()]
    assert len(said) == PROCESSES
    assert sum(int(granted) for granted, *_ in said) == CALLS
    assert {reason for _, *reasons in said for reason in reasons} == {"budget_exceeded"}
    assert count(engine_database, "SELECT count(*) FROM grants") == CALLS
    recorded = "SELECT count(*) FROM events WHERE kind = 'step_{}'"
    assert count(engine_database, recorded.format("granted")) == CALLS
    assert count(engine_database, recorded.format("denied")) == 3 * CALLS
    held = "SELECT reserved FROM budgets WHERE scope_kind = 'tenant' AND unit = 'calls'"
    assert count(engine_database, held) == CALLS


@pytest.fixture
def mortal() -> Iterator[tuple[EmbeddedPostgres, DatabaseUrls]]:
    """A durable server that the test may kill."""
    with tempfile.TemporaryDirectory(prefix="plm-spend-") as name:
        Path(name).chmod(0o711)  # the server's account must pass through it when root runs the tests
        server = EmbeddedPostgres(Path(name))
        server.start()
        try:
            urls = provision(server.admin_dsn, "spent")
            kernel_migrations.upgrade(urls.owner)
            migrations.upgrade(urls.owner)
            with psycopg.connect(urls.admin, autocommit=True) as connection:
                connection.execute(DELIVERIES)
            yield server, urls
        finally:
            server.start()  # a test that failed may have left it dead
            server.remove()


@contextmanager
def spending(urls: DatabaseUrls, tenant: UUID, many: int) -> Iterator[list[subprocess.Popen[str]]]:
    spenders = [start("forever", urls, tenant, seed, ("async", "sync")[seed % 2]) for seed in range(many)]
    try:
        yield spenders
    finally:
        for spender in spenders:
            spender.kill()
        for spender in spenders:
            spender.communicate()


def test_whoever_is_killed_no_limit_is_passed_and_every_reservation_comes_back(
    mortal: tuple[EmbeddedPostgres, DatabaseUrls],
) -> None:
    server, urls = mortal
    (tenant,) = create_tenants(urls, "killed")
    dice = random.Random(5)  # a test that can be repeated
    with spending(urls, tenant, 3) as spenders:
        for shot in range(max(4, int(60 * SOAK))):
            before = count(urls, "SELECT count(*) FROM run_steps")
            until(lambda before=before: count(urls, "SELECT count(*) FROM run_steps") >= before + 8, "spending")
            if shot % 4 == 3:
                postmaster = int((server.cluster_dir / "postmaster.pid").read_text().split("\n", 1)[0])
                os.kill(postmaster, signal.SIGKILL)
                server.start()
            else:
                victim = dice.randrange(len(spenders))
                spenders[victim].send_signal(signal.SIGKILL)
                spenders[victim].communicate()
                spenders[victim] = start("forever", urls, tenant, 100 + shot, ("async", "sync")[shot % 2])
            assert count(urls, OVER) == 0
    recover(urls, tenant)
    assert count(urls, OVER) == 0
    assert count(urls, "SELECT count(*) FROM budgets WHERE reserved <> 0") == 0
    spent = "SELECT count(*) FROM grants WHERE outcome NOT IN ('not_started', 'superseded')"
    held = "SELECT spent FROM budgets WHERE scope_kind = 'tenant' AND unit = 'calls'"
    assert count(urls, held) == count(urls, spent) > 0


def recover(urls: DatabaseUrls, tenant: UUID) -> None:
    """What recovery comes to: each run nobody holds any more is driven, by whoever finds it."""
    left = "SELECT count(*) FROM run_states WHERE state = 'running' AND lease_expires_at > clock_timestamp()"
    until(lambda: count(urls, left) == 0, "the last lease")
    driver = start("recover", urls, tenant, 0, "async")
    _, errors = driver.communicate(timeout=LONGEST)
    assert driver.returncode == 0, errors
    open_ones = "SELECT count(*) FROM run_states WHERE state NOT IN ('succeeded', 'failed', 'outcome_unknown')"
    assert count(urls, open_ones) == 0
