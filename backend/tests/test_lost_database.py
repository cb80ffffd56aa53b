"""A database that dies: an embedded server is started again, any other is waited for, and a run worker gives up."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from plm_backend.database import upgrade_all
from plm_backend.reachability import Reachability
from plm_engine_core.control_plane.storage.postgres import open_pool
from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision

NOTHING = "00000000-0000-0000-0000-000000000000"
REQUESTS = [
    ("GET", "/v1/runs"),
    ("POST", "/v1/runs"),
    ("GET", f"/v1/runs/{NOTHING}"),
    ("GET", f"/v1/runs/{NOTHING}/events"),
    ("POST", f"/v1/runs/{NOTHING}/cancel"),
    ("GET", "/v1/approvals"),
    ("GET", f"/v1/artifacts/{NOTHING}"),
    ("DELETE", f"/v1/halts/{NOTHING}"),
]
LISTENERS = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN \"procrastinate%'"
BACK = b"the database is back"
PROBLEM = {"type", "title", "status", "detail", "code"}


def asked(client: httpx.Client) -> set[int]:
    """The statuses of one request of each kind; whatever is no success must be a 503 that says why."""
    with ThreadPoolExecutor(len(REQUESTS)) as at_once:  # each may wait a while for a connection
        answers = list(at_once.map(lambda request: client.request(*request), REQUESTS))
    for answer in answers:
        assert answer.status_code in (200, 404, 422, 503), answer.text
        if answer.status_code == 503:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json().keys() >= PROBLEM
    return {answer.status_code for answer in answers}


def answers_again(client: httpx.Client) -> bool:
    return 503 not in asked(client)


def create_tenants(owner_dsn: str, *tenants: Any) -> None:
    with psycopg.connect(owner_dsn) as owner, owner.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO tenants (id, name) VALUES (%s, %s)", [(tenant, f"tenant {tenant}") for tenant in tenants]
        )


def postmaster(server: EmbeddedPostgres) -> int:
    return int((server.cluster_dir / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])


def test_an_embedded_server_that_is_killed_is_started_again_and_no_run_is_lost(
    launch: Any, platform: Any, gate: Any, until: Any, cli: Any, tmp_path: Path
) -> None:
    state = tmp_path / "mit Leerzeichen é 数据"
    local = {"ENVIRONMENT": "development", "PG_DSN": "", "PG_ADMIN_DSN": "", "PLM_STATE_DIR": str(state)}
    with launch(like=platform, **local) as server:
        exported = shlex.split(server.cli("local-env").stdout.replace("export ", ""))
        addresses = dict(line.split("=", 1) for line in exported)
        create_tenants(addresses["PG_ADMIN_DSN"], server.tenant)
        server.contract = None  # it was asked for before the tenant existed
        client = server.client()
        run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
        gate.entered()
        kept = EmbeddedPostgres(state / "postgres")
        victim = postmaster(kept)
        os.kill(victim, signal.SIGKILL)
        gate.open()
        until(lambda: answers_again(client), "the API answers again")
        assert postmaster(kept) != victim
        assert client.finished(run_id)["state"] == "succeeded"
        log = server.log.read_text(encoding="utf-8")
        assert "the embedded database has died" in log
        assert "the embedded database runs again" in log
        assert "Traceback" not in log

        strict = {**server.environment, **addresses, "ENVIRONMENT": "test"}
        refused = cli("serve", environment=strict)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (3, 1), refused.stderr
        assert "PG_DSN names an embedded database" in refused.stderr
        assert server.stop() == 0
    assert not kept.running
    kept.remove()


@dataclass
class Own:
    """A database server of the operator's, on which nobody else depends."""

    server: EmbeddedPostgres
    urls: DatabaseUrls


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("own") / "data", durable=False)
    try:
        server.start()
        urls = provision(server.admin_dsn, "plm")
        upgrade_all(urls.owner)
        yield Own(server, urls)
    finally:
        server.remove()


