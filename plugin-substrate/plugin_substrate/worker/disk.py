"""How much a worker's folder holds, found by looking at it a little at a time: no kernel bounds it for a folder.

The supervisor does it between its other work, so each look is short, and it begins anew only as often as that takes
little of a processor. What is over the bound for less than the time between is not noticed; files that are open and
have no name any more are seen by nobody.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

from plugin_substrate.worker.watch import Excess

_AT_A_TIME = 0.002  # seconds of one look
_BETWEEN_LOOKS = 0.02
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0
_WRITTEN_PER_SECOND = 1 << 30
_SHARE = 1 / 50  # of a processor
_BLOCK = 512  # bytes, what st_blocks counts in
_LEAST = 4096  # bytes that a file counts for, though it is empty: a file system has only so many of them


class FolderWatch:
    """Sums up one folder again and again."""

    def __init__(self, folder: str, most: int) -> None:
        """``most`` is what it may hold, in bytes of disk."""
        self._folder = os.fsencode(folder)
        self._most = most
        self._begin = 0.0
        self._sizes: Iterator[int] | None = None
        self._total = 0
        self._spent = 0.0

    def look(self) -> tuple[Excess | None, float]:
        """Go on for a moment; return what was found to be too much, and after how many seconds to look again."""
        started = time.monotonic()
        if started < self._begin:
            return None, self._begin - started
        if self._sizes is None:
            self._sizes, self._total, self._spent = _sizes_below(self._folder), 0, 0.0
        try:
            for size in self._sizes:
                self._total += size
                if self._total > self._most:
                    return Excess("disk", self._total, self._most), _BETWEEN_LOOKS
                if time.monotonic() - started > _AT_A_TIME:
                    self._spent += _AT_A_TIME
                    return None, _BETWEEN_LOOKS
        except _HiddenError:
            return Excess("hidden_folders", 1, 0), _BETWEEN_LOOKS
        self._sizes = None
        now = time.monotonic()
        room = (self._most - self._total) / _WRITTEN_PER_SECOND
        pause = max(min(room, _LONGEST_PAUSE), _SHORTEST_PAUSE, (self._spent + now - started) / _SHARE)
        self._begin = now + pause
        return None, pause


class _HiddenError(Exception):
    """A folder that its plugin made so that nobody can look into it: its path is too long, or it may not be read."""


def _sizes_below(folder: bytes) -> Iterator[int]:
    """Yield the disk space of all below; a file with several names counts once. What goes meanwhile is left out."""
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    names = max(1, found.st_nlink)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        names = 1
                    yield max(found.st_blocks * _BLOCK, _LEAST) // names
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
                raise _HiddenError from error
