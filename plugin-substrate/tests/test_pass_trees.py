"""Copying, comparing and carrying over, on any tree: afterwards the folder is the copy, or what it was."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate.passes import PassLimits, ProtectedPaths, carry_over
from plugin_substrate.passes import applying as applying_module
from plugin_substrate.passes.applying import apply
from plugin_substrate.passes.changes import compare
from plugin_substrate.passes.staging import copy_tree
from plugin_substrate.passes.tree import open_folder, scan

NAMES = st.sampled_from(["a", "b", "c", "ä ö"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
CONTENTS = st.binary(max_size=30)
THINGS = st.one_of(
    st.tuples(st.just("file"), CONTENTS),
    st.tuples(st.just("folder"), st.none()),
    st.tuples(st.just("link"), NAMES),
)
TREES = st.dictionaries(PATHS, THINGS, max_size=8)

Facts = dict[str, Any]


def build(root: Path, things: dict[str, Any]) -> None:
    """Put things into a folder; what stands in the way of one is replaced."""
    for path, (kind, value) in things.items():
        place = root
        for name in path.split("/")[:-1]:
            place = place / name
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
                place.mkdir()
        place = root / path
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if kind == "file":
            place.write_bytes(value)
        elif kind == "link":
            place.symlink_to(value)
        else:
            place.mkdir()


def facts(root: Path, *, exactly: bool = False) -> Facts:
    found: Facts = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        identity = (status.st_mode, status.st_ino, path.is_dir() or status.st_nlink) if exactly else ()
        found[str(path.relative_to(root))] = (content, identity)
    return found


class Two:
    """A folder and its copy, which was then changed."""

    def __init__(self, folder: str, first: dict[str, Any], changes: dict[str, Any], removed: set[str]) -> None:
        self.original, self.copy = Path(folder, "original"), Path(folder, "copy")
        self.original.mkdir()
        self.copy.mkdir()
        build(self.original, first)
        with open_folder(self.original) as here, open_folder(self.copy) as there:
            self.before = scan(here, depth=10)
            copy_tree(here, there, self.before)
        assert facts(self.copy) == facts(self.original)
        for path in removed:
            place = self.copy / path
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                with suppress(OSError):  # or it was never there
                    place.unlink()
        build(self.copy, changes)

    def carry_over(self) -> None:
        with open_folder(self.original) as here, open_folder(self.copy) as there:
            after = scan(there, depth=10)
            found = compare(self.before, after, here, there, protected=ProtectedPaths(), limits=PassLimits())
            apply(found, self.before, here, there)


@given(first=TREES, changes=TREES, removed=st.sets(PATHS, max_size=3))
def test_the_folder_becomes_the_copy(first: dict[str, Any], changes: dict[str, Any], removed: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        two = Two(folder, first, changes, removed)
        unchanged = facts(two.original, exactly=True)
        two.carry_over()
        assert facts(two.original) == facts(two.copy)
        after = facts(two.original, exactly=True)
        for path, entry in unchanged.items():
            if entry[0] is not None and after.get(path, (None,))[0] == entry[0]:
                assert after[path] == entry, "what was not changed is the very same file"


@given(first=TREES, changes=TREES, removed=st.sets(PATHS, max_size=3), step=st.integers(1, 12))
def test_a_failure_at_any_step_leaves_the_folder_as_it_was(
    first: dict[str, Any], changes: dict[str, Any], removed: set[str], step: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        two = Two(folder, first, changes, removed)
        before = facts(two.original, exactly=True)
        broken = _DiskThatFills(step)
        for module in (applying_module, carry_over):
            patch.setattr(module, "os", broken)
        try:
            two.carry_over()
        except OSError:
            assert facts(two.original, exactly=True) == before
        else:
            assert broken.left > 0
            assert facts(two.original) == facts(two.copy)


class _DiskThatFills:
    """`os`, whose so-many-th change of the disk fails, and none after it: space is needed to go on, not to go back."""

    CHANGES = frozenset({"open", "symlink", "rename", "link", "mkdir"})

    def __init__(self, step: int) -> None:
        self.left = step

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in self.CHANGES:
            return function

        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return counted


def test_a_hard_link_to_a_file_outside_is_not_carried_over(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    two = Two(str(tmp_path), {"a": ("file", b"x")}, {}, set())
    os.link(tmp_path / "outside", two.copy / "inside")
    os.link(two.copy / "a", two.copy / "twice")
    with open_folder(two.original) as here, open_folder(two.copy) as there:
        after = scan(there, depth=10)
        found = compare(two.before, after, here, there, protected=ProtectedPaths(), limits=PassLimits())
    assert found.violations == {"inside": "is a hard link to a file outside of the tree"}


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1755])
def test_set_id_bits_are_not_carried_over(tmp_path: Path, mode: int) -> None:
    two = Two(str(tmp_path), {"a": ("file", b"x")}, {}, set())
    (two.copy / "a").chmod(mode)
    with open_folder(two.original) as here, open_folder(two.copy) as there:
        after = scan(there, depth=10)
        found = compare(two.before, after, here, there, protected=ProtectedPaths(), limits=PassLimits())
    assert found.violations == {"a": "has set-id or sticky bits"}


def test_a_sparse_file_is_copied_whole(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5_000_000)
        file.seek(3_000_000)
        file.write(b"island")
    two = Two(str(tmp_path), {}, {}, set())
    shutil.copy(tmp_path / "sparse", two.original / "sparse")
    target = tmp_path / "target"
    target.mkdir()
    with open_folder(two.original) as here, open_folder(target) as there:
        copy_tree(here, there, scan(here, depth=10))
    assert (target / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()
