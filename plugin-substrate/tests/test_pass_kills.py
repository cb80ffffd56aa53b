"""A host that is killed while it carries changes over: the next pass finds a tree that is whole, the old or the new."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pass_kills
import pytest
from plugin_substrate.passes import CarryOverError, PluginContext, PluginHost, PluginRegistry, recover
from plugin_substrate.passes.records import UNFINISHED

SOAK = float(os.environ.get("SOAK", "0.05"))

PLUGIN = """
from plugin_substrate.file_plugin import FilePlugin
class Plugin(FilePlugin):
    name, version, supported_extensions = "editor", "1", [".txt"]
    def can_handle(self, path, variables):
        return True
    def transform(self, path, ctx):
        path.write_text("edited")
"""


def run_helper(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, pass_kills.__file__, *map(str, arguments)],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def test_a_kill_at_any_point_leaves_a_tree_that_recovers_whole(tmp_path: Path) -> None:
    done = run_helper("matrix", tmp_path, 1 if SOAK >= 1 else 6)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30, "there are that many points at least"


async def never(_: object) -> None:
    raise AssertionError


async def test_the_pass_after_a_killed_one_works_on_the_tree_as_it_was(tmp_path: Path) -> None:
    package, tree = tmp_path / "plugins" / "editor", tmp_path / "tree"
    package.mkdir(parents=True)
    tree.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "manifest.yml").write_text(
        "name: editor\nversion: '1'\nsupported_extensions: [.txt]\napi_version: '1'\n"
    )
    names = [f"{number}.txt" for number in range(5)]
    for name in names:
        (tree / name).write_text(name)
    os.link(tree / "1.txt", tree / "other-name")
    before = pass_kills.facts(tree)
    killed = run_helper("host", package.parent, tree, 15)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tree / UNFINISHED).is_dir()
    assert {(tree / name).read_text() for name in names} > {"edited"}, "it was killed between two files"
    context = PluginContext(variables={}, dst_root=tree, dry_run=True)
    result = await PluginHost(PluginRegistry(package.parent)).run_pass(context, names, [], never)
    assert [record["status"] for record in result.applied] == ["skipped"], result
    assert pass_kills.facts(tree) == before


# -- what is not ours to put right


def unfinished(tree: Path, steps: list[Any], *, inode: int | None = None) -> Path:
    """A folder as a killed host leaves it."""
    folder = tree / UNFINISHED
    folder.mkdir(mode=0o700)
    content = {"folder": folder.stat().st_ino if inode is None else inode, "steps": steps}
    (folder / "journal").write_text(json.dumps(content))
    return folder


def test_what_somebody_changed_since_the_kill_is_left_to_them(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, [["a", "1:1:1", "2:2:2"], ["b", "", "3:3:3"], ["c", "", "4"]])
    (tmp_path / "a").write_text("somebody's")
    (tmp_path / "b").write_text("somebody's")
    (folder / "old-0").write_text("as it was")
    for _ in range(2):
        with pytest.raises(CarryOverError, match=r"'a' was changed since; what it was is kept as .*/old-0"):
            recover(tmp_path)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["somebody's"] * 2
    (folder / "old-0").rename(tmp_path / "a")
    assert recover(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "a/../../outside", "", "a//b", "nul\0"])
def test_a_journal_reaches_no_further_than_its_tree(tmp_path: Path, path: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    folder = unfinished(tree, [[path, "", "1"]])
    (folder / "old-0").write_text("hostile")
    with pytest.raises(CarryOverError, match=r"journal is broken: .* is no path of a tree"):
        recover(tree)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree"]


def test_a_journal_follows_no_link(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    outside.mkdir()
    (tree / "link").symlink_to(outside)
    folder = unfinished(tree, [["link/x", "", "1"]])
    (folder / "old-0").write_text("hostile")
    with pytest.raises(CarryOverError, match="'link/x' cannot be put back"):
        recover(tree)
    assert list(outside.iterdir()) == []


def test_a_journal_that_was_cut_off_is_one_whose_first_step_was_not_taken(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, [])
    (folder / "journal").write_text('{"folder": 12, "st')
    (folder / "new-0").write_text("half")
    assert recover(tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = unfinished(tmp_path, [])
    (folder / "journal").write_text('{"folder": 12, "st')
    (folder / "old-0").write_text("worth keeping")
    with pytest.raises(CarryOverError, match="journal is broken"):
        recover(tmp_path)


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, [], inode=1)
    with pytest.raises(CarryOverError, match="was not made here"):
        recover(tmp_path)
    folder.chmod(0o770)
    with pytest.raises(CarryOverError, match="is not ours alone"):
        recover(tmp_path)


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, [])
    with (folder / "journal").open("r+") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(CarryOverError, match="another pass is carrying its changes over"):
            recover(tmp_path)
    assert recover(tmp_path)
    assert not recover(tmp_path)
