"""What a plugin did to its copy of a tree, and what of it is against the rules."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plugin_substrate.passes.records import PassLimits, ProtectedPaths
from plugin_substrate.passes.staging import same_content
from plugin_substrate.passes.tree import READ, Entry, Kind, open_below, opened, shown

__all__ = ["Changes", "compare"]

_SET_ID = 0o7000


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Paths that differ: ``written`` were created or changed, ``removed`` are gone, and ``violations`` say what of it.

    What became something else, a file a folder or a link, stands in both.
    """

    written: Mapping[str, Entry] = field(default_factory=dict)
    removed: Mapping[str, Entry] = field(default_factory=dict)
    violations: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.written or self.removed)

    @property
    def files(self) -> list[str]:
        """The files and links among them, sorted."""
        both = [*self.written.items(), *self.removed.items()]
        return sorted({shown(path) for path, entry in both if entry.kind is not Kind.FOLDER})


def compare(
    before: Mapping[str, Entry],
    after: Mapping[str, Entry],
    original: int,
    staged: int,
    go_on: Callable[[], None] = lambda: None,
    *,
    protected: ProtectedPaths,
    limits: PassLimits,
) -> Changes:
    """Compare a tree as it was copied with the copy as a plugin left it, all contents byte by byte.

    ``before`` describes the folder behind ``original``, ``after`` the one behind ``staged``. Permissions are not
    compared, as they are not carried over. Sockets, pipes and devices of the original are none of a plugin's business.
    ``go_on`` is called between any two files, and may raise.
    """
    written: dict[str, Entry] = {}
    removed: dict[str, Entry] = {}
    for path, entry in after.items():
        go_on()
        old = before.get(path)
        if old is None:
            written[path] = entry
        elif old.kind is not entry.kind:
            written[path], removed[path] = entry, old
        elif _differ(path, old, entry, original, staged):
            written[path] = entry
    gone = {path: old for path, old in before.items() if path not in after and old.kind is not Kind.SPECIAL}
    removed |= gone
    violations = {shown(path): "is protected" for path in (*written, *removed) if protected.covers(path)}
    for path, old in before.items():
        parent = path.rpartition("/")[0]
        if old.kind is Kind.SPECIAL and parent in removed:
            violations.setdefault(shown(parent), "holds a socket, a pipe or a device, and was removed")
    names = Counter(entry.identity for entry in after.values())
    for path, entry in after.items():
        reason = _refused(path, entry, before.get(path), names, limits, new=path in written)
        if reason:
            violations.setdefault(shown(path), reason)
    grown = _size(after) - _size(before)
    if grown > limits.growth_bytes:
        violations["."] = f"the tree has grown by {grown} bytes, more than {limits.growth_bytes}"
    return Changes(written=written, removed=removed, violations=dict(sorted(violations.items())))


def _refused(
    path: str,
    entry: Entry,
    old: Entry | None,
    names: Mapping[tuple[int, int], int],
    limits: PassLimits,
    *,
    new: bool,
) -> str:
    """Say why an entry of the copy must not be carried over; empty when it may."""
    if entry.kind is Kind.SPECIAL:
        return "is a socket, a pipe or a device"
    if old is not None and old.kind is Kind.SPECIAL:
        return "stands where the tree has a socket, a pipe or a device"
    if entry.mode & _SET_ID and entry.kind is not Kind.LINK:
        return "has set-id or sticky bits"
    if entry.kind is Kind.FILE and entry.links > names[entry.identity]:
        return "is a hard link to a file outside of the tree"
    if entry.kind is Kind.FILE and new and entry.size > limits.file_bytes:
        return f"has {entry.size} bytes, more than {limits.file_bytes}"
    if entry.kind is Kind.LINK and new and _escapes(path, entry.target):
        return "is a link that leads out of the tree"
    if new and old is None and not _utf8(path):
        return "has a name that is no UTF-8"
    return ""


def _escapes(path: str, target: str) -> bool:
    """Whether a link leads out by its text alone: absolute, or with more steps up than it has folders above it."""
    if target.startswith("/"):
        return True
    steps, depth = target.split("/"), path.count("/")
    for step in steps:
        depth += {"..": -1, ".": 0, "": 0}.get(step, 1)
        if depth < 0:
            return True
    return posixpath.normpath(target) == ""


def _utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(tree: Mapping[str, Entry]) -> int:
    return sum(entry.size for entry in tree.values() if entry.kind is Kind.FILE)


def _differ(path: str, old: Entry, new: Entry, original: int, staged: int) -> bool:
    if new.kind is Kind.LINK:
        return old.target != new.target
    if new.kind is not Kind.FILE:
        return False
    return old.size != new.size or not _same_content(path, original, staged)


def _same_content(path: str, original: int, staged: int) -> bool:
    parent, _, name = path.rpartition("/")
    with (
        open_below(original, parent) as here,
        open_below(staged, parent) as there,
        opened(name, READ, here) as first,
        opened(name, READ, there) as second,
    ):
        return same_content(first, second)
