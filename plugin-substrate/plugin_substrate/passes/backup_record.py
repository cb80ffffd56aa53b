"""What a backup of protected paths says of itself, so that another host can put them back when its own was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.passes.records import ProtectedPaths
from plugin_substrate.passes.tree import CREATE, Entry, Kind, opened
from plugin_substrate.removal import remove_tree

__all__ = ["BackupRecord"]

_NAME, _UNWRITTEN = "record.json", "record.part"


@dataclass(frozen=True, kw_only=True)
class BackupRecord:
    """Whose protected paths they are, what stood there, and which process has seen to it that no plugin is at work.

    The tree is told by its path and its inode: one that was made anew at the same place is another. ``supervisor`` is
    a process id and when that process started; it ends when all below it are dead.
    """

    tree: str
    inode: int
    supervisor: tuple[int, str]
    protected: ProtectedPaths
    depth: int
    kept: Mapping[str, Entry]

    def write(self, store: int) -> None:
        """Put it into the open folder of the copies, which it makes a backup: without it nobody reads them."""
        content = {
            "tree": self.tree,
            "inode": self.inode,
            "supervisor": self.supervisor,
            "names": sorted(self.protected.names),
            "folders": sorted(self.protected.folders),
            "depth": self.depth,
            "kept": {path: asdict(entry) for path, entry in self.kept.items()},
        }
        with opened(_UNWRITTEN, CREATE, store) as descriptor, os.fdopen(os.dup(descriptor), "w") as file:
            json.dump(content, file, indent=1)
        os.rename(_UNWRITTEN, _NAME, src_dir_fd=store, dst_dir_fd=store)

    @staticmethod
    def read(store: Path) -> BackupRecord | None:
        """Return the record in a folder, None where there is none that can be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return _record(json.loads((store / _NAME).read_bytes()))
        return None

    @staticmethod
    def discard(store: Path) -> None:
        """Remove a backup: the record goes first, so that there is never one whose copies are gone."""
        (store / _NAME).unlink(missing_ok=True)
        remove_tree(store)

    def is_of(self, root: Path) -> bool:
        """Whether a folder is the tree."""
        return (self.tree, self.inode) == (str(root.resolve()), root.stat().st_ino)


def _record(content: Mapping[str, Any]) -> BackupRecord:
    pid, started = content["supervisor"]
    return BackupRecord(
        tree=str(content["tree"]),
        inode=int(content["inode"]),
        supervisor=(int(pid), str(started)),
        protected=ProtectedPaths(names=frozenset(content["names"]), folders=frozenset(content["folders"])),
        depth=int(content["depth"]),
        kept={path: Entry(**{**facts, "kind": Kind(facts["kind"])}) for path, facts in content["kept"].items()},
    )
