"""A folder and all below it as a table of facts, read through descriptors that follow no link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from plugin_substrate.worker.text import clean_line

__all__ = [
    "CREATE",
    "FOLDER",
    "READ",
    "Entry",
    "Kind",
    "TreeTooLargeError",
    "entry_at",
    "look",
    "names_in",
    "open_below",
    "open_folder",
    "opened",
    "remove_entry",
    "scan",
    "shown",
]

#: How anything in a tree is opened: never through a link, and never waiting for the other end of a pipe.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Kind(StrEnum):
    """What stands at a path."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    SPECIAL = "special"


@dataclass(frozen=True)
class Entry:
    """One path as it stood at one moment; ``target`` is what a link says, and times are nanoseconds."""

    kind: Kind
    mode: int
    size: int
    links: int
    device: int
    inode: int
    modified: int
    changed: int
    owner: int
    group: int
    target: str = ""

    @property
    def identity(self) -> tuple[int, int]:
        """The file behind the path, whatever it is called."""
        return self.device, self.inode


class TreeTooLargeError(OSError):
    """A tree has more in it, or is deeper, than is to be read."""


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Open a folder by its path; the last part of it is no link."""
    descriptor = os.open(path, FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_below(root: int, path: str) -> Iterator[int]:
    """Open a folder below another by a relative path, no part of which is a link; an empty path is the root itself."""
    descriptor = os.dup(root)
    try:
        for name in filter(None, path.split("/")):
            below = os.open(name, FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened(name: str, flags: int, folder: int, mode: int = 0o600) -> Iterator[int]:
    """Open a name in a folder for the length of a with-block."""
    descriptor = os.open(name, flags, mode, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def scan(root: int, *, depth: int, most: int | None = None) -> dict[str, Entry]:
    """Return every path below a folder, each folder before what it holds; a `TreeTooLargeError` beyond the bounds.

    Paths are relative, with slashes; bytes that are no UTF-8 stand as lone surrogates, as everywhere in Python.
    """
    found: dict[str, Entry] = {}
    _scan(root, "", depth, most, found)
    return found


def _scan(folder: int, prefix: str, depth: int, most: int | None, found: dict[str, Entry]) -> None:
    if depth < 0:
        raise TreeTooLargeError(f"{prefix!r:.200} lies too deep")
    below = []
    with os.scandir(folder) as entries:
        for item in entries:
            with suppress(FileNotFoundError):  # gone since it was listed
                entry = _entry(item.stat(follow_symlinks=False), folder, item.name)
                found[prefix + item.name] = entry
                if entry.kind is Kind.FOLDER:
                    below.append(item.name)
            if most is not None and len(found) > most:
                raise TreeTooLargeError(f"it holds more than {most} entries")
    for name in below:
        descriptor = os.open(name, FOLDER, dir_fd=folder)
        try:
            _scan(descriptor, f"{prefix}{name}/", depth - 1, most, found)
        finally:
            os.close(descriptor)


def entry_at(folder: int, name: str) -> Entry:
    """Return what stands at a name in a folder; a FileNotFoundError when nothing does."""
    return _entry(os.lstat(name, dir_fd=folder), folder, name)


def look(folder: int, name: str) -> Entry | None:
    """Return what stands at a name in a folder, None when nothing does."""
    try:
        return entry_at(folder, name)
    except FileNotFoundError:
        return None


def names_in(folder: int) -> list[str]:
    """Return the names in a folder, in no order."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def remove_entry(folder: int, name: str) -> None:
    """Remove what stands at a name in a folder, if anything does; a folder must be empty."""
    entry = look(folder, name)
    if entry is not None and entry.kind is Kind.FOLDER:
        os.rmdir(name, dir_fd=folder)
    elif entry is not None:
        os.unlink(name, dir_fd=folder)


def shown(path: str) -> str:
    """Return a path fit for a record: bytes that are no UTF-8 and control characters are written as escapes."""
    return clean_line(path, 4096)


def _entry(status: os.stat_result, folder: int, name: str) -> Entry:
    mode = status.st_mode
    kind = Kind.SPECIAL
    if stat.S_ISREG(mode):
        kind = Kind.FILE
    elif stat.S_ISDIR(mode):
        kind = Kind.FOLDER
    elif stat.S_ISLNK(mode):
        kind = Kind.LINK
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(mode),
        size=status.st_size,
        links=status.st_nlink,
        device=status.st_dev,
        inode=status.st_ino,
        modified=status.st_mtime_ns,
        changed=status.st_ctime_ns,
        owner=status.st_uid,
        group=status.st_gid,
        target=os.readlink(name, dir_fd=folder) if kind is Kind.LINK else "",
    )
