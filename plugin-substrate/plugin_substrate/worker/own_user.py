"""A user id of its own for each plugin, where the host is root and that user can reach what the plugin needs.

No permission of anything that exists is changed for it; only the plugin's own folder is given to the user. Where the
interpreter, the environment or the folder lies behind a closed door, the plugin runs as root without capabilities.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from plugin_substrate.worker.privileges import become

_FIRST, _COUNT = 0x70000000, 1 << 24  # far above what people, systems and containers use


def uid_of(plugin_name: str) -> int:
    """Return the id of a plugin's user: the same on every start, and no other plugin's, as far as a hash can tell."""
    import hashlib  # only the host asks, and it takes as long to import as everything else here

    return _FIRST + int.from_bytes(hashlib.sha256(plugin_name.encode()).digest()[:8], "big") % _COUNT


def may_change_user() -> bool:
    """Whether this process is root, as far as it goes: only then can anyone be given another user."""
    return os.geteuid() == 0


def prepare(uid: int, folder: str, needed: Iterable[str]) -> bool:
    """Give a worker's folder to the user, and return True, if it can reach the folder and read what is ``needed``.

    Otherwise the folder is ours, or becomes ours again. Only root can do either.
    """
    if not may_change_user():
        return False
    usable = _reaches(uid, folder, tuple(needed))
    _give(folder, uid if usable else 0)
    return usable


def _reaches(uid: int, folder: str, needed: tuple[str, ...]) -> bool:
    """Try it as that user, in a process that ends at once."""
    child = os.fork()
    if child == 0:
        try:
            found = become(uid) and all(map(_readable, needed)) and os.access(sys.executable, os.X_OK)
            Path(folder).stat()
            os._exit(0 if found else 1)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _readable(path: str) -> bool:
    """Whether this user can read a path; what does not exist is nothing that could be missed, unless it is hidden."""
    try:
        is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return os.access(path, os.R_OK | os.X_OK if is_folder else os.R_OK)


def _give(folder: str, uid: int) -> None:
    """Change the owner of a folder and all in it, never following a link; nothing to do where it is the owner."""
    if Path(folder).lstat().st_uid == uid:
        return
    for _, folders, files, place in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            os.chown(name, uid, uid, dir_fd=place, follow_symlinks=False)
        os.fchown(place, uid, uid)
