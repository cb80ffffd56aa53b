"""The way for trees too large to copy: the plugin works on the tree itself, and only the protected part is put back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from plugin_substrate.passes.backup_record import BackupRecord
from plugin_substrate.passes.changes import Changes
from plugin_substrate.passes.records import ProtectedPaths
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

    def __init__(self, root: Path, store: Path, *, protected: ProtectedPaths, depth: int) -> None:
        """Work on a tree and the folder of the copies; both stay open until `close`. See `make` and `found`."""
        self._root = os.open(root, FOLDER)
        self._store = os.open(store, FOLDER)
        self._protected = protected
        self._depth = depth
        self.before: Mapping[str, Entry] = {}  #: what the tree was, when this was made of it
        self._kept: Mapping[str, Entry] = {}
        self._copies: dict[str, str] = {}

    @classmethod
    def make(
        cls, root: Path, store: Path, *, protected: ProtectedPaths, depth: int, supervisor: tuple[int, str]
    ) -> ProtectedBackup:
        """Copy from ``root`` into the empty folder ``store``, for this host or, should it be killed, for another."""
        backup = cls(root, store, protected=protected, depth=depth)
        try:
            backup.before = scan(backup._root, depth=depth)
            backup._keep({path: entry for path, entry in backup.before.items() if protected.covers(path)})
            for path, entry in backup._kept.items():
                if entry.kind is Kind.FILE:
                    backup._copy(path)
            record = BackupRecord(
                tree=str(root.resolve()),
                inode=os.fstat(backup._root).st_ino,
                supervisor=supervisor,
                protected=protected,
                depth=depth,
                kept=backup._kept,
            )
            record.write(backup._store)
        except BaseException:
            backup.close()
            raise
        return backup

    @classmethod
    def found(cls, root: Path, store: Path, record: BackupRecord) -> ProtectedBackup:
        """Take up what a killed host copied."""
        backup = cls(root, store, protected=record.protected, depth=record.depth)
        backup._keep(record.kept)
        return backup

    def close(self) -> None:
        """Give up both folders."""
        os.close(self._root)
        os.close(self._store)

    def changes(self) -> Changes:
        """Say what has changed, by facts and not by content, but for what is protected."""
        try:
            after = scan(self._root, depth=self._depth)
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

    def changed(self) -> list[str]:
        """Return the protected paths that are not what they were, apart from their times."""
        now = scan(self._root, depth=self._depth)
        paths = self._kept.keys() | set(filter(self._protected.covers, now))
        return sorted(path for path in paths if not self._stands(path, now.get(path)))

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
                        below = scan(inner, depth=self._depth)
                except OSError:  # nobody can say what is in it: it is made anew from the backup
                    entry = None
                    remove_below(folder, name)
        for path, now in sorted(below.items(), key=lambda item: item[0].count("/"), reverse=True):
            self._take_away(f"{top}/{path}", now)
        if entry is not None:
            self._take_away(top, entry)

    def _keep(self, kept: Mapping[str, Entry]) -> None:
        self._kept = kept
        self._copies = {path: str(number) for number, path in enumerate(kept)}

    def _stands(self, path: str, now: Entry | None) -> bool:
        """Whether at a path stands what stood there."""
        old = self._kept.get(path)
        if old is None or now is None or (old.kind, old.mode, old.target) != (now.kind, now.mode, now.target):
            return False
        return old.kind is not Kind.FILE or self._is_copy(path)

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
        """Whether a file holds what it held; not so where its rights were taken away, and nobody can say."""
        parent, _, name = path.rpartition("/")
        with (
            suppress(PermissionError),
            open_below(self._root, parent) as folder,
            opened(name, READ, folder) as now,
            opened(self._copies[path], READ, self._store) as kept,
        ):
            return same_content(now, kept)
        return False

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
            if entry.kind is Kind.FOLDER and now is None:
                os.mkdir(name, 0o700, dir_fd=folder)
            elif entry.kind is Kind.LINK and (now is None or now.target != entry.target):
                remove_entry(folder, name)
                os.symlink(entry.target, name, dir_fd=folder)
            elif entry.kind is Kind.FILE and (now is None or not self._is_copy(path)):
                self._write_back(folder, name, path, entry)
            _make_as_it_was(folder, name, entry)

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


def _make_as_it_was(folder: int, name: str, entry: Entry) -> None:
    """Have what stands at a name the permissions, time and owner that it had; the last takes a privileged host."""
    now = look(folder, name)
    if now is None or now.kind is not entry.kind:
        return
    if now.mode != entry.mode and entry.kind is not Kind.LINK:
        os.chmod(name, entry.mode, dir_fd=folder)
    if now.modified != entry.modified and entry.kind is not Kind.FOLDER:
        os.utime(name, ns=(entry.modified, entry.modified), dir_fd=folder, follow_symlinks=False)
    if (now.owner, now.group) != (entry.owner, entry.group):
        os.chown(name, entry.owner, entry.group, dir_fd=folder, follow_symlinks=False)
        if entry.kind is Kind.FILE:
            os.chmod(name, entry.mode, dir_fd=folder)  # of which a new owner takes the special bits away
