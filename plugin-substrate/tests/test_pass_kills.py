"""A host that is killed while it carries changes over: the next pass finds a tree that is whole, the old or the new."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pass_kills
import pytest
from plugin_substrate.passes import CarryOverError, PluginContext, PluginHost, PluginRegistry, recover, recovery
from plugin_substrate.passes.records import UNFINISHED
from plugin_substrate.passes.work_folder import WorkFolder
from plugin_substrate.sweep import start_of

SOAK = float(os.environ.get("SOAK", "0.05"))

MANIFEST = "name: editor\nversion: '1'\nsupported_extensions: [.txt]\napi_version: '1'\n"
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


def test_a_kill_at_any_point_of_work_in_place_leaves_what_is_protected_to_be_put_back(tmp_path: Path) -> None:
    done = run_helper("in-place", tmp_path, 1 if SOAK >= 1 else 8)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "there are that many points at least"


async def never(_: object) -> None:
    raise AssertionError


async def test_the_pass_after_a_killed_one_works_on_the_tree_as_it_was(tmp_path: Path) -> None:
    package, tree = tmp_path / "plugins" / "editor", tmp_path / "tree"
    package.mkdir(parents=True)
    tree.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "manifest.yml").write_text(MANIFEST)
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


ROGUE = """
from plugin_substrate.file_plugin import FilePlugin
class Plugin(FilePlugin):
    name, version, supported_extensions = "editor", "1", [".txt"]
    def can_handle(self, path, variables):
        return True
    def transform(self, path, ctx):
        unfinished = ctx.dst_root / ".file-pass-unfinished"
        unfinished.mkdir(mode=0o700)
        (unfinished / "journal").write_text("mine")
        (ctx.dst_root / "second").unlink()
        number = 0
        while True:
            number += 1
            (ctx.dst_root / "README").write_text(f"the plugin's {number}")
            path.write_text("edited")
"""


@pytest.fixture
def killed_in_place(tmp_path: Path) -> pass_kills.Harmed:
    """A tree, and the work folder of a host that was just killed while a plugin worked on it in place.

    The plugin may be at work a moment longer: it has removed ``second``, and writes to ``README`` all the time.
    """
    package = tmp_path / "plugins" / "editor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(ROGUE)
    (package / "manifest.yml").write_text(MANIFEST)
    harmed = pass_kills.Harmed(tmp_path)
    edited = harmed.tree / "a.txt"
    edited.write_text("a")
    command = [sys.executable, pass_kills.__file__, "host-in-place", package.parent, harmed.tree, harmed.work]
    host = subprocess.Popen(list(map(str, command)))
    try:
        deadline = time.monotonic() + 60
        while edited.read_text() != "edited":
            assert host.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        host.kill()
        host.wait()
    return harmed


async def test_the_pass_after_one_that_was_killed_in_place_finds_what_is_protected_as_it_was(
    killed_in_place: pass_kills.Harmed, tmp_path: Path
) -> None:
    code = tmp_path / "plugins" / "editor" / "__init__.py"
    code.write_text(PLUGIN.replace('path.write_text("edited")', "pass"))
    host = PluginHost(PluginRegistry(tmp_path / "plugins"), work_dir=killed_in_place.work)
    context = PluginContext(variables={}, dst_root=killed_in_place.tree)
    result = await host.run_pass(context, ["a.txt"], [], never)
    assert [record["status"] for record in result.applied] == ["skipped"], result
    assert killed_in_place.protected() == killed_in_place.was
    assert not (killed_in_place.tree / UNFINISHED).exists(), "a forged journal is taken away, not followed"
    assert {path.name.partition("-")[0] for path in killed_in_place.work.glob("*/*")} == {"replaced"}


def test_what_somebody_wrote_after_a_kill_in_place_is_kept_beside(killed_in_place: pass_kills.Harmed) -> None:
    (killed_in_place.tree / "kept" / "one").write_text("somebody's")
    assert recover(killed_in_place.tree, killed_in_place.work)
    assert killed_in_place.protected() == killed_in_place.was
    (record,) = killed_in_place.work.glob("*/replaced-*/record.json")
    number = list(json.loads(record.read_text())["kept"]).index("kept/one")
    assert (record.parent / str(number)).read_text() == "somebody's"
    assert not recover(killed_in_place.tree, killed_in_place.work)


def test_nothing_is_put_back_while_a_plugin_of_the_killed_host_may_be_at_work(
    killed_in_place: pass_kills.Harmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place,) = killed_in_place.work.glob("*/protected-*/record.json")
    record = json.loads(place.read_text())
    place.write_text(json.dumps({**record, "supervisor": [os.getpid(), start_of(os.getpid())]}))
    monkeypatch.setattr(recovery, "_SECONDS_TO_DIE", 0.0)
    with pytest.raises(CarryOverError, match=f"process {os.getpid()}, .* is still at work on it"):
        recover(killed_in_place.tree, killed_in_place.work)
    assert "second" not in killed_in_place.protected()
    place.write_text(json.dumps(record))
    monkeypatch.undo()
    assert recover(killed_in_place.tree, killed_in_place.work)
    assert killed_in_place.protected() == killed_in_place.was


def test_a_backup_is_for_no_other_tree_and_no_other_host(
    killed_in_place: pass_kills.Harmed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert not recover(other, killed_in_place.work)
    recover(killed_in_place.tree, other)
    assert "second" not in killed_in_place.protected(), "work folders are looked for where they were made"
    WorkFolder(killed_in_place.work).remove()
    assert "the next pass over it puts back what is protected" in caplog.text
    killed_in_place.tree.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", killed_in_place.tree, symlinks=True)
    assert not recover(killed_in_place.tree, killed_in_place.work), "it was made anew"
    assert "second" not in killed_in_place.protected()
    shutil.rmtree(killed_in_place.tree)
    (tmp_path / "moved").rename(killed_in_place.tree)
    assert recover(killed_in_place.tree, killed_in_place.work)
    assert killed_in_place.protected() == killed_in_place.was


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
