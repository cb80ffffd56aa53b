"""The temporary folder of a pass: it goes when the pass ends, or when the next host finds that its own was killed."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

from plugin_substrate.passes.backup_record import BackupRecord
from plugin_substrate.passes.tree import FOLDER, open_folder
from plugin_substrate.removal import remove_tree

__all__ = ["WorkFolder", "folders_of_killed_hosts", "protected_in", "remove_tree", "replaced_beside"]

_GETFLAGS, _SETFLAGS, _TOPDIR = 0x80086601, 0x40086602, 0x00020000  # ioctl_iflags(2)
_PREFIX = "file-pass-"
_KEPT, _REPLACED = "protected-", "replaced-"
_logger = logging.getLogger(__name__)


class WorkFolder:
    """A new folder, locked as long as its host lives. Making one removes this user's whose host does not."""

    def __init__(self, parent: Path | None) -> None:
        """Make it in ``parent``, or where temporary files go; an OSError when it cannot be made."""
        _sweep(parent)
        self.path, self._lock = _made(_place(parent))
        _spread(self._lock)

    def new(self, *, keep: bool = False) -> Path:
        """Return a new, empty folder in it; with ``keep`` one for a `BackupRecord`, which outlives our host."""
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


def folders_of_killed_hosts(parent: Path | None) -> Iterator[Path]:
    """Yield this user's whose hosts do not live, each locked as long as it is looked at."""
    for path in _place(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError), open_folder(path) as folder:
            if os.fstat(folder).st_uid == os.geteuid() and _lock(folder) is _Locked.BY_US:
                yield path


def protected_in(folder: Path) -> list[Path]:
    """Return the backups of protected paths that are in a work folder, whole or not."""
    return sorted(folder.glob(f"{_KEPT}*"))


def replaced_beside(store: Path) -> Path:
    """Return where what stood in the way of such a backup is kept, which nobody sweeps."""
    return store.with_name(store.name.replace(_KEPT, _REPLACED, 1))


def _sweep(parent: Path | None) -> None:
    """Remove what killed hosts left, but for backups that are whole, and what such a one has replaced."""
    for path in folders_of_killed_hosts(parent):
        kept = {store: record for store in protected_in(path) if (record := BackupRecord.read(store))}
        for store, record in kept.items():
            told = {"folder": str(store), "tree": record.tree}
            _logger.warning(
                "a host was killed over a tree; the next pass over it puts back what is protected", extra=told
            )
        replaced = set(path.glob(f"{_REPLACED}*"))
        if not kept and not replaced:
            remove_tree(path)
            continue
        for other in set(path.iterdir()) - kept.keys() - replaced:
            remove_tree(other)


def _place(parent: Path | None) -> Path:
    return Path(parent or tempfile.gettempdir()).resolve()


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
