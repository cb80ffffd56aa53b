"""Where the plugins of one pass work, one after the other, and what becomes of what they did."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from plugin_substrate.passes.applying import apply, refuse_if_changed
from plugin_substrate.passes.carry_over import recover
from plugin_substrate.passes.changes import Changes, compare
from plugin_substrate.passes.in_place import ProtectedBackup
from plugin_substrate.passes.records import PassLimits, ProtectedPaths
from plugin_substrate.passes.staging import copy_tree, too_large
from plugin_substrate.passes.tree import Entry, TreeTooLargeError, open_folder, scan

__all__ = ["Stage", "Workspace"]


class Stage(Protocol):
    """One plugin's place of work. It blocks on the disk, so it is used in threads."""

    @property
    def tree(self) -> Path:
        """The folder that the plugin sees."""
        ...

    @property
    def how(self) -> str:
        """How it was staged: ``copy``, or ``in_place`` and why."""
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


class Workspace:
    """A temporary folder of ours, and a stage for each plugin: the same copy again while it equals the tree.

    A tree beyond the limits of a copy is worked on in place: what is protected is backed up and put back, and nothing
    else can be.
    """

    def __init__(self, root: Path, parent: Path | None, *, protected: ProtectedPaths, limits: PassLimits) -> None:
        """Make the folder in ``parent``, or where temporary files go; an OSError when it cannot be made."""
        self._root = root
        self._protected = protected
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="file-pass-", dir=parent)).resolve()
        self._copy: _Copy | None = None
        self._backup: _InPlace | None = None

    def stage(self) -> Stage:
        """Return where the next plugin works; an OSError when the tree cannot be read or copied."""
        if self._backup is not None:
            self._backup.close()
            self._backup = None
        if self._copy is not None and not self._copy.stale:
            return self._copy
        reason, before = self._read()
        if reason:
            self._backup = _InPlace(self._root, self.scratch(), reason, protected=self._protected, limits=self._limits)
            return self._backup
        if self._copy is not None:
            shutil.rmtree(self._copy.tree, ignore_errors=True)
        self._copy = _Copy(self._root, self.scratch(), before, protected=self._protected, limits=self._limits)
        return self._copy

    def scratch(self) -> Path:
        """Return a new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self._folder))

    def close(self) -> None:
        """Remove everything of ours."""
        if self._backup is not None:
            self._backup.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> tuple[str, Mapping[str, Entry]]:
        limits = self._limits
        recover(self._root)
        with open_folder(self._root) as root:
            try:
                before = scan(root, depth=limits.tree_depth, most=limits.staged_files)
            except TreeTooLargeError as error:
                return str(error), {}
        return too_large(before, most_files=limits.staged_files, most_bytes=limits.staged_bytes), before


class _Copy:
    """A copy of the tree; good for another plugin as long as everything done to it was carried over."""

    how = "copy"

    def __init__(
        self, root: Path, tree: Path, before: Mapping[str, Entry], *, protected: ProtectedPaths, limits: PassLimits
    ) -> None:
        self._root = root
        self.tree = tree
        self._before = before
        self._protected = protected
        self._limits = limits
        self.stale = False
        with open_folder(root) as source, open_folder(tree) as target:
            copy_tree(source, target, before)

    def changes(self) -> Changes:
        self.stale = True  # until it is known to equal the tree
        with open_folder(self._root) as root, open_folder(self.tree) as copy:
            try:
                after = scan(copy, depth=self._limits.tree_depth, most=2 * self._limits.staged_files)
            except TreeTooLargeError as error:
                return Changes(violations={".": str(error)})
            refuse_if_changed(self._before, self._now(root))
            return compare(self._before, after, root, copy, protected=self._protected, limits=self._limits)

    def accept(self, changes: Changes) -> None:
        if changes:
            with open_folder(self._root) as root, open_folder(self.tree) as copy:
                apply(changes, self._before, root, copy)
                self._before = self._now(root)
        self.stale = False

    def reject(self) -> None:
        self.stale = True

    def _now(self, root: int) -> dict[str, Entry]:
        return scan(root, depth=self._limits.tree_depth)


class _InPlace:
    """The tree itself, with what is protected backed up."""

    def __init__(self, root: Path, store: Path, reason: str, *, protected: ProtectedPaths, limits: PassLimits) -> None:
        self.tree = root
        self.how = f"in_place: {reason}"
        self._backup = ProtectedBackup(root, store, protected=protected, limits=limits)

    def changes(self) -> Changes:
        return self._backup.changes()

    def accept(self, changes: Changes) -> None:
        """They are the tree's already."""

    def reject(self) -> None:
        self._backup.restore()

    def close(self) -> None:
        self._backup.close()
