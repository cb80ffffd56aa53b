"""The first `plm-cli serve` of an installation: anywhere, beside others, interrupted, and with something missing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from plm_backend.database import DATABASE
from plm_backend.state import LocalState
from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision

BIN = Path(sys.executable).parent
MIGRATION_LOCK = 0x706C6D03
"""What the engine's migrations take first: whoever holds it stops them in the middle of all migrations."""


@dataclass(kw_only=True)
class First:
    """A `plm-cli serve` in development, on a state folder of its own and without a word about ports."""

    process: subprocess.Popen[str]
    ready: Path

    @property
    def url(self) -> str:
        url: str = json.loads(self.ready.read_text(encoding="utf-8"))["url"]
        return url

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; the exit code and the last line that was said."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, (said.splitlines() or [""])[-1]

    def refused(self) -> str:
        """The one sentence of a start that ends by itself."""
        said = self.process.communicate(timeout=120)[1]
        assert self.process.returncode == 3, said
        (line,) = said.splitlines()
        assert line.startswith("plm-cli: ")
        return line

    def serves(self, until: Any) -> None:
        """It becomes ready, with its database, and ends as asked, with its database."""
        until(lambda: self.ready.exists() or self.process.poll() is not None, "the first start comes to an end")
        assert self.process.poll() is None, self.process.communicate()[1]
        assert httpx.get(f"{self.url}/v1/health/ready").status_code == 200
        assert self.end(signal.SIGTERM)[0] == 0


@pytest.fixture
def serve(environment: Any, tmp_path: Path) -> Iterator[Any]:
    started: list[First] = []

    def start(state: Path, *, inside: Any = None, ready_in: Path = tmp_path, **settings: str) -> First:
        ready = ready_in / f"ready-{len(started)}.json"
        command = [BIN / "plm-cli", "serve", "--ready-file", ready]
        process = subprocess.Popen(
            inside(*command) if inside else command,
            env=environment(PLM_STATE_DIR=str(state), **settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(First(process=process, ready=ready))
        return started[-1]

    yield start
    for first in started:
        first.process.terminate()
        first.process.communicate(timeout=60)
    for lock in tmp_path.glob("*/postgres/lock"):
        EmbeddedPostgres(lock.parent).remove()  # root's clusters may live elsewhere


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "état 数据"


def test_an_initdb_that_is_interrupted_or_killed_is_made_anew_by_the_next_start(
    serve: Any, state: Path, until: Any
) -> None:
    for number, ending in ((signal.SIGINT, (130, True)), (signal.SIGKILL, (-signal.SIGKILL, False))):
        first = serve(state)
        server = EmbeddedPostgres(state / "postgres")
        until(lambda server=server: any(server.cluster_dir.parent.glob("*.new")), "initdb is at work")
        code, last = first.end(number)
        assert (code, "interrupted; what was finished is kept" in last) == ending
        assert not server.cluster_dir.exists(), "a cluster is there as a whole or not at all"
    serve(state).serves(until)


def test_migrations_that_are_interrupted_or_killed_are_gone_through_by_the_next_start(
    serve: Any, state: Path, until: Any
) -> None:
    secrets = LocalState(state)
    with EmbeddedPostgres(state / "postgres") as server:
        urls = provision(
            server.admin_dsn,
            DATABASE,
            owner_password=secrets.secret("plm_owner"),
            app_password=secrets.secret("plm_app"),
        )
        for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
            with held_up_migrations(urls, until) as waiting:
                first = serve(state)
                until(waiting, "the engine's migrations wait")
                assert first.end(number)[0] == code
        serve(state).serves(until)
    assert not server.running


@contextmanager
def held_up_migrations(urls: DatabaseUrls, until: Any) -> Iterator[Any]:
    """No process comes further than between the migrations of two packages; answers whether one waits there."""
    waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted)"
    with psycopg.connect(urls.owner, autocommit=True) as blocker:
        # A killed process's session may still hold the lock for a moment.
        until(lambda: blocker.execute("SELECT pg_try_advisory_lock(%s)", [MIGRATION_LOCK]).fetchone()[0], "the lock")
        yield lambda: blocker.execute(waits, [MIGRATION_LOCK]).fetchone()[0]


def test_two_instances_beside_each_other_choose_their_own_ports_folders_and_databases(
    serve: Any, tmp_path: Path, until: Any
) -> None:
    one, other = serve(tmp_path / "one"), serve(tmp_path / "other")
    until(lambda: one.ready.exists() and other.ready.exists(), "both are ready")
    assert one.url != other.url
    one.serves(until)
    other.serves(until)


def test_a_first_start_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    serve: Any, machine: Any, open_folder: Path, until: Any
) -> None:
    disk = machine.small_disk(open_folder)
    state = open_folder / "state"
    said = serve(state, inside=disk.here).refused()
    assert "No space left on device" in said
    assert "make room, then start again" in said
    disk.grow()
    serve(state, inside=disk.here).serves(until)


def test_an_ordinary_user_starts_with_a_database_of_their_own_and_is_told_of_a_folder_that_is_not_theirs(
    serve: Any, machine: Any, open_folder: Path, until: Any
) -> None:
    theirs = {"inside": machine.as_ordinary_user, "ready_in": open_folder, "HOME": str(open_folder)}
    serve(open_folder / "state", **theirs).serves(until)
    cluster = open_folder / "state" / "postgres" / "cluster"
    assert cluster.stat().st_uid == machine.ordinary_user[0]
    said = serve(Path("/usr/plm-state"), **theirs).refused()
    assert "/usr/plm-state: Permission denied; name a folder of your own in PLM_STATE_DIR" in said


@pytest.mark.parametrize("lacks", ["network", "space"])
def test_a_demo_that_cannot_install_its_plugins_says_what_is_missing(
    environment: Any, machine: Any, tmp_path: Path, lacks: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    inside, said = {
        "network": (machine.without_network, "the package index cannot be reached; check the network"),
        "space": (machine.small_disk(state).here, "no space is left in "),
    }[lacks]
    settings = {"PLM_STATE_DIR": str(state), "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    done = subprocess.run(
        inside(BIN / "plm-cli", "demo", "--json"),
        env=environment(**settings),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("plm-cli: the plugins could not be installed: ")
    assert said in line


def test_a_server_program_that_is_no_supported_postgresql_is_named(serve: Any, state: Path, tmp_path: Path) -> None:
    old = tmp_path / "bin"
    old.mkdir()
    (old / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n", encoding="utf-8")
    (old / "postgres").chmod(0o755)
    said = serve(state, PLM_PG_BIN_DIR=str(old)).refused()
    assert f"{old} holds no PostgreSQL 15 to 18" in said
    assert "set PLM_PG_BIN_DIR" in said
