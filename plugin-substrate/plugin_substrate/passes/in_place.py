"""The way for trees too large to copy: the plugin works on the tree itself, and only the protected part is put back."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from plugin_substrate.passes.changes import Changes
from plugin_substrate.passes.records import PassLimits, ProtectedPaths
from plugin_substrate.passes.staging import copy_file, same_content
from plugin_substrate.passes.tree import (
    CREATE,
    FOLDER,
    READ,
    Entry,
    Kind,
    TreeTooLargeError,
    look,
    open_below,
    opened,
    remove_entry,
    scan,
    shown,
)
from plugin_substrate.removal import remove_below

__all__ = ["ProtectedBackup"]


class ProtectedBackup:
    """Copies of everything protected in a tree, and how to put it back, byte by byte and following no link."""

    def __init__(self, root: Path, store: Path, *, protected: ProtectedPaths, limits: PassLimits) -> None:
        """Copy from ``root`` into the empty folder ``store``; both stay open until `close`."""
        self._root = os.open(root, FOLDER)
        self._store = os.open(store, FOLDER)
        self._protected = protected
        self._limits = limits
        self.before = scan(self._root, depth=limits.tree_depth)  #: what the tree was
        self._kept = {path: entry for path, entry in self.before.items() if protected.covers(path)}
        self._copies = {path: str(number) for number, path in enumerate(self._kept)}
        for path, entry in self._kept.items():
            if entry.kind is Kind.FILE:
                self._copy(path)

    def close(self) -> None:
        """Give up both folders."""
        os.close(self._root)
        os.close(self._store)

    def changes(self) -> Changes:
        """Say what has changed, by facts and not by content, but for what is protected."""
        try:
            after = scan(self._root, depth=self._limits.tree_depth)
        except TreeTooLargeError as error:
            return Changes(violations={".": str(error)})
        written = {path: entry for path, entry in after.items() if self._is_new(path, entry)}
        removed = {path: entry for path, entry in self.before.items() if path not in after}
        violations = {shown(path): "is protected" for path in (*written, *removed) if self._protected.covers(path)}
        for path, entry in written.items():
            if entry.kind is Kind.SPECIAL:
                violations.setdefault(shown(path), "is a socket, a pipe or a device")
            elif entry.mode & 0o7000 and entry.kind is Kind.FILE:
                violations.setdefault(shown(path), "has set-id or sticky bits")
        return Changes(written=written, removed=removed, violations=dict(sorted(violations.items())))

    def restore(self) -> None:
        """Make everything protected what it was: content, permissions, owner and time.

        An OSError names what could not be; everything else was.
        """
        failures = []
        for path in self._protected.tops:
            try:
                self._take_away_what_is_new(path)
            except OSError as error:
                failures.append(f"{shown(path)!r}: {error}")
        for path, entry in self._kept.items():
            try:
                self._put_back(path, entry)
            except OSError as error:
                failures.append(f"{shown(path)!r}: {error}")
        if failures:
            raise OSError(f"{len(failures)} protected paths are not what they were: {failures[0]}")

    def _take_away_what_is_new(self, top: str) -> None:
        parent, _, name = top.rpartition("/")
        with open_below(self._root, parent) as folder:
            entry = look(folder, name)
            below: dict[str, Entry] = {}
            if entry is not None and entry.kind is Kind.FOLDER:
                try:
                    with opened(name, FOLDER, folder) as inner:
                        below = scan(inner, depth=self._limits.tree_depth)
                except OSError:  # nobody can say what is in it: it is made anew from the backup
                    entry = None
                    remove_below(folder, name)
        for path, now in sorted(below.items(), key=lambda item: item[0].count("/"), reverse=True):
            self._take_away(f"{top}/{path}", now)
        if entry is not None:
            self._take_away(top, entry)

    def _is_new(self, path: str, entry: Entry) -> bool:
        old = self.before.get(path)
        if old is None or old.kind is not entry.kind:
            return True
        if path in self._kept and old.mode != entry.mode:
            return True
        if entry.kind is Kind.FOLDER:
            return False
        if path in self._kept and entry.kind is Kind.FILE and not self._is_copy(path):
            return True
        facts = ("size", "inode", "modified", "target")
        return any(getattr(old, fact) != getattr(entry, fact) for fact in facts)

    def _copy(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        with (
            open_below(self._root, parent) as folder,
            opened(name, READ, folder) as source,
            opened(self._copies[path], CREATE, self._store) as target,
        ):
            copy_file(source, target, os.fstat(source).st_size)

    def _is_copy(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        with (
            open_below(self._root, parent) as folder,
            opened(name, READ, folder) as now,
            opened(self._copies[path], READ, self._store) as kept,
        ):
            return same_content(now, kept)

    def _take_away(self, path: str, now: Entry) -> None:
        """Remove what was not there, or was something else."""
        old = self._kept.get(path)
        if old is None or old.kind is not now.kind:
            parent, _, name = path.rpartition("/")
            with open_below(self._root, parent) as folder:
                remove_below(folder, name)

    def _put_back(self, path: str, entry: Entry) -> None:
        parent, _, name = path.rpartition("/")
        with open_below(self._root, parent) as folder:
            now = look(folder, name)
            if entry.kind is Kind.FOLDER:
                if now is None:
                    os.mkdir(name, 0o700, dir_fd=folder)
                os.chmod(name, entry.mode, dir_fd=folder)
            elif entry.kind is Kind.LINK:
                if now is None or now.target != entry.target:
                    remove_entry(folder, name)
                    os.symlink(entry.target, name, dir_fd=folder)
            elif entry.kind is Kind.FILE and (now is None or not self._is_copy(path)):
                self._write_back(folder, name, path, entry)
            elif now is not None and (now.mode, now.modified) != (entry.mode, entry.modified):
                os.chmod(name, entry.mode, dir_fd=folder)
                os.utime(name, ns=(entry.modified, entry.modified), dir_fd=folder, follow_symlinks=False)

    def _write_back(self, folder: int, name: str, path: str, entry: Entry) -> None:
        temporary = f".{name[:100]}.{secrets.token_hex(8)}"  # which nobody can have put in the way
        try:
            with opened(self._copies[path], READ, self._store) as source, opened(temporary, CREATE, folder) as target:
                copy_file(source, target, entry.size)
                os.fchmod(target, entry.mode)
                os.utime(target, ns=(entry.modified, entry.modified))
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            remove_entry(folder, temporary)
            raise
