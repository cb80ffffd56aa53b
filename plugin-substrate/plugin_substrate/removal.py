"""Removing folders that foreign code has filled."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, as far as it can be removed, however deep it is and whatever its permissions.

    Nobody should be working in it; who does can keep something of it, and have nothing else changed. What lies deeper
    is first moved up, so that no depth is too much.
    """
    with suppress(OSError):
        with _opened(path) as folder:
            _empty(folder)
        path.rmdir()


def remove_below(parent: int, name: str) -> None:
    """Remove what stands at a name in an open folder, and all below it; an OSError when it cannot be removed."""
    if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    with _opened(name, parent) as folder:
        _empty(folder)
    os.rmdir(name, dir_fd=parent)


def _empty(top: int) -> None:
    token = secrets.token_hex(8)
    left = _without_files(top)
    moved = 0
    while left:
        name = left.pop()
        with suppress(OSError):
            with _opened(name, top) as folder:
                for below in _without_files(folder):
                    moved += 1
                    with _opened(below, folder):  # only who may write in a folder may move it
                        os.rename(below, f"{token}-{moved}", src_dir_fd=folder, dst_dir_fd=top)
                    left.append(f"{token}-{moved}")
            os.rmdir(name, dir_fd=top)


def _without_files(folder: int) -> list[str]:
    """Remove everything in a folder but its folders, and return their names."""
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            else:
                with suppress(OSError):
                    os.unlink(entry.name, dir_fd=folder)
    return below


@contextmanager
def _opened(path: Path | str, beside: int | None = None) -> Iterator[int]:
    """Open a folder that is no link, and that we then may change, for the length of a with-block."""
    try:
        descriptor = os.open(path, _FOLDER, dir_fd=beside)
    except PermissionError:
        _unlock(path, beside)
        descriptor = os.open(path, _FOLDER, dir_fd=beside)
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            os.fchmod(descriptor, 0o700)
        yield descriptor
    finally:
        os.close(descriptor)


def _unlock(path: Path | str, beside: int | None) -> None:
    """Let us into a folder that may not be opened: by a handle of it, as its name may mean something else by now."""
    if sys.platform != "linux":
        raise PermissionError(f"{path} cannot be opened")
    handle = os.open(path, os.O_PATH | _FOLDER, dir_fd=beside)
    try:
        Path(f"/proc/self/fd/{handle}").chmod(0o700)
    finally:
        os.close(handle)
