"""Where a worker keeps its files: a folder per plugin and tenant, and the environment that points there."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from plugin_substrate.interface import DATA_DIR_VARIABLE, MODELS_DIR_VARIABLE
from plugin_substrate.removal import remove_tree
from plugin_substrate.sweep import start_of

#: The folder of calls that name no tenant: they are a tenant of their own.
NO_TENANT_FOLDER = "no-tenant"
#: The folder of a stateless plugin's worker, which all tenants share.
SHARED_FOLDER = "shared"

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HASH_CHARACTERS = 40
_RUN_FOLDER = re.compile(r"run-([0-9]+)-([0-9]+)-([0-9]*)-[0-9a-f]{16}")


def tenant_folder(tenant_id: str) -> str:
    """Return the name of a tenant's folder: distinct for distinct tenants, and never a path or another's name.

    A UUID in its usual form stands for itself. Tenants come from outside, so any other text is hashed.
    """
    if not tenant_id:
        return NO_TENANT_FOLDER
    if _UUID.fullmatch(tenant_id):
        return tenant_id
    return "t-" + hashlib.sha256(tenant_id.encode(errors="surrogatepass")).hexdigest()[:_HASH_CHARACTERS]


def new_run_folder() -> str:
    """Return the name of a folder for one confidential run, which tells whose it is: it must not outlive its host."""
    return f"run-{_own_namespace()}-{os.getpid()}-{start_of(os.getpid())}-{secrets.token_hex(8)}"


def clear_dead_runs(data_dir: Path) -> None:
    """Remove what confidential runs of hosts that were killed left of one plugin.

    Whether a host lives can only be told in its own process id namespace: containers may share the folder.
    """
    for folder in data_dir.glob("run-*"):
        match = _RUN_FOLDER.fullmatch(folder.name)
        if match and match[1] == _own_namespace() and start_of(int(match[2])) != match[3]:
            remove_tree(folder)


def _own_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "0"


def prepare_folder(folder: Path) -> None:
    """Make what is missing of a worker's folder; plugin code may have put anything in its place."""
    for place in (folder, folder / "tmp"):
        if place.is_symlink():
            raise NotADirectoryError(f"{place} is a link, not a folder")
        place.mkdir(parents=True, exist_ok=True, mode=0o700)


def tenant_log(log_path: Path, tenant_id: str) -> Path:
    """Return the log file of one tenant's worker of an instance; ``log_path`` is that of calls without a tenant."""
    return log_path.with_suffix("") / f"{tenant_folder(tenant_id)}.log" if tenant_id else log_path


def worker_environment(
    python_path: str,
    folder: Path,
    declared: Mapping[str, str],
    *,
    keeps_data: bool,
    models_dir: Path | None = None,
) -> dict[str, str]:
    """Return a worker's whole environment: nothing of the host's, but what is listed here and what is declared."""
    environment = {
        "PATH": os.pathsep.join([str(Path(python_path).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder / "tmp"),
        **declared,
    }
    if models_dir is not None:
        environment[MODELS_DIR_VARIABLE] = str(models_dir)
    if keeps_data:
        return {**environment, DATA_DIR_VARIABLE: str(folder)}
    environment.pop(DATA_DIR_VARIABLE, None)
    return environment
