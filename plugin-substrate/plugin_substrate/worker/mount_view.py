"""Which part of the file tree a worker sees: what Landlock lets it open, at its usual place, and nothing else.

It is worked out from the same rules, so that the two cannot differ; links on the way to a path are part of it, and
keep what they say. A view is a value: as long as it stays equal, nothing that is shown has come, gone or been replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping

from plugin_substrate.records import record
from plugin_substrate.worker.landlock import Access

READ, WRITE, DEVICE = range(3)  #: How a path is shown: what the later show, they show in the manner of the earlier too.

_PROC = "/proc"  # as a whole: what is below it of a process's own is another place for each
_DEVICES = "/dev/"
_MOST_LINKS = 40  # of one path, as the kernel has it
_MOST_KNOWN = 32

Rules = tuple[tuple[str, int], ...]  # rights below paths, as Landlock numbers them
Seen = tuple[int, int, int, int]  # kind, device and inode of what stands at a path; and of a link, when it was made


@record()
class View:
    """What is shown. ``mounts`` are path, manner, device and inode, outer folders first; ``links`` path and text.

    ``folders`` are those on the way to them, which hold nothing else. With ``read_only`` what may not be written is
    also mounted so.
    """

    mounts: tuple[tuple[str, int, int, int], ...]
    links: tuple[tuple[str, str], ...]
    folders: tuple[str, ...]
    read_only: bool = False


class Views:
    """Works out views: each anew only when something has changed on the way to what it shows."""

    def __init__(self) -> None:
        self._known: dict[tuple[Rules, bool], tuple[View, Mapping[str, Seen | None]]] = {}

    def of(self, rules: Rules, *, read_only: bool = False) -> View:
        """Return the view of some rules, see `view_of`."""
        known = self._known.get((rules, read_only))
        if known is not None and all(_look(path) == seen for path, seen in known[1].items()):
            return known[0]
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        tree = _Tree()
        view = _view_of(rules, tree, read_only=read_only)
        self._known[rules, read_only] = view, tree.seen
        return view


def view_of(rules: Rules, *, read_only: bool = False) -> View:
    """Return what is to be shown for rights below paths; a path that this process cannot find shows nothing.

    Where Landlock holds, ``read_only`` adds nothing, and makes errors of another kind of what are refusals.
    """
    return _view_of(rules, _Tree(), read_only=read_only)


def _view_of(rules: Rules, tree: _Tree, *, read_only: bool) -> View:
    found: dict[str, int] = {}
    for path, access in rules:
        real = tree.resolve(path)
        if real is not None:
            found[real] = max(_manner(real, access), found.get(real, READ))
    kept: dict[str, int] = {}
    for path in sorted(found, key=lambda path: path.split("/")):
        outer = _outer(path, kept)
        if outer is None or kept[outer] < found[path]:
            kept[path] = found[path]
    links = tuple((path, text) for path, text in tree.links.items() if _outer(path, kept) is None)
    return View(
        mounts=tuple((path, manner, *tree.identity(path)) for path, manner in kept.items()),
        links=links,
        folders=tuple(sorted(_folders([*kept, *(path for path, _ in links)], kept))),
        read_only=read_only,
    )


def _folders(paths: Iterable[str], shown: dict[str, int]) -> set[str]:
    """Return the folders above some paths, as far as no other of what is shown brings them along."""
    folders: set[str] = set()
    for path in paths:
        if _outer(path, shown) is None:
            while path := path.rpartition("/")[0]:
                folders.add(path)
    return folders


def _manner(path: str, access: int) -> int:
    if access & Access.IOCTL_DEV or (path.startswith(_DEVICES) and access & Access.MAKE != Access.MAKE):
        return DEVICE
    return WRITE if access & Access.WRITE_FILE else READ


def _outer(path: str, shown: dict[str, int]) -> str | None:
    """Return the innermost path that is shown and has this one below it."""
    while path != "/":
        path = path.rpartition("/")[0] or "/"
        if path in shown:
            return path
    return None


class _Tree:
    """Follows paths, each step of them once."""

    def __init__(self) -> None:
        self.links: dict[str, str] = {}
        self.seen: dict[str, Seen | None] = {}

    def resolve(self, path: str) -> str | None:
        """Return the path without links, None where it leads nowhere; its links are kept."""
        waiting, place, links = path.split("/")[::-1], "", 0
        while waiting:
            name = waiting.pop()
            if name in ("", "."):
                continue
            if name == "..":
                place = place.rpartition("/")[0]
                continue
            here = f"{place}/{name}"
            if here == _PROC:
                return here
            seen = self._look(here)
            if seen is None:
                return None
            if stat.S_ISLNK(seen[0]):
                links += 1
                text = self._read_link(here)
                if text is None or links > _MOST_LINKS:
                    return None
                waiting += text.split("/")[::-1]
                place = "" if text.startswith("/") else place
            else:
                place = here
        return place or "/"

    def identity(self, path: str) -> tuple[int, int]:
        """Return device and inode of a path that was resolved."""
        seen = self._look(path)
        return seen[1:3] if seen is not None else (0, 0)

    def _look(self, path: str) -> Seen | None:
        if path not in self.seen:
            self.seen[path] = _look(path)
        return self.seen[path]

    def _read_link(self, path: str) -> str | None:
        if path not in self.links:
            try:
                self.links[path] = os.readlink(path)
            except OSError:
                return None
        return self.links[path]


def _look(path: str) -> Seen | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    kind = stat.S_IFMT(found.st_mode)
    return kind, found.st_dev, found.st_ino, found.st_ctime_ns if kind == stat.S_IFLNK else 0
