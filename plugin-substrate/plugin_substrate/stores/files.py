"""Files that only the host may read, and the folders they lie in."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugin_substrate.errors import StoreError

_logger = logging.getLogger(__name__)


PASSAGE = 0o711
"""The mode of a folder through which plugins that run as users of their own reach what is theirs, and see no more."""


def private_folder(folder: Path, mode: int = 0o700) -> None:
    """Make a folder, or close one of ours that is more open than ``mode``, with a warning."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        make_private(folder, mode)


def make_private(path: Path, mode: int) -> None:
    """See that nobody else can use a path of ours; a link, another user's, or a device or the like is a `StoreError`.

    A ``mode`` with the right to enter is a folder's, one without a file's.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"{path} is a link; put the file itself there, or remove the link", path=str(path))
    kind, is_kind = ("folder", stat.S_ISDIR) if mode & stat.S_IXUSR else ("file", stat.S_ISREG)
    if not is_kind(found.st_mode):
        raise StoreError(f"{path} is no {kind}; give another path", path=str(path))
    if found.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}; chown it", path=str(path))
    loose = stat.S_IMODE(found.st_mode) & ~mode
    if loose:
        _logger.warning(
            "%s could be used by others (mode %04o): closed to %04o; what it held may be known to them",
            path,
            stat.S_IMODE(found.st_mode),
            mode,
        )
        path.chmod(mode)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 so that a reader, or a start after a crash, finds the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock_of(path: Path) -> Path:
    """Return the path that those lock who replace a file."""
    return path.with_name(f".{path.name}.lock")


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of a file left beside it, while its lock is held: it holds what the file did."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left != lock_of(path):
            left.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads that lock this path out."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
