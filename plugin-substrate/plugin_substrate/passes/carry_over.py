"""Makes changes to a tree happen all or not at all, also when the host is killed over it.

Everything goes through one folder at the top of the tree, `UNFINISHED`. What is to come waits in it as ``new-N``, what
stood in its place is kept as ``old-N``, and before the first step is taken ``journal`` lists them all. After the last
one ``journal`` becomes ``done``. Whoever finds the folder takes back what was done, be it the process that failed or
one that comes after a kill; where it finds ``done``, only the folder is left to be removed. A lock on the journal,
which ends with its holder, tells a folder that was left behind from one in use.

Nothing is flushed to the disk: a host that is killed is covered, a machine that loses its power is not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.passes.records import UNFINISHED
from plugin_substrate.passes.tree import (
    FOLDER,
    Entry,
    Kind,
    look,
    names_in,
    open_below,
    open_folder,
    opened,
    remove_entry,
    shown,
)

__all__ = ["CarryOver", "CarryOverError", "Step", "TreeChangedError", "begin", "mark", "ready", "undo_unfinished"]

_JOURNAL, _DONE = "journal", "done"
_LOCKABLE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_SECOND_NAME = (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
_IN_USE = "another pass is carrying its changes over to this tree"
_logger = logging.getLogger(__name__)


class TreeChangedError(Exception):
    """Somebody else changed the tree while a plugin worked on its copy; nothing was carried over."""


class CarryOverError(OSError):
    """Another pass is at work on the tree, or it is not whole and somebody has to look at it."""


@dataclass(frozen=True)
class Step:
    """What happens at one path: the `mark` of what stands there and goes, and of what comes; empty for nothing."""

    path: str
    old: str
    new: str


def mark(entry: Entry) -> str:
    """Return what tells a thing from whatever somebody else puts in its place, or makes of it."""
    return f"{entry.inode}:{entry.size}:{entry.modified}" if entry.kind is Kind.FILE else f"{entry.inode}"


def ready(number: int) -> str:
    """Return the name under which what the step of a number brings waits in the folder."""
    return f"new-{number}"


class CarryOver:
    """The folder of one carrying over, locked. Its steps are numbered in the order in which they are taken."""

    def __init__(self, tree: int, folder: int, journal: int) -> None:
        """Work on three descriptors, which stay the caller's."""
        self._tree = tree
        self.folder = folder  #: where what the steps bring is made, named by `ready`
        self._journal = journal

    def take(self, steps: Sequence[Step], go_on: Callable[[], None]) -> None:
        """Take every step, or none of them and raise what was in the way, or what ``go_on`` raised between two.

        A `CarryOverError` says that what had been done could not all be taken back; then the folder must stay.
        """
        self._write(steps)
        try:
            for number, step in enumerate(steps):
                go_on()
                self._take(number, step)
            os.rename(_JOURNAL, _DONE, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except BaseException:
            self.take_back(steps)
            raise

    def take_back(self, steps: Sequence[Step]) -> None:
        """Make the tree what it was before; may be repeated when it was broken off.

        What somebody else has made of a path since then stays. Where something was kept for that path, it still is,
        and a `CarryOverError` names it.
        """
        outcomes = [self._take_back(number, step) for number, step in reversed([*enumerate(steps)])]
        conflicts = list(filter(None, outcomes))
        if conflicts:
            raise CarryOverError(f"{len(conflicts)} changes of a pass cannot be taken back: {conflicts[0]}")

    def end(self) -> None:
        """Have the tree made whole, unless it is, and remove the folder."""
        if look(self.folder, _DONE) is None:
            self.take_back(self._read())
        self.remove()

    def remove(self) -> None:
        """Remove the folder and what is in it, the journal last."""
        for name in set(names_in(self.folder)) - {_JOURNAL, _DONE}:
            remove_entry(self.folder, name)
        for name in (_JOURNAL, _DONE):
            remove_entry(self.folder, name)
        os.rmdir(UNFINISHED, dir_fd=self._tree)

    def _write(self, steps: Sequence[Step]) -> None:
        inode = os.fstat(self.folder).st_ino
        left = json.dumps({"folder": inode, "steps": [astuple(step) for step in steps]}).encode()
        while left:
            left = left[os.write(self._journal, left) :]

    def _read(self) -> list[Step]:
        """Return the steps that may have been taken; none where the journal was not written to its end."""
        raw = b"".join(iter(lambda: os.read(self._journal, 1 << 20), b""))
        try:
            content = json.loads(raw)
        except ValueError:
            if any(name.startswith("old-") for name in names_in(self.folder)):
                raise CarryOverError(f"{UNFINISHED}/{_JOURNAL} is broken") from None
            return []
        if not isinstance(content, dict) or content.get("folder") != os.fstat(self.folder).st_ino:
            raise CarryOverError(f"{UNFINISHED} was not made here; it may have been copied with the tree")
        try:
            return [_step(*entry) for entry in content["steps"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CarryOverError(f"{UNFINISHED}/{_JOURNAL} is broken: {error}") from error

    def _take(self, number: int, step: Step) -> None:
        parent, _, name = step.path.rpartition("/")
        with open_below(self._tree, parent) as place:
            standing = look(place, name)
            if (mark(standing) if standing else "") != step.old:
                raise TreeChangedError(f"{shown(step.path)!r} was changed by somebody else meanwhile")
            if standing:
                self._keep(place, name, f"old-{number}", replaced=bool(step.new))
            if step.new:
                os.rename(ready(number), name, src_dir_fd=self.folder, dst_dir_fd=place)

    def _keep(self, place: int, name: str, kept: str, *, replaced: bool) -> None:
        """Give what stands at a place a name in our folder; what will be replaced keeps its own too where it can."""
        if replaced:
            try:
                os.link(name, kept, src_dir_fd=place, dst_dir_fd=self.folder, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_SECOND_NAME:
                    raise
            else:
                return
        os.rename(name, kept, src_dir_fd=place, dst_dir_fd=self.folder)

    def _take_back(self, number: int, step: Step) -> str:
        """Take a step back, however far it had come; returns why it cannot be."""
        kept = f"old-{number}"
        former = look(self.folder, kept)
        parent, _, name = step.path.rpartition("/")
        try:
            with open_below(self._tree, parent) as place:
                standing = look(place, name)
                ours = standing is not None and mark(standing) == step.new
                if former is None:
                    if ours:
                        remove_entry(place, name)
                elif standing is None or ours:
                    os.rename(kept, name, src_dir_fd=self.folder, dst_dir_fd=place)
                elif standing.inode == former.inode:
                    os.unlink(kept, dir_fd=self.folder)
                else:
                    return f"{shown(step.path)!r} was changed since; what it was is kept as {UNFINISHED}/{kept}"
        except OSError as error:
            if former is not None or error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
                return f"{shown(step.path)!r} cannot be put back ({error.strerror}); see {UNFINISHED}/{kept}"
        return ""


@contextmanager
def begin(tree: int) -> Iterator[CarryOver]:
    """Make the folder for a carrying over, and remove it afterwards, except where a `CarryOverError` is on its way.

    A `CarryOverError` is raised where the tree has such a folder already.
    """
    try:
        os.mkdir(UNFINISHED, 0o700, dir_fd=tree)
    except FileExistsError:
        raise CarryOverError(_IN_USE) from None
    with opened(UNFINISHED, FOLDER, tree) as folder, _locked(folder, _JOURNAL, os.O_CREAT | os.O_EXCL) as journal:
        carry_over = CarryOver(tree, folder, journal)
        try:
            yield carry_over
        except CarryOverError:
            raise
        except BaseException:
            _remove(carry_over)
            raise
        _remove(carry_over)


def undo_unfinished(root: Path) -> bool:
    """Take back what a host was killed over carrying over; where it had come to the end, only tidy up.

    Tells whether there was anything to be done. A `CarryOverError` says what somebody has to look at, and that another
    pass is at work.
    """
    with open_folder(root) as tree:
        if look(tree, UNFINISHED) is None:
            return False
        with opened(UNFINISHED, FOLDER, tree) as folder:
            status = os.fstat(folder)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise CarryOverError(f"{UNFINISHED} is not ours alone: it was made by somebody else")
            name = next((name for name in (_DONE, _JOURNAL) if look(folder, name)), None)
            if name is None:
                os.rmdir(UNFINISHED, dir_fd=tree)
            else:
                with _locked(folder, name) as journal:
                    CarryOver(tree, folder, journal).end()
    _logger.warning("a tree that a killed host had left unfinished is whole again", extra={"tree": str(root)})
    return True


@contextmanager
def _locked(folder: int, name: str, flags: int = 0) -> Iterator[int]:
    """Open a journal that nobody else has; a `CarryOverError` where somebody does, or just had."""
    with opened(name, _LOCKABLE | flags, folder) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CarryOverError(_IN_USE) from None
        if os.fstat(journal).st_nlink == 0:
            raise CarryOverError(_IN_USE)
        yield journal


def _remove(carry_over: CarryOver) -> None:
    """Remove the folder of a whole tree: when that fails the next pass does it, and says why it cannot."""
    try:
        carry_over.remove()
    except OSError as error:
        _logger.warning("the folder of a pass is left in a tree", extra={"folder": UNFINISHED, "reason": str(error)})


def _step(path: Any, old: Any, new: Any) -> Step:
    """Read a step as it was written; a ValueError for one that reaches out of the tree."""
    if not all(isinstance(text, str) for text in (path, old, new)):
        raise TypeError("a step is no list of three texts")
    if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise ValueError(f"{path!r:.200} is no path of a tree")
    return Step(path, old, new)