def worker(environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [Path(sys.executable).with_name("plm-cli"), "worker"], env=environment, stdout=output, stderr=output
        )


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def test_any_other_database_is_waited_for_and_a_run_worker_gives_up_in_the_end(
    launch: Any, platform: Any, own: Own, until: Any, tmp_path: Path
) -> None:
    create_tenants(own.urls.owner, platform.tenant)
    settings = {"PG_DSN": own.urls.app, "PG_ADMIN_DSN": own.urls.owner, "PLM_RUN_CONCURRENCY": "0"}
    with launch(like=platform, **settings) as server:
        client = server.client()
        works = {**server.environment, "PLM_RUN_CONCURRENCY": "2"}
        hasty_log, patient_log = tmp_path / "hasty.log", tmp_path / "patient.log"
        hasty = worker({**works, "PLM_DATABASE_PATIENCE_SECONDS": "1"}, hasty_log)
        patient = worker(works, patient_log)
        try:
            for log in (hasty_log, patient_log):
                until(lambda log=log: b"working" in log.read_bytes(), "the run worker is ready")
            os.kill(postmaster(own.server), signal.SIGKILL)
            assert hasty.wait(60) == 1
            last = hasty_log.read_text(encoding="utf-8").splitlines()[-1]
            assert last.startswith("plm-cli: the database was away for 1 s; start the run worker again")

            assert asked(client) == {503}
            assert client.get("/v1/health/live").status_code == 200
            ready = client.get("/v1/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert ready.json()["checks"]["database"] != "ok"
            own.server.start()
            until(lambda: answers_again(client), "the API answers again")
            assert client.get("/v1/health/ready").status_code == 200
            assert client.finished(client.run("echo")["run_id"])["state"] == "succeeded"
            assert patient.poll() is None
            for log in (server.log, patient_log):
                said = log.read_text(encoding="utf-8")
                assert said.count("the database cannot be reached; it is tried again until it is back") == 1
                assert said.count("the database is back") == 1
                assert "Traceback" not in said
        finally:
            for process in (hasty, patient):
                end(process)
        assert patient.returncode == 0


def test_a_run_worker_that_missed_its_database_for_a_moment_hears_of_new_jobs_again(
    platform: Any, own: Own, until: Any, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    process = worker({**platform.environment, "PG_DSN": own.urls.app}, log)
    try:
        for _ in range(2):
            with psycopg.connect(own.urls.app, autocommit=True) as books:
                until(lambda: books.execute(LISTENERS).fetchone() == (1,), "the run worker hears of jobs")
            os.kill(postmaster(own.server), signal.SIGKILL)
            own.server.start()
        until(lambda: BACK in log.read_bytes(), "the run worker has its database again")
    finally:
        process.terminate()
        process.wait(30)


def test_a_database_that_is_frozen_is_missed_like_one_that_died(
    platform: Any, own: Own, until: Any, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    process = worker({**platform.environment, "PG_DSN": own.urls.app}, log)
    until(lambda: b"working" in log.read_bytes(), "the run worker is ready")
    server = psutil.Process(postmaster(own.server))
    frozen = [server]
    try:
        server.suspend()  # first, so that it forks no other that would be missed here
        frozen += server.children(recursive=True)
        for each in frozen:
            each.suspend()
        until(lambda: b"cannot be reached" in log.read_bytes(), "the run worker misses the database")
    finally:
        for each in reversed(frozen):
            each.resume()
    until(lambda: BACK in log.read_bytes(), "the run worker has its database again")
    process.terminate()
    assert process.wait(60) == 0


async def test_one_cancel_ends_whoever_looks_at_connections_that_a_frozen_server_holds(own: Own, until: Any) -> None:
    """The pool counts a cancel among the ways in which a connection is found broken."""
    pool = open_pool(own.urls.app, max_size=1)
    async with pool:
        async with pool.connection() as connection:
            backend = psutil.Process(connection.info.backend_pid)
        database = Reachability(on_return=pool.check)
        database.lost(OSError("it does not answer"))
        backend.suspend()
        try:
            found = asyncio.create_task(database.found())
            await asyncio.to_thread(until, lambda: pool.get_stats()["pool_available"] == 0, "the pool looks at its one")
            found.cancel()
            await asyncio.wait([found])
        finally:
            backend.resume()
        assert found.cancelled()


def test_a_run_worker_stops_at_once_when_asked_to_while_the_database_is_away(
    platform: Any, own: Own, until: Any, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    process = worker({**platform.environment, "PG_DSN": own.urls.app}, log)
    until(lambda: b"working" in log.read_bytes(), "the run worker is ready")
    own.server.stop()
    until(lambda: b"cannot be reached" in log.read_bytes(), "the run worker misses the database")
    process.terminate()
    assert process.wait(30) == 0
    assert b"Traceback" not in log.read_bytes().rpartition(b"cannot be reached")[2]
