"""Kills processes that change a tree for a plugin, before each thing that they do to the disk.

Run by `test_pass_kills`: ``matrix FOLDER EVERY`` kills one that carries over at each point, and after each EVERY-th of
them the recovery too, at each of its points; ``in-place FOLDER EVERY`` does so with one that puts back what is
protected; ``host PLUGINS TREE POINT`` runs a pass and is killed when it carries over, and ``host-in-place PLUGINS TREE
WORK`` runs one in place.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from plugin_substrate import removal
from plugin_substrate.passes import (
    PassLimits,
    PluginContext,
    PluginHost,
    PluginRegistry,
    ProtectedPaths,
    applying,
    backup_record,
    carry_over,
    in_place,
    recover,
)
from plugin_substrate.passes import tree as tree_module
from plugin_substrate.passes.applying import apply
from plugin_substrate.passes.changes import compare
from plugin_substrate.passes.records import UNFINISHED
from plugin_substrate.passes.staging import copy_tree
from plugin_substrate.passes.tree import open_folder, scan
from plugin_substrate.passes.workspace import Workspace

Facts = dict[str, Any]

PROTECTED = ProtectedPaths(names=frozenset({"README", "second", "link"}), folders=frozenset({"kept"}))
IN_PLACE = PassLimits(staged_files=1)


class DiskUntil:
    """`os`, of which the so-many-th change of the disk comes only after ``then`` was called."""

    CHANGES = frozenset(
        {"mkdir", "symlink", "rename", "link", "unlink", "rmdir", "write", "fchmod", "chmod", "utime", "chown"}
    )

    def __init__(self, left: int, then: Callable[[], None]) -> None:
        self.left = left
        self._then = then

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in self.CHANGES:
            return function

        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self._then()
            return function(*arguments, **options)

        return counted

    def instead_of_os(self, *others: ModuleType) -> None:
        """Take the place of `os` in everything that carries changes over, and in other modules."""
        for module in (applying, carry_over, tree_module, *others):
            module.os = self  # type: ignore[attr-defined]


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed at a point; tells whether it came there."""
    pid = os.fork()
    if pid == 0:
        DiskUntil(point, lambda: os.kill(os.getpid(), signal.SIGKILL)).instead_of_os(backup_record, in_place, removal)
        work()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def facts(root: Path) -> Facts:
    """Every path with all that must be what it was: kind, permissions, inode, names, content and time of change."""
    found: Facts = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        common = (status.st_mode, status.st_ino, status.st_uid, status.st_gid)
        if path.is_symlink():
            found[str(path)] = (*common, path.readlink())
        elif path.is_file():
            found[str(path)] = (*common, status.st_nlink, status.st_mtime_ns, path.read_bytes())
        else:
            found[str(path)] = common
    return found


def contents(root: Path) -> Facts:
    """Every path with its content alone."""
    kinds = {path.relative_to(root): (path.is_symlink(), path.is_dir()) for path in root.rglob("*")}
    return {
        str(path): (root / path).readlink() if link else None if folder else (root / path).read_bytes()
        for path, (link, folder) in kinds.items()
    }


