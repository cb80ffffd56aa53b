"""Where the data, the password and the socket live, and who may enter there.

Below ``data_dir``: ``cluster/`` (the server's own folder), ``superuser.password`` (0600), ``lock`` and ``users`` (lock
files). When root starts the server and its account cannot enter ``data_dir``, the cluster lives in a folder that it
can enter, named after a hash of ``data_dir``; ``data_dir/location`` then holds that path. No existing permission is
ever changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plm_shared.embedded_postgres.accounts import Account
from plm_shared.embedded_postgres.errors import LocationUnsuitable

HOME_SETTING = "PLM_PG_HOME"
_DEFAULT_HOME = "/var/lib/plm-postgres"
# The socket's own name adds ".s.PGSQL.5432" and ".lock" to the folder; sun_path holds 107 bytes, 103 on macOS.
_LONGEST_SOCKET_FOLDER = 80


@dataclass(frozen=True, kw_only=True)
class Places:
    """Every path that belongs to one embedded server."""

    data_dir: Path
    cluster: Path
    socket_dir: Path

    @property
    def password_file(self) -> Path:
        """The superuser's password; readable by us only."""
        return self.data_dir / "superuser.password"

    @property
    def start_log(self) -> Path:
        """What the server says before its own log opens."""
        return self.cluster / "start.log"


def lay_out(data_dir: Path, account: Account) -> Places:
    """Make ``data_dir`` if absent and decide where the cluster and the socket go.

    Raises:
        LocationUnsuitable: a folder exists but is not ours to use.
    """
    data_dir = data_dir.absolute()
    data_dir.mkdir(mode=0o711 if account.switched else 0o700, parents=True, exist_ok=True)
    key = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
    location = data_dir / "location"
    if location.exists():
        cluster = Path(location.read_text(encoding="utf-8"))
    elif account.switched and not account.can_enter(data_dir):
        cluster = shared_folder("clusters") / key
        location.write_text(str(cluster), encoding="utf-8")
    else:
        cluster = data_dir / "cluster"
    return Places(data_dir=data_dir, cluster=cluster, socket_dir=_socket_base(account) / f"plm-pg-{key}")


def shared_folder(name: str) -> Path:
    """A root-owned folder that every account can enter and only root can change.

    Raises:
        LocationUnsuitable: the folder exists and someone else could change it.
    """
    home = Path(os.environ.get(HOME_SETTING, _DEFAULT_HOME))
    for folder in (home, home / name):
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != 0 or state.st_mode & 0o022:
            raise LocationUnsuitable(
                folder, "must be a folder that only root can change", f"set {HOME_SETTING} to another folder"
            )
    return home / name


def private_folder(path: Path, account: Account) -> Path:
    """Make, or check, a folder that only the account may enter.

    Raises:
        LocationUnsuitable: it exists and belongs to someone else, or others may enter it.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != account.uid or state.st_mode & 0o077:
            raise LocationUnsuitable(
                path, f"must be a folder only {account.name} can enter", "remove it and start again"
            ) from None
    except OSError as error:
        raise LocationUnsuitable(path, f"cannot be made ({error.strerror})", "choose another folder") from error
    else:
        account.own(path)
    return path


def write_secret(path: Path, secret: str, account: Account | None = None) -> None:
    """Put a secret into a new 0600 file, for the account when one is given."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secret)
    if account is not None:
        account.own(path)


@contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Keep every other process out for the length of the block; a killed one lets go by dying."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _socket_base(account: Account) -> Path:
    if account.switched:
        candidates = [Path("/run"), Path("/var/run")]
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        candidates = [Path(runtime)] if runtime.startswith("/") else []
    for folder in candidates:
        if folder.is_dir() and os.access(folder, os.W_OK) and len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER - 24:
            return folder
    return Path("/tmp")  # noqa: S108 - private_folder refuses a name that someone else made there
