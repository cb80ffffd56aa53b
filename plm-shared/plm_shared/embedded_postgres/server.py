"""One embedded server: make, start, adopt, stop, remove."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from plm_shared.embedded_postgres.accounts import Account, server_account
from plm_shared.embedded_postgres.binaries import (
    ServerBinaries,
    choose_server,
    data_major,
    find_servers,
    inspect_server,
    reachable,
)
from plm_shared.embedded_postgres.errors import LocationUnsuitable, ServerStartFailed
from plm_shared.embedded_postgres.places import Places, exclusive, lay_out, private_folder, write_secret

SERVER_NAME = "plm-embedded"
"""The `cluster_name` by which every embedded server can be told from others; one for tests has another."""

_SUPERUSER = "postgres"
_START_SECONDS = 60
_STILL_IN_USE = "pre-existing shared memory block"  # orphans of a killed server are about to notice and leave
_ALWAYS = {
    "cluster_name": SERVER_NAME,
    "listen_addresses": "",
    "password_encryption": "scram-sha-256",
    "unix_socket_permissions": "0700",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # One file per weekday, overwritten a week later: the log cannot grow without bound.
    "logging_collector": "on",
    "log_filename": "server-%a.log",
    "log_rotation_age": "1d",
    "log_rotation_size": "0",
    "log_truncate_on_rotation": "on",
}
_FORGETFUL = {"cluster_name": "plm-test", "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """A PostgreSQL server of our own in one folder, shared by every process that names the same folder.

    ``start`` makes the folder's cluster when there is none, and adopts a server that already runs there, be it left by
    a crash or in use by another process; ``stop`` stops it when no other process of ours still uses it.

    ``durable=False`` is for tests that keep their server alive: a killed server loses its last commits, although they
    were acknowledged, and a power cut may cost the whole cluster.

    Every method raises a class of ``PostgresUnavailable`` whose message ends with the remedy.
    """

    def __init__(
        self, data_dir: Path, *, bin_dir: Path | None = None, major: int | None = None, durable: bool = True
    ) -> None:
        self._data_dir = Path(data_dir)
        self._bin_dir = bin_dir
        self._major = major
        self._durable = durable
        self._use: int | None = None
        self._ready: tuple[Account, Places, ServerBinaries] | None = None

    def __repr__(self) -> str:
        return f"EmbeddedPostgres({str(self._data_dir)!r}, running={self.running})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def admin_dsn(self) -> str:
        """The superuser's address, ``postgresql://…``; contains the password, so it belongs in no log."""
        _, places, _ = self._parts()
        password = _read_password(places)
        return f"postgresql://{_SUPERUSER}:{password}@/postgres?host={places.socket_dir}"

    @property
    def cluster_dir(self) -> Path:
        """Where the data is; below ``data_dir`` unless the server's account cannot enter that."""
        return self._parts()[1].cluster

    @property
    def major(self) -> int:
        """The server's major version."""
        return self._parts()[2].major

    @property
    def running(self) -> bool:
        """Whether the server accepts connections now."""
        if self._ready is None:
            return False
        account, places, server = self._ready
        return account.run([server.bin_dir / "pg_isready", "-q", "-h", places.socket_dir]).returncode == 0

    @property
    def alive(self) -> bool:
        """Whether the server's main process lives; cheap, and true before it accepts connections."""
        return self._ready is not None and _postmaster(self._ready[1]) is not None

    def start(self) -> None:
        """Make the cluster if needed and have its server accept connections; does nothing when it already does."""
        account, places, server = self._parts()
        with exclusive(places.data_dir / "lock") as lock:
            self._use = _hold(places.data_dir / "users", self._use)
            try:
                if data_major(places.cluster) is None:
                    _make_cluster(account, places, server, durable=self._durable, lock=lock)
                _read_password(places)
                private_folder(places.socket_dir, account)
                if not self.running and not self._adopt(account, places):
                    self._launch(account, places, server)
            except BaseException:
                self._release()
                raise

    def stop(self) -> None:
        """Leave the server, and stop it when we were its last user; does nothing when it is not running."""
        if self._ready is None:
            return
        account, places, server = self._ready
        with exclusive(places.data_dir / "lock"):
            self._release()
            if not _unused(places.data_dir / "users") or _postmaster(places) is None:
                return
            done = account.run([server.bin_dir / "pg_ctl", "stop", "-D", places.cluster, "-m", "fast", "-w"])
            if done.returncode != 0 and _postmaster(places) is not None:
                raise ServerStartFailed("pg_ctl stop", done.stderr or done.stdout)
            with suppress(OSError):
                places.socket_dir.rmdir()

    def remove(self) -> None:
        """Stop the server and delete its data, password and folders for good.

        Raises:
            LocationUnsuitable: another process still uses the server.
        """
        _, places, _ = self._parts()
        self.stop()
        with exclusive(places.data_dir / "lock"):
            if not _unused(places.data_dir / "users"):
                raise LocationUnsuitable(places.data_dir, "others still use this server", "stop them first")
            for path in (places.cluster, places.socket_dir, places.data_dir):
                if path.exists():
                    shutil.rmtree(path)
        self._ready = None

    def _parts(self) -> tuple[Account, Places, ServerBinaries]:
        if self._ready is None:
            account = server_account()
            places = lay_out(self._data_dir, account)
            servers = [inspect_server(self._bin_dir)] if self._bin_dir else find_servers()
            server = choose_server(servers, major=self._major, cluster=places.cluster)
            self._ready = (account, places, reachable(server, account))
        return self._ready

    def _adopt(self, account: Account, places: Places) -> bool:
        """Wait for a postmaster that lives but does not answer yet; clear away the file of a dead one."""
        deadline = time.monotonic() + _START_SECONDS
        while _postmaster(places) is not None:
            if self.running:
                return True
            if time.monotonic() > deadline:
                raise ServerStartFailed("running server", _tail(account, places))
            time.sleep(0.05)
        _clear_taken_number(places)
        return False

    def _launch(self, account: Account, places: Places, server: ServerBinaries) -> None:
        settings = {**_ALWAYS, **({} if self._durable else _FORGETFUL), "unix_socket_directories": places.socket_dir}
        # pg_ctl composes a shell command. The data folder's name stays out of it, as the working folder; what goes in
        # are our own constants and the socket folder's plain name, quoted.
        options = shlex.join(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
        command: list[str | Path] = [server.bin_dir / "pg_ctl", "start", "-D", ".", "-l", places.start_log.name]
        command += ["-o", options, "-s", "-w", "-t", str(_START_SECONDS)]
        deadline = time.monotonic() + _START_SECONDS
        while True:
            places.start_log.unlink(missing_ok=True)  # an earlier start's words
            done = account.run(command, cwd=places.cluster)
            if done.returncode == 0:
                return
            said = _tail(account, places)
            if _STILL_IN_USE not in said or time.monotonic() > deadline:
                raise ServerStartFailed("pg_ctl start", done.stderr + said)
            time.sleep(0.1)

    def _release(self) -> None:
        if self._use is not None:
            os.close(self._use)
            self._use = None


def _make_cluster(account: Account, places: Places, server: ServerBinaries, *, durable: bool, lock: int) -> None:
    """Run initdb beside the final place and rename, so that a crash never leaves half a cluster behind.

    An initdb that outlives us keeps the lock, so the next start waits until nobody writes there any more.
    """
    fresh = places.cluster.with_name(places.cluster.name + ".new")
    handed_over = places.cluster.with_name(places.cluster.name + ".password")
    if fresh.exists():
        shutil.rmtree(fresh)
    private_folder(fresh, account)
    password = secrets.token_hex(24)
    write_secret(places.password_file, password)
    write_secret(handed_over, password, account)
    initdb: list[str | Path] = [server.bin_dir / "initdb", "-D", fresh, "-U", _SUPERUSER, f"--pwfile={handed_over}"]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", *([] if durable else ["--no-sync"])]
    try:
        done = account.run(initdb, keep_open=[lock])
    finally:
        handed_over.unlink()
    if done.returncode != 0:
        shutil.rmtree(fresh)
        raise ServerStartFailed("initdb", done.stderr or done.stdout)
    fresh.rename(places.cluster)


def _read_password(places: Places) -> str:
    try:
        return places.password_file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise LocationUnsuitable(
            places.password_file, "the superuser's password is missing", "start the server once, or restore the file"
        ) from None


def _postmaster(places: Places) -> int | None:
    """The pid of the live postmaster of this cluster.

    A pid file outlives a crash, and its number may by now be another process: only one whose working folder is the
    cluster is the postmaster. Where that cannot be seen (no /proc), a live pid is believed.
    """
    try:
        pid = int((places.cluster / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
        os.kill(pid, 0)
        if sys.platform == "linux" and not Path(f"/proc/{pid}/cwd").samefile(places.cluster):
            return None
    except (FileNotFoundError, ProcessLookupError, PermissionError, ValueError):
        return None
    return pid


def _clear_taken_number(places: Places) -> None:
    """Remove a dead postmaster's lock files when its number is alive as something else, or as an unreaped zombie.

    PostgreSQL would take that process for its own and refuse to start. Everything else about stale files it handles
    itself, and it still checks by the cluster's shared memory that no orphan of the old server is at work.
    """
    pid_file = places.cluster / "postmaster.pid"
    try:
        os.kill(int(pid_file.read_text(encoding="utf-8").split("\n", 1)[0]), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return
    except PermissionError:
        pass
    for stale in (pid_file, *places.socket_dir.glob(".s.PGSQL.*")):
        stale.unlink(missing_ok=True)


def _tail(account: Account, places: Places) -> str:
    """The end of the logs, read as the account: a link that it planted shows nothing it could not read itself."""
    logs = sorted(path for path in (places.cluster / "log").glob("*.log"))
    said = [account.run(["tail", "-n", "10", log]).stdout for log in (*logs[-1:], places.start_log)]
    return "\n".join(said)


def _hold(path: Path, held: int | None) -> int:
    """Mark this object as a user of the server; the kernel takes the mark back when the process dies."""
    if held is not None:
        return held
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _unused(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
