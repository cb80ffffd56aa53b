"""Makes the copy of a tree that a plugin works on."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping

from plugin_substrate.passes.tree import CREATE, READ, Entry, Kind, open_below, opened

__all__ = ["copy_file", "copy_tree", "same_content", "too_large"]

_FICLONE = 0x40049409  # ioctl_ficlone(2): share the blocks until one of the two is written to
_NOT_HERE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_PORTION = 1 << 24
_COMPARED = 1 << 20


def too_large(tree: Mapping[str, Entry], *, most_files: int, most_bytes: int) -> str:
    """Say why a tree is not to be copied; empty when it is."""
    size = sum(entry.size for entry in tree.values() if entry.kind is Kind.FILE)
    if len(tree) > most_files:
        return f"{len(tree)} entries, more than {most_files}"
    if size > most_bytes:
        return f"{size} bytes, more than {most_bytes}"
    return ""


def copy_tree(source: int, target: int, tree: Mapping[str, Entry], go_on: Callable[[], None] = lambda: None) -> bool:
    """Copy what ``tree`` lists from one folder to another, empty one: content, permissions and times, links as links.

    Each file becomes a file of its own, also where several names share one in the source. Sockets, pipes and devices
    are left out: no plugin has use for them. Tells whether every file shares its blocks with its original. An entry
    that is no longer what it was is an OSError; ``go_on`` is called between any two files, and may raise.
    """
    folders: dict[str, list[str]] = {"": []}
    for path, entry in tree.items():
        parent, _, name = path.rpartition("/")
        if entry.kind is Kind.FOLDER:
            folders[path] = []
        folders[parent].append(name)
    shared = True
    for parent, names in folders.items():
        with open_below(source, parent) as here, open_below(target, parent) as there:
            for name in names:
                go_on()
                shared = _copy(here, there, name, tree[f"{parent}/{name}" if parent else name], share=shared) and shared
    for path in reversed(folders):
        if path:
            with open_below(target, path.rpartition("/")[0]) as parent_there:
                _set_times(parent_there, path.rpartition("/")[2], tree[path])
    return shared


def _copy(here: int, there: int, name: str, entry: Entry, *, share: bool) -> bool:
    """Copy one entry; False for a file that does not share its blocks."""
    if entry.kind is Kind.FOLDER:
        os.mkdir(name, 0o700 | entry.mode & 0o777, dir_fd=there)
    elif entry.kind is Kind.LINK:
        os.symlink(entry.target, name, dir_fd=there)
        _set_times(there, name, entry)
    elif entry.kind is Kind.FILE:
        with opened(name, READ, here) as source:
            status = os.fstat(source)
            if (status.st_dev, status.st_ino) != entry.identity:
                raise OSError(errno.ESTALE, "it was replaced while it was copied", name)
            # Readable and writable by us even where the original is not: the mode of the original is not touched.
            mode = 0o600 | entry.mode & 0o777
            with opened(name, CREATE, there, mode) as target:
                share = copy_file(source, target, status.st_size, share=share)
                os.utime(target, ns=(entry.modified, entry.modified))
        return share
    return True


def copy_file(source: int, target: int, size: int, *, share: bool = True) -> bool:
    """Copy a file's ``size`` bytes into an empty one; tells whether they share their blocks, if they were to."""
    if share and _share_blocks(source, target):
        return True
    left = size
    try:
        while left and (copied := os.copy_file_range(source, target, left)):
            left -= copied
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    if left:
        _copy_plainly(source, target)  # not possible here, or a file that only claims to be shorter than it is
    return False


def _share_blocks(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    return True


def same_content(first: int, second: int) -> bool:
    """Whether two open files hold the same bytes, from where they stand to their ends."""
    while True:
        portion = os.read(first, _COMPARED)
        other = os.read(second, _COMPARED)
        if portion != other:
            return False
        if not portion:
            return True


def _copy_plainly(source: int, target: int) -> None:
    os.lseek(source, 0, os.SEEK_SET)
    os.lseek(target, 0, os.SEEK_SET)
    while portion := os.read(source, _PORTION):
        while portion:
            portion = portion[os.write(target, portion) :]


def _set_times(folder: int, name: str, entry: Entry) -> None:
    os.utime(name, ns=(entry.modified, entry.modified), dir_fd=folder, follow_symlinks=False)
