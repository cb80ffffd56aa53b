"""Carries a plugin's changes over to the tree: all of them or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from plugin_substrate.passes.changes import Changes, shown
from plugin_substrate.passes.staging import copy_file
from plugin_substrate.passes.tree import CREATE, READ, Entry, Kind, look, open_below

__all__ = ["TreeChangedError", "apply", "refuse_if_changed"]


class TreeChangedError(Exception):
    """Somebody else changed the tree while a plugin worked on its copy; nothing was carried over."""


def refuse_if_changed(before: Mapping[str, Entry], now: Mapping[str, Entry]) -> None:
    """Raise a `TreeChangedError` unless a tree is what it was, apart from the times of its folders."""
    for path in before.keys() | now.keys():
        old, new = before.get(path), now.get(path)
        if old is None or new is None or _facts(old) != _facts(new):
            raise TreeChangedError(f"{shown(path)!r} was changed by somebody else meanwhile")


def _facts(entry: Entry) -> tuple[object, ...]:
    if entry.kind is Kind.FOLDER:
        return entry.kind, entry.identity, entry.mode
    return entry.kind, entry.identity, entry.mode, entry.size, entry.links, entry.modified, entry.changed, entry.target


def apply(changes: Changes, before: Mapping[str, Entry], original: int, staged: int) -> None:
    """Make the tree behind ``original`` what the copy behind ``staged`` is, or leave it as it was and raise.

    New contents are first written beside their places, so that a full disk is met before anything is replaced; each
    file then changes in one rename. What is replaced is kept under another name until the end, and put back when a
    later step fails. A changed file keeps owner, group and permissions, and is from then on a file of its own where it
    had several names. An OSError says what failed.
    """
    transaction = _Transaction(original, staged)
    try:
        for path in sorted(changes.written, key=lambda path: (path.count("/"), path)):
            transaction.prepare(path, changes.written[path], before.get(path))
        for path in sorted(changes.removed, key=lambda path: -path.count("/")):
            transaction.remove(path)
        for path in sorted(changes.written, key=lambda path: (path.count("/"), path)):
            transaction.place(path, changes.written[path])
    except BaseException:
        transaction.roll_back()
        raise
    transaction.finish()


class _Transaction:
    """Steps that were taken, each with what takes it back and what makes it final."""

    def __init__(self, original: int, staged: int) -> None:
        self._original = original
        self._staged = staged
        self._token = secrets.token_hex(8)
        self._ready: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []
        self._final: list[Callable[[], None]] = []
        self._numbers = 0

    def prepare(self, path: str, entry: Entry, old: Entry | None) -> None:
        """Write what will stand at a path under another name, at the top of the tree."""
        if entry.kind is Kind.FOLDER:
            return
        parent, _, name = path.rpartition("/")
        temporary = self._name()
        with open_below(self._staged, parent) as there:
            if entry.kind is Kind.LINK:
                os.symlink(os.readlink(name, dir_fd=there), temporary, dir_fd=self._original)
                self._undo.append(lambda: _remove(self._original, temporary))
            else:
                source = os.open(name, READ, dir_fd=there)
                try:
                    self._write(source, temporary, entry, old if old and old.kind is Kind.FILE else None, path)
                finally:
                    os.close(source)
        self._ready[path] = temporary

    def _write(self, source: int, temporary: str, entry: Entry, old: Entry | None, path: str) -> None:
        target = os.open(temporary, CREATE, 0o600, dir_fd=self._original)
        self._undo.append(lambda: _remove(self._original, temporary))
        try:
            copy_file(source, target, entry.size)
            if old is None:
                os.fchmod(target, _plain_mode(executable=bool(entry.mode & 0o100)))
                return
            parent, _, name = path.rpartition("/")
            with open_below(self._original, parent) as folder:
                status = os.lstat(name, dir_fd=folder)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(target, status.st_uid, status.st_gid)
            os.fchmod(target, old.mode)
        finally:
            os.close(target)

    def remove(self, path: str) -> None:
        """Take away what stands at a path."""
        parent, _, name = path.rpartition("/")
        kept = self._name()
        with open_below(self._original, parent) as folder:
            os.rename(name, kept, src_dir_fd=folder, dst_dir_fd=self._original)
        self._undo.append(lambda: self._put_back(kept, path))
        self._final.append(lambda: _remove(self._original, kept))

    def place(self, path: str, entry: Entry) -> None:
        """Put at a path what was prepared for it."""
        parent, _, name = path.rpartition("/")
        with open_below(self._original, parent) as folder:
            if entry.kind is Kind.FOLDER:
                os.mkdir(name, 0o777, dir_fd=folder)
                self._undo.append(lambda: self._remove_folder(path))
                return
            if look(folder, name) is not None:
                kept = self._name()
                os.link(name, kept, src_dir_fd=folder, dst_dir_fd=self._original, follow_symlinks=False)
                self._undo.append(lambda: self._put_back(kept, path))
                self._final.append(lambda: _remove(self._original, kept))
            else:
                self._undo.append(lambda: self._remove_file(path))
            os.rename(self._ready[path], name, src_dir_fd=self._original, dst_dir_fd=folder)

    def finish(self) -> None:
        """Throw away what was kept to be put back."""
        for step in self._final:
            step()

    def roll_back(self) -> None:
        """Take every step back, the last one first; one that cannot be does not keep the others."""
        for step in reversed(self._undo):
            with suppress(OSError):
                step()

    def _name(self) -> str:
        self._numbers += 1
        return f".pass-{self._token}-{self._numbers}"

    def _put_back(self, kept: str, path: str) -> None:
        parent, _, name = path.rpartition("/")
        with open_below(self._original, parent) as folder:
            os.rename(kept, name, src_dir_fd=self._original, dst_dir_fd=folder)
        _remove(self._original, kept)  # renaming one name of a file to another of its names does nothing

    def _remove_folder(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        with open_below(self._original, parent) as folder:
            os.rmdir(name, dir_fd=folder)

    def _remove_file(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        with open_below(self._original, parent) as folder:
            os.unlink(name, dir_fd=folder)


def _remove(folder: int, name: str) -> None:
    entry = look(folder, name)
    if entry is None:
        return
    if entry.kind is Kind.FOLDER:
        os.rmdir(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)


def _plain_mode(*, executable: bool) -> int:
    """Return the permissions that a program of this user gives a new file."""
    return (0o777 if executable else 0o666) & ~_umask()


def _umask() -> int:
    """Return the umask without changing it, which other threads would notice; 022 where the system does not tell."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    return 0o022
