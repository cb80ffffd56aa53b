"""Delivery and death: jobs follow their transaction, doubles are harmless, and no process is needed twice."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from plm_backend import run_queue
from procrastinate.exceptions import ConnectorException

BACKEND = Path(__file__).parents[1]
ENQUEUE = "SELECT delivery.enqueue_drive_v1(gen_random_uuid(), gen_random_uuid())"
CUT = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'plm_app'"
COUNT = "SELECT count(*) FROM delivery.procrastinate_jobs"


def test_a_job_exists_exactly_when_its_transaction_commits_and_wakes_a_worker_then(new_database: Any) -> None:
    database = new_database()
    with psycopg.connect(database.app) as writer, psycopg.connect(database.app, autocommit=True) as listener:
        listener.execute('LISTEN "procrastinate_queue_v1#drive"')
        writer.execute(ENQUEUE)
        writer.rollback()
        assert listener.execute(COUNT).fetchone() == (0,)
        writer.execute(ENQUEUE)
        assert list(listener.notifies(timeout=0)) == []
        writer.commit()
        assert listener.execute(COUNT).fetchone() == (1,)
        assert len(list(listener.notifies(timeout=30, stop_after=1))) == 1


async def test_a_job_for_later_is_one_for_each_run_and_waits_for_its_time(new_database: Any) -> None:
    """A run that waits for a resource is driven again and again: a double would have one of its own each time."""
    database, delivery = new_database(), run_queue.ProcrastinateDelivery()
    tenant, first, second = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    due = "SELECT args ->> 'run_id' FROM delivery.procrastinate_fetch_job_v2(ARRAY['drive'], NULL) WHERE id IS NOT NULL"
    async with await psycopg.AsyncConnection.connect(database.app) as connection:

        async def count() -> int:
            row = await (await connection.execute(COUNT)).fetchone()
            assert row is not None
            return int(row[0])

        for run_id in (first, first, second, first):
            await delivery.enqueue(connection, tenant, run_id, after_seconds=3600)
        assert await count() == 2
        assert await (await connection.execute(due)).fetchall() == []
        await delivery.enqueue(connection, tenant, first)
        assert await (await connection.execute(due)).fetchall() == [(str(first),)], "others do not wait for it"
        await connection.execute(
            "UPDATE delivery.procrastinate_jobs SET scheduled_at = now() WHERE args ->> 'run_id' = %s", [str(second)]
        )
        assert await (await connection.execute(due)).fetchall() == [(str(second),)]
        await delivery.enqueue(connection, tenant, second, after_seconds=3600)
        assert await count() == 4, "the one that is begun is none that waits"


def test_doubled_jobs_change_nothing(platform: Any, client: Any, gate: Any, until: Any) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    gate.entered()
    books = platform.database()
    for _ in range(5):
        books.execute("SELECT delivery.enqueue_drive_v1(%s, %s)", [platform.tenant, run_id])
    jobs = "SELECT count(*) FROM delivery.procrastinate_jobs WHERE args ->> 'run_id' = %s"
    until(lambda: books.execute(jobs, [run_id]).fetchone()[0] == 1, "only the job that drives the run is left")
    gate.open()
    run = client.finished(run_id)
    assert len(run["steps"]) == 1
    assert [message.event for message in client.events(run_id)].count("run_taken") == 1


def _verified(server: Any) -> None:
    done = server.cli("events", "verify", "--tenant-id", str(server.tenant), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(stream["consistent"] for stream in json.loads(done.stdout)["streams"])


@contextmanager
def _worker(server: Any, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [Path(sys.executable).with_name("plm-cli"), "worker"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=dict(server.environment), stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def test_a_killed_server_s_run_is_finished_by_a_worker_of_another_process(
    launch: Any, gate: Any, until: Any, tmp_path: Path
) -> None:
    with launch() as server:
        run_id = server.client().run("hold-then-echo", gate=str(gate))["run_id"]
        gate.entered()
        plugins = psutil.Process(server.process.pid).children(recursive=True)
        assert plugins
        server.stop(signal.SIGKILL)
        until(lambda: not any(each.is_running() for each in plugins), "the plugins of the killed server are gone")
        gate.open()
        books = server.database()
        books.execute("DELETE FROM delivery.procrastinate_workers")  # as every worker does with those long silent
        with _worker(server, tmp_path / "worker.log") as worker:
            state = "SELECT state FROM run_states WHERE run_id = %s"
            until(lambda: books.execute(state, [run_id]).fetchone()[0] == "succeeded", "the worker finishes the run")
            taken = "SELECT actor FROM events WHERE stream = %s AND kind = 'run_taken' ORDER BY seq"
            takers = [row[0] for row in books.execute(taken, [f"run/{run_id}"]).fetchall()]
            assert takers[0].endswith(f"/{server.process.pid}")
            assert takers[-1].endswith(f"/{worker.pid}")
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 0
            assert books.execute(COUNT).fetchone() == (0,), "no job is left behind by the killed server"
        _verified(server)
        with launch(like=server) as restarted:
            run = restarted.client().finished(run_id)
            assert [step["state"] for step in run["steps"]] == ["superseded", "succeeded", "succeeded"]


def test_a_stopped_server_ends_cleanly_with_a_run_and_a_client_under_way(launch: Any, gate: Any, until: Any) -> None:
    with launch() as server:
        client = server.client()
        run_id = client.run("hold", gate=str(gate))["run_id"]
        gate.entered()
        with client.stream("GET", f"/v1/runs/{run_id}/events") as stream:
            next(stream.iter_lines())
            plugins = psutil.Process(server.process.pid).children(recursive=True)
            assert plugins
            assert server.stop(signal.SIGTERM) == 0
        assert not any(each.is_running() for each in plugins)
        assert "Traceback" not in server.log.read_text()
        gate.open()
        with launch(like=server) as restarted:
            assert restarted.client().finished(run_id)["state"] == "succeeded"
        _verified(server)


def test_a_server_whose_database_connections_are_cut_goes_on(launch: Any, until: Any) -> None:
    with launch() as server, psycopg.connect(server.environment["PG_ADMIN_DSN"], autocommit=True) as owner:
        client = server.client()
        client.finished(client.run("echo")["run_id"])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            owner.execute(CUT)
        with psycopg.connect(server.environment["PG_DSN"], autocommit=True) as own:
            own.execute(f"{CUT} AND pid <> pg_backend_pid() AND datname = current_database()")
        until(lambda: client.get("/v1/runs").status_code == 200, "the API answers again")
        assert client.finished(client.run("echo")["run_id"])["state"] == "succeeded"


def test_a_call_goes_on_while_the_database_connections_are_cut(launch: Any, gate: Any, until: Any) -> None:
    with launch() as server:
        client = server.client()
        run_id = client.run("hold", gate=str(gate))["run_id"]
        gate.entered()
        with psycopg.connect(server.environment["PG_DSN"], autocommit=True) as own:
            own.execute(f"{CUT} AND pid <> pg_backend_pid() AND datname = current_database()")
            own.execute("SELECT pg_sleep(1)")  # longer than it takes to notice
        until(lambda: client.get("/v1/runs").status_code == 200, "the API answers again")
        gate.open()
        assert [step["state"] for step in client.finished(run_id)["steps"]] == ["succeeded"]


def test_a_server_of_the_operators_choice_can_run_the_application(platform: Any, until: Any, tmp_path: Path) -> None:
    with socket.socket() as listener, (tmp_path / "uvicorn.log").open("wb") as log:
        listener.bind(("127.0.0.1", 0))
        command = [sys.executable, "-m", "uvicorn", "main:app", "--app-dir", BACKEND, "--fd", str(listener.fileno())]
        server = subprocess.Popen(
            command, env=platform.environment, stdout=log, stderr=log, pass_fds=[listener.fileno()]
        )
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            token = platform.client().headers["Authorization"]
            until(lambda: b"startup complete" in (tmp_path / "uvicorn.log").read_bytes(), "the server starts")
            with httpx.Client(base_url=url, headers={"Authorization": token}) as client:
                run_id = client.post("/v1/runs", json={"agent": "echo"}).json()["run_id"]
            assert platform.client().finished(run_id)["state"] == "succeeded"
        finally:
            server.terminate()
            assert server.wait(30) in (0, -signal.SIGTERM)


class LostTwice:
    """A delivery engine that loses its listening connection, and another in the same moment."""

    def __init__(self, connector: Any) -> None:
        self._connector = connector

    @asynccontextmanager
    async def open_async(self) -> AsyncIterator[LostTwice]:
        yield self

    async def run_worker_async(self, **_: Any) -> None:
        self._connector.deaf.set_exception(ConnectorException("no longer listening"))
        raise ConnectorException("no longer fetching")


async def test_a_database_that_is_lost_by_two_connections_at_once_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nothing(*_: Any) -> None: ...

    monkeypatch.setattr(run_queue._Connector, "execute_query_async", nothing)
    monkeypatch.setattr(run_queue, "_engine", lambda connector, _: LostTwice(connector))
    with pytest.raises(ConnectorException, match="listening"):
        await run_queue._deliver_while_connected("postgresql://nowhere/none", nothing, 1)
    gc.collect()
    assert "never retrieved" not in caplog.text
