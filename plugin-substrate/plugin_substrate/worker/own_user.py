"""A user id of its own for each plugin, where the host is root and that user can reach what the plugin needs.

No permission of anything that exists is changed for it; only the plugin's own folder is given to the user. Where the
interpreter, the environment or the folder lies behind a closed door, the plugin runs as root without capabilities.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from enum import IntEnum

from plugin_substrate.worker.privileges import become

_FIRST, _COUNT = 0x70000000, 1 << 24  # far above what people, systems and containers use


def uid_of(plugin_name: str) -> int:
    """Return the id of a plugin's user: the same on every start, and no other plugin's, as far as a hash can tell."""
    import hashlib  # only the host asks, and it takes as long to import as everything else here

    return _FIRST + int.from_bytes(hashlib.sha256(plugin_name.encode()).digest()[:8], "big") % _COUNT


def may_change_user() -> bool:
    """Whether this process is root, as far as it goes: only then can anyone be given another user."""
    return os.geteuid() == 0


class Reach(IntEnum):
    """What a user can get at of what a worker needs."""

    EVERYTHING = 0
    NOT_ITS_FOLDER = 1
    NOT_ITS_ENVIRONMENT = 2  # which is the same for every worker of a supervisor


def reach_of(uid: int, folder: str, needed: Iterable[str]) -> Reach:
    """Try, in a process that ends at once, whether the user can reach the folder and read what is ``needed``."""
    child = os.fork()
    if child == 0:
        found = Reach.NOT_ITS_ENVIRONMENT
        try:
            if become(uid) and all(map(_readable, needed)) and os.access(sys.executable, os.X_OK):
                found = Reach.NOT_ITS_FOLDER
                os.stat(folder)
                found = Reach.EVERYTHING
        finally:
            os._exit(found)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Reach(ended) if ended >= 0 else Reach.NOT_ITS_FOLDER  # somebody killed it; another load asks again


def give(folder: str, uid: int) -> None:
    """Change the owner of a folder and all in it, never following a link; nothing to do where it is the owner."""
    if os.lstat(folder).st_uid == uid:
        return
    for _, folders, files, place in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            os.chown(name, uid, uid, dir_fd=place, follow_symlinks=False)
        os.fchown(place, uid, uid)


def _readable(path: str) -> bool:
    """Whether this user can read a path; what does not exist is nothing that could be missed, unless it is hidden."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return os.access(path, os.R_OK | os.X_OK if is_folder else os.R_OK)
