"""A control group (cgroups(7), version 2) around a supervisor and all below it, which the kernel ends at one word.

Nobody gets out of a group without writing to the file system of groups, which no worker may, and what ends it misses
nobody who forks meanwhile. It needs no controller, only a group of our own to make one in: where this host is root, or
was started by a service manager that delegates (``Delegate=`` of systemd).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"plugin-substrate-([0-9]+)-([0-9]+)")  # the namespace that a mark's numbers belong to; the mark
_EMPTY_SECONDS = 2.0
_LOOK_SECONDS = 0.002


class ControlGroup:
    """A group that a supervisor puts itself into. Its methods block for some milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def made(cls, name: str) -> ControlGroup | None:
        """Make an empty group, None where none can be made that can be ended at one word."""
        parent = parent_folder()
        if parent is None:
            return None
        group = cls(parent / f"plugin-substrate-{name}")
        try:
            group.folder.mkdir()
        except OSError:
            return None  # the worker then does not report the layer
        if (group.folder / "cgroup.kill").exists():  # since Linux 5.14
            return group
        group.remove()
        return None

    @classmethod
    def for_mark(cls, mark: int) -> ControlGroup | None:
        """Make the group of a supervisor, which tells by its name whose it is."""
        return cls.made(f"{_namespace()}-{mark}")

    def end(self) -> None:
        """Kill all that is in it, and remove it."""
        with suppress(OSError):
            (self.folder / "cgroup.kill").write_text("1", encoding="ascii")
            deadline = time.monotonic() + _EMPTY_SECONDS
            while _populated(self.folder) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
        self.remove()

    def remove(self) -> None:
        """Remove it, if nobody is in it."""
        with suppress(OSError):  # somebody in it ends too slowly: whoever sweeps next removes it
            self.folder.rmdir()


def usable() -> bool:
    """Try whether such a group can be made here."""
    group = ControlGroup.made(f"try-{os.getpid()}")
    if group is not None:
        group.remove()
    return group is not None


def parent_folder() -> Path | None:
    """Return the folder of this process's own group of version 2, None where it may make none in it."""
    folder = own_folder()
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def own_folder() -> Path | None:
    """Return the folder of this process's own group of version 2, None where there is none that can be seen."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        memberships = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    points = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    ours = next((line[len("0::") :] for line in memberships if line.startswith("0::")), None)
    if not points or ours is None:
        return None
    folder = Path(points[0], ours.lstrip("/"))
    return folder if (folder / "cgroup.controllers").is_file() else None


def end_groups(abandoned: Callable[[int], bool]) -> None:
    """End the groups whose mark is ``abandoned``, as far as their marks mean to us what they say."""
    parent = parent_folder()
    for folder in parent.iterdir() if parent is not None else ():
        name = _NAME.fullmatch(folder.name)
        if name and name[1] == _namespace() and abandoned(int(name[2])):
            ControlGroup(folder).end()


def _populated(folder: Path) -> bool:
    return "populated 1" in (folder / "cgroup.events").read_text(encoding="ascii")


def _namespace() -> str:
    return str(Path("/proc/self/ns/pid").stat().st_ino)
