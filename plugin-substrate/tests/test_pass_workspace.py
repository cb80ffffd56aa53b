"""Where plugins work: broken off in time, gone afterwards, and shared with the tree where the file system can."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_passes import Write, one, run, snapshot
from plugin_substrate.passes import PassLimits, ProtectedPaths, applying, staging
from plugin_substrate.passes.work_folder import WorkFolder, remove_tree
from plugin_substrate.passes.workspace import Workspace


@pytest.mark.parametrize(("module", "name"), [(staging, "_copy"), (applying, "_make")], ids=["copied", "carried over"])
async def test_a_pass_that_is_cancelled_is_at_work_no_more(
    packages: Path, tree: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Cancelled in the middle of what blocks on the disk: the caller gets the folder back as it was, and to itself."""
    work, loop = tmp_path / "work", asyncio.get_running_loop()
    work.mkdir()
    write(transform="path.write_text('changed')")
    begun, cancelled = asyncio.Event(), threading.Event()
    function = getattr(module, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        assert cancelled.wait(60)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, slow)
    before = snapshot(tree)
    task = asyncio.create_task(run(packages, tree, work_dir=work))
    await begun.wait()
    task.cancel()
    loop.call_soon(cancelled.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert snapshot(tree) == before
    assert list(work.iterdir()) == []


def test_folders_of_dead_hosts_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead, foreign = tmp_path / "file-pass-dead", tmp_path / "file-pass-link"
    (dead / "deep").mkdir(parents=True)
    (dead / "deep" / "file").touch()
    foreign.symlink_to(tmp_path)
    living = WorkFolder(tmp_path)
    other = WorkFolder(tmp_path)
    assert {living.path, other.path, foreign} == set(tmp_path.iterdir())
    living.remove()
    other.remove()
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_backup_that_was_not_finished_is_removed_as_no_plugin_had_begun(tmp_path: Path) -> None:
    backup = tmp_path / "file-pass-dead" / "protected-x"
    backup.mkdir(parents=True)
    (backup / "0").write_text("half")
    WorkFolder(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


async def test_a_work_folder_that_cannot_be_made_is_a_record(
    packages: Path, tree: Path, write: Write, tmp_path: Path
) -> None:
    write(transform="path.write_text('changed')")
    record = await one(packages, tree, work_dir=tmp_path / "missing")
    assert (record["status"], record["isolation"]["exit_code"]) == ("failed", 3)
    assert record["error"].startswith("staging_failed: ")


def test_a_folder_is_removed_however_deep_it_is_and_whatever_its_permissions(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    here = os.open(root, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
        os.fchmod(here, 0)
        os.close(here)
        here = below
    os.close(here)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    root.chmod(0o700)
    (root / "link").symlink_to(outside)
    remove_tree(root)
    assert list(tmp_path.iterdir()) == [outside]
    assert (outside / "file").exists()


# -- sharing blocks


@pytest.fixture(params=["btrfs", "xfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that can share blocks, in a file; it takes root, a kernel that has it and its program."""
    program = shutil.which(f"mkfs.{request.param}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    kernel = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    missing = [
        reason
        for reason, here in (
            ("root", os.geteuid() == 0),
            (f"mkfs.{request.param}", program),
            (f"a kernel with {request.param}", request.param in kernel),
        )
        if not here
    ]
    if missing:
        pytest.skip(f"no file system to share blocks on without {' and '.join(missing)}")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([str(program), "-q", str(image)], check=True, capture_output=True)
    mount = ["mount", "-o", "loop", str(image), str(mounted)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True, capture_output=True)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_a_copy_shares_the_blocks_of_its_tree_where_the_file_system_can(sharing: Path) -> None:
    tree = sharing / "tree"
    tree.mkdir()
    for number in range(8):
        (tree / str(number)).write_bytes(os.urandom(1 << 20))
    before = used_bytes(sharing)
    workspace = Workspace(tree, sharing, protected=ProtectedPaths(), limits=PassLimits(), supervisor=os.getpid())
    stage = workspace.stage()
    assert stage.how == "reflink"
    assert used_bytes(sharing) - before < 1 << 20
    assert not stage.changes()
    (stage.tree / "0").write_bytes(b"changed")
    with (stage.tree / "1").open("r+b") as file:
        file.write(b"changed in place")
    assert stage.changes().files == ["0", "1"]
    stage.accept(stage.changes())
    assert (tree / "0").read_bytes() == b"changed"
    assert (tree / "1").read_bytes().startswith(b"changed in place")
    workspace.close()
    assert [path.name for path in sharing.iterdir()] == ["tree"]


async def test_a_pass_says_how_it_was_staged(packages: Path, tree: Path, write: Write, tmp_path: Path) -> None:
    write(transform="path.write_text('changed')")
    with (tmp_path / "0").open("wb") as source, (tmp_path / "1").open("wb") as target:
        try:
            fcntl.ioctl(target, staging._FICLONE, source.fileno())
        except OSError:
            how = "copy"
        else:
            how = "reflink"
    assert (await one(packages, tree, work_dir=tmp_path))["isolation"]["staging"] == how