class Two:
    """A tree with a copy that differs from it in every way."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.copy = folder / "tree", folder / "copy"
        for root in (self.tree, self.copy):
            (root / "sub" / "deep").mkdir(parents=True)
        for name in ("changed.txt", "sub/changed.txt", "sub/gone.txt", "sub/deep/gone.txt", "becomes-a-folder", "same"):
            (self.tree / name).write_text(name)
        (self.tree / "changed.txt").chmod(0o640)
        os.link(self.tree / "changed.txt", self.tree / "its second name")
        (self.tree / "link").symlink_to("same")
        (self.tree / "becomes-a-file").mkdir()
        with open_folder(self.tree) as here, open_folder(self.copy) as there:
            shutil.rmtree(self.copy / "sub")
            self.before = scan(here, depth=10)
            copy_tree(here, there, self.before)
        for name in ("changed.txt", "sub/changed.txt", "sub/new.txt"):
            (self.copy / name).write_text("new")
        shutil.rmtree(self.copy / "sub" / "deep")
        (self.copy / "sub" / "gone.txt").unlink()
        (self.copy / "link").unlink()
        (self.copy / "link").symlink_to("changed.txt")
        (self.copy / "becomes-a-folder").unlink()
        (self.copy / "becomes-a-folder" / "new").mkdir(parents=True)
        (self.copy / "becomes-a-folder" / "new" / "file").write_text("new")
        (self.copy / "becomes-a-file").rmdir()
        (self.copy / "becomes-a-file").write_text("new")

    def carry_over(self) -> None:
        with open_folder(self.tree) as here, open_folder(self.copy) as there:
            after = scan(there, depth=10)
            found = compare(self.before, after, here, there, protected=ProtectedPaths(), limits=PassLimits())
            assert not found.violations, found
            apply(found, self.before, here, there)


def matrix(folder: Path, every: int) -> None:
    ended = False
    for point in count(1):
        two = Two(folder / str(point))
        was, becomes = facts(two.tree), contents(two.copy)
        if not killed_at(point, two.carry_over):
            assert contents(two.tree) == becomes
            break
        second = 1 if point % every == 0 else 0
        while second and killed_at(second, partial(recover, two.tree)):
            second += 1
        recover(two.tree)
        assert not (two.tree / UNFINISHED).exists()
        assert not recover(two.tree)
        ended = ended or facts(two.tree) != was
        assert contents(two.tree) == becomes if ended else facts(two.tree) == was, point
    assert ended, "the last points are those where all was carried over, and only the tidying up is left"
    sys.stdout.write(f"{point}\n")


class Harmed:
    """A tree that is worked on in place, and a plugin that spares nothing of what is protected."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.work = folder / "tree", folder / "work"
        self.work.mkdir(parents=True)
        (self.tree / "kept" / "deep").mkdir(parents=True)
        for name in ("README", "second", "kept/one", "kept/deep/two", "free"):
            (self.tree / name).write_text(name)
        (self.tree / "README").chmod(0o640)
        (self.tree / "link").symlink_to("README")
        self.was = self.protected()

    def of_somebody_else(self) -> Harmed:
        """Have it belong to another user in part, if we may."""
        with suppress(PermissionError):
            for name in ("README", "second", "kept/deep", "link"):
                os.chown(self.tree / name, 4321, 4321, follow_symlinks=False)
        self.was = self.protected()
        return self

    def protected(self) -> Facts:
        """What must be put back: kind, permissions, owner, content and time, whatever inode it has."""
        found = facts(self.tree)
        names = {str(Path(path).relative_to(self.tree)): path for path in found}
        return {
            name: [each for number, each in enumerate(found[path]) if number != 1]
            for name, path in names.items()
            if PROTECTED.covers(name)
        }

    def harm(self) -> None:
        (self.tree / "README").write_text("the plugin's")
        (self.tree / "second").unlink()
        (self.tree / "second").mkdir()
        (self.tree / "second" / "full").write_text("the plugin's")
        (self.tree / "link").unlink()
        (self.tree / "link").write_text("the plugin's")
        (self.tree / "kept" / "one").chmod(0o600)
        (self.tree / "kept" / "new").write_text("the plugin's")
        shutil.rmtree(self.tree / "kept" / "deep")
        (self.tree / "free").write_text("the plugin's")

    def work_in_place(self) -> None:
        workspace = Workspace(self.tree, self.work, protected=PROTECTED, limits=IN_PLACE, supervisor=0)
        stage = workspace.stage()
        self.harm()
        assert stage.changes().violations
        stage.reject()
        workspace.close()


def said(protected: Facts) -> Facts:
    """What is to be kept of what stands at protected paths: kind and permissions, content or target."""
    return {name: (mode, more[2:] and more[-1]) for name, (mode, *more) in protected.items()}


def in_place_matrix(folder: Path, every: int) -> None:
    for point in count(1):
        harmed = Harmed(folder / str(point)).of_somebody_else()
        killed = killed_at(point, harmed.work_in_place)
        assert killed or harmed.protected() == harmed.was
        changed = said(harmed.protected()) != said(harmed.was)
        again = partial(recover, harmed.tree, harmed.work)
        second = 1 if point % every == 0 else 0
        while second and killed_at(second, again):
            second += 1
        again()
        assert harmed.protected() == harmed.was, point
        assert not again()
        if not killed:
            break
        kept = list(harmed.work.glob("*/replaced-*/*"))
        assert bool(kept) or not changed, "what stood there is kept"
        Workspace(harmed.tree, harmed.work, protected=PROTECTED, limits=IN_PLACE, supervisor=0).scratch()
        assert sorted(harmed.work.glob("*/replaced-*/*")) == sorted(kept)
        assert not list(harmed.work.glob("*/protected-*"))
    sys.stdout.write(f"{point}\n")


def host_in_place(plugins: Path, tree: Path, work: Path) -> None:
    """Run all plugins over all files of a tree in place."""
    host = PluginHost(PluginRegistry(plugins), protected=PROTECTED, limits=IN_PLACE, work_dir=work)
    run_all(host, tree)


def host(plugins: Path, tree: Path, point: int) -> None:
    """Run all plugins over all files of a tree, and be killed in the middle of carrying over."""
    DiskUntil(point, lambda: os.kill(os.getpid(), signal.SIGKILL)).instead_of_os()
    run_all(PluginHost(PluginRegistry(plugins)), tree)


def run_all(host: PluginHost, tree: Path) -> None:
    names = [str(path.relative_to(tree)) for path in tree.rglob("*.txt")]

    async def ask(_: object) -> None:
        return None

    asyncio.run(host.run_pass(PluginContext(variables={}, dst_root=tree), names, [], ask))


if __name__ == "__main__":
    verb, first, second_argument, *third = sys.argv[1:]
    if verb == "matrix":
        matrix(Path(first), int(second_argument))
    elif verb == "in-place":
        in_place_matrix(Path(first), int(second_argument))
    elif verb == "host":
        host(Path(first), Path(second_argument), int(third[0]))
    else:
        host_in_place(Path(first), Path(second_argument), Path(third[0]))
