"""The temporary folder of a pass: it goes when the pass ends, or when the next host finds that its own was killed."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from array import array
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

from plugin_substrate.passes.tree import FOLDER, names_in, open_folder
from plugin_substrate.removal import remove_tree

__all__ = ["WorkFolder", "remove_tree"]

_GETFLAGS, _SETFLAGS, _TOPDIR = 0x80086601, 0x40086602, 0x00020000  # ioctl_iflags(2)
_PREFIX = "file-pass-"
_KEPT = "protected-"
_logger = logging.getLogger(__name__)


class WorkFolder:
    """A new folder, locked as long as its host lives. Making one removes this user's whose host does not."""

    def __init__(self, parent: Path | None) -> None:
        """Make it in ``parent``, or where temporary files go; an OSError when it cannot be made."""
        where = Path(parent or tempfile.gettempdir()).resolve()
        _sweep(where)
        self.path, self._lock = _made(where)
        _spread(self._lock)

    def new(self, *, keep: bool = False) -> Path:
        """Return a new, empty folder in it; with ``keep`` nobody sweeps it all when our host is killed."""
        return Path(tempfile.mkdtemp(prefix=_KEPT if keep else None, dir=self.path))

    def remove(self) -> None:
        """Remove it and all that is in it, as far as it can be removed."""
        remove_tree(self.path)
        os.close(self._lock)


def _made(parent: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(path, FOLDER)
            if _lock(lock) is not _Locked.BY_ANOTHER and os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)  # somebody was sweeping, and took it for one that was left


def _spread(folder: int) -> None:
    """Have ext4 keep what is made in each folder of this one apart from the rest of the disk, as at its top.

    Beside other temporary files it meets inodes that were freed a short while ago; without a journal it hands none of
    those out, and searches past all of them for every new file. Other file systems do not know the flag.
    """
    with suppress(OSError):
        flags = array("i", [0, 0])  # an int, whatever the calls are said to take
        fcntl.ioctl(folder, _GETFLAGS, flags)
        flags[0] |= _TOPDIR
        fcntl.ioctl(folder, _SETFLAGS, flags)


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), open_folder(path) as folder:
            if os.fstat(folder).st_uid != os.geteuid() or _lock(folder) is not _Locked.BY_US:
                continue
            if any(name.startswith(_KEPT) for name in names_in(folder)):
                _logger.warning("a host was killed over a tree; what it protected is kept", extra={"folder": str(path)})
            else:
                remove_tree(path)


class _Locked(Enum):
    """Who holds a folder's lock: nobody does where the file system has no locks, and then nothing there is swept."""

    BY_US = auto()
    BY_ANOTHER = auto()
    BY_NOBODY = auto()


def _lock(folder: int) -> _Locked:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Locked.BY_ANOTHER
    except OSError:
        return _Locked.BY_NOBODY
    return _Locked.BY_US
