"""Where the plugins of one pass work, one after the other, and what becomes of what they did."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from plugin_substrate.passes.applying import apply, refuse_if_changed
from plugin_substrate.passes.backup_record import BackupRecord
from plugin_substrate.passes.changes import Changes, compare
from plugin_substrate.passes.in_place import ProtectedBackup
from plugin_substrate.passes.records import UNFINISHED, PassLimits, ProtectedPaths
from plugin_substrate.passes.recovery import recover
from plugin_substrate.passes.staging import copy_tree, too_large
from plugin_substrate.passes.tree import Entry, Kind, TreeTooLargeError, open_folder, scan
from plugin_substrate.passes.work_folder import WorkFolder, remove_tree
from plugin_substrate.sweep import start_of

__all__ = ["Stage", "Workspace"]

T = TypeVar("T")

_MOST_OF_AN_ENTRY = 8192  # bytes that an entry takes besides its content


class Stage(Protocol):
    """One plugin's place of work. It blocks on the disk, so it is used in threads."""

    @property
    def tree(self) -> Path:
        """The folder that the plugin sees."""
        ...

    @property
    def how(self) -> str:
        """How it was staged: ``copy``, ``reflink`` where that shares the tree's blocks, or ``in_place`` and why."""
        ...

    @property
    def is_copy(self) -> bool:
        """Whether the tree is out of a plugin's reach."""
        ...

    @property
    def disk_bytes(self) -> int:
        """What the folder may come to hold."""
        ...

    def changes(self) -> Changes:
        """Say what was done; the plugin and all its processes must be dead."""
        ...

    def accept(self, changes: Changes) -> None:
        """Make the changes those of the tree, all or none; a `TreeChangedError` or an OSError when that fails."""
        ...

    def reject(self) -> None:
        """Have nothing of them, as far as that can be."""
        ...


class StoppedError(Exception):
    """Whoever waited for this does no more."""


class Workspace:
    """A temporary folder of ours, and a stage for each plugin: the same copy again while it equals the tree.

    A tree beyond the limits of a copy is worked on in place: what is protected is backed up and put back, and nothing
    else can be.
    """

    def __init__(
        self, root: Path, parent: Path | None, *, protected: ProtectedPaths, limits: PassLimits, supervisor: int
    ) -> None:
        """Take note of it all; the folder is made in ``parent``, or where temporary files go, for the first stage.

        ``supervisor`` is the process without which no plugin works here.
        """
        self._root = root
        self._supervisor = supervisor, start_of(supervisor)
        self._parent = parent
        self._protected = protected
        self._limits = limits
        self._folder: WorkFolder | None = None
        self._copy: _Copy | None = None
        self._backup: _InPlace | None = None
        self._stopping = threading.Event()

    async def do(self, function: Callable[..., T], *arguments: object) -> T:
        """Have something done in a thread that blocks on the disk.

        When the caller is cancelled it is broken off, or undone, and its end awaited: nobody is at work on the tree or
        the copy afterwards. From then on nothing can be staged.
        """
        work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping.set()
            while not work.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            raise

    def stage(self) -> Stage:
        """Return where the next plugin works; an OSError when the tree cannot be read, made whole or copied."""
        if self._backup is not None:
            self._backup.close()
            self._backup = None
        if self._copy is not None and not self._copy.stale:
            return self._copy
        reason, before = self._read()
        if reason:
            self._backup = _InPlace(
                self._root,
                self._work().new(keep=True),
                reason,
                protected=self._protected,
                limits=self._limits,
                supervisor=self._supervisor,
            )
            return self._backup
        if self._copy is not None:
            remove_tree(self._copy.tree)
        self._copy = _Copy(
            self._root, self.scratch(), before, self._go_on, protected=self._protected, limits=self._limits
        )
        return self._copy

    def scratch(self) -> Path:
        """Return a new, empty folder."""
        return self._work().new()

    def close(self) -> None:
        """Remove everything of ours."""
        if self._backup is not None:
            self._backup.close()
        if self._folder is not None:
            self._folder.remove()

    def _work(self) -> WorkFolder:
        if self._folder is None:
            self._folder = WorkFolder(self._parent)
        return self._folder

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise StoppedError

    def _read(self) -> tuple[str, Mapping[str, Entry]]:
        limits = self._limits
        recover(self._root, self._parent)
        with open_folder(self._root) as root:
            try:
                before = scan(root, depth=limits.tree_depth, most=limits.staged_files)
            except TreeTooLargeError as error:
                return str(error), {}
        return too_large(before, most_files=limits.staged_files, most_bytes=limits.staged_bytes), before


def _disk_bytes(tree: Mapping[str, Entry], limits: PassLimits) -> int:
    """Return what a tree takes on a disk at most, with what it may grow."""
    size = sum(entry.size for entry in tree.values() if entry.kind is Kind.FILE)
    return size + _MOST_OF_AN_ENTRY * (len(tree) + 1) + limits.growth_bytes


class _Copy:
    """A copy of the tree; good for another plugin as long as everything done to it was carried over."""

    is_copy = True

    def __init__(
        self,
        root: Path,
        tree: Path,
        before: Mapping[str, Entry],
        go_on: Callable[[], None],
        *,
        protected: ProtectedPaths,
        limits: PassLimits,
    ) -> None:
        self._root = root
        self.tree = tree
        self._before = before
        self._go_on = go_on
        self._protected = protected
        self._limits = limits
        self.stale = False
        with open_folder(root) as source, open_folder(tree) as target:
            shared = copy_tree(source, target, before, go_on)
        self.how = "reflink" if shared else "copy"
        self.disk_bytes = _disk_bytes(before, limits)

    def changes(self) -> Changes:
        self.stale = True  # until it is known to equal the tree
        with open_folder(self._root) as root, open_folder(self.tree) as copy:
            try:
                after = scan(copy, depth=self._limits.tree_depth, most=2 * self._limits.staged_files)
            except TreeTooLargeError as error:
                return Changes(violations={".": str(error)})
            refuse_if_changed(self._before, self._now(root))
            return compare(self._before, after, root, copy, self._go_on, protected=self._protected, limits=self._limits)

    def accept(self, changes: Changes) -> None:
        if changes:
            with open_folder(self._root) as root, open_folder(self.tree) as copy:
                apply(changes, self._before, root, copy, self._go_on)
                self._before = self._now(root)
        self.stale = UNFINISHED in self._before

    def reject(self) -> None:
        self.stale = True

    def _now(self, root: int) -> dict[str, Entry]:
        return scan(root, depth=self._limits.tree_depth)


class _InPlace:
    """The tree itself, with what is protected backed up."""

    is_copy = False

    def __init__(
        self,
        root: Path,
        store: Path,
        reason: str,
        *,
        protected: ProtectedPaths,
        limits: PassLimits,
        supervisor: tuple[int, str],
    ) -> None:
        self.tree = root
        self.how = f"in_place: {reason}"
        self._store = store
        self._backup = ProtectedBackup.make(
            root, store, protected=protected, depth=limits.tree_depth, supervisor=supervisor
        )
        self.disk_bytes = _disk_bytes(self._backup.before, limits)

    def changes(self) -> Changes:
        return self._backup.changes()

    def accept(self, changes: Changes) -> None:
        """They are the tree's already."""

    def reject(self) -> None:
        self._backup.restore()

    def close(self) -> None:
        self._backup.close()
        BackupRecord.discard(self._store)  # whatever comes of the tree from here on, it is not to be undone
