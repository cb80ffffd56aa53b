"""Carries a plugin's changes over to the tree: all of them or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from plugin_substrate.passes.carry_over import Step, TreeChangedError, begin, mark, ready
from plugin_substrate.passes.changes import Changes
from plugin_substrate.passes.staging import copy_file
from plugin_substrate.passes.tree import CREATE, READ, Entry, Kind, entry_at, open_below, opened, shown

__all__ = ["apply", "refuse_if_changed"]


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


def apply(
    changes: Changes,
    before: Mapping[str, Entry],
    original: int,
    staged: int,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Make the tree behind ``original`` what the copy behind ``staged`` is, or leave it as it was and raise.

    Everything new is written first, so that a full disk is met before anything is replaced; each file then changes in
    one rename. A changed file keeps owner, group and permissions, and is from then on a file of its own where it had
    several names. An OSError says what failed, and a `TreeChangedError` that somebody else was faster. ``go_on`` is
    called between any two files; when it raises, everything is taken back.
    """
    with begin(original) as carry_over:
        gone = sorted(changes.removed, key=lambda path: -path.count("/"))
        steps = [Step(path, old=mark(before[path]), new="") for path in gone]
        for path in sorted(changes.written, key=lambda path: (path.count("/"), path)):
            go_on()
            old = None if path in changes.removed else before.get(path)
            place = carry_over.folder, ready(len(steps))
            _make(place, path, changes.written[path], old, staged)
            steps.append(Step(path, old=mark(old) if old else "", new=mark(entry_at(*place))))
        carry_over.take(steps, go_on)


def _make(place: tuple[int, str], path: str, entry: Entry, old: Entry | None, staged: int) -> None:
    """Make what will stand at a path, under a name in another folder."""
    folder, ready_name = place
    if entry.kind is Kind.FOLDER:
        os.mkdir(ready_name, 0o777, dir_fd=folder)
    elif entry.kind is Kind.LINK:
        os.symlink(entry.target, ready_name, dir_fd=folder)
    else:
        parent, _, name = path.rpartition("/")
        with (
            open_below(staged, parent) as there,
            opened(name, READ, there) as source,
            opened(ready_name, CREATE, folder) as target,
        ):
            copy_file(source, target, entry.size)
            if old is not None and (old.owner, old.group) != (os.geteuid(), os.getegid()):
                os.fchown(target, old.owner, old.group)
            os.fchmod(target, old.mode if old else _plain_mode(executable=bool(entry.mode & 0o100)))


def _plain_mode(*, executable: bool) -> int:
    """Return the permissions that a program of this user gives a new file."""
    return (0o777 if executable else 0o666) & ~_umask()


def _umask() -> int:
    """Return the umask without changing it, which other threads would notice; 022 where the system does not tell."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    return 0o022
