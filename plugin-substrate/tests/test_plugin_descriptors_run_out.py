"""A host that has no descriptor left starts nothing, and has lost nothing: no file, no process and no thread."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import IsolationProfile, PluginFatalError, PluginManager, PluginMeta, lifecycle, log_pipe
from plugin_substrate.lifecycle import Supervisor, WorkerProcess

MetaFactory = Callable[..., PluginMeta]

#: More than a start has open at once.
MOST_NEEDED = 16


def children_of(process: int | str = "self") -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError):
            found |= {int(pid) for pid in (task / "children").read_text(encoding="ascii").split()}
    return found


def descriptors() -> set[int]:
    gc.collect()  # what an earlier test left may close some at any moment
    held = set()
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - of numbers
        with suppress(OSError):  # the one of the listing
            os.fstat(descriptor)
            held.add(descriptor)
    return held


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Leave this process so many descriptors to open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 2 + MOST_NEEDED, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def supervisor(probe_python: Path) -> AsyncIterator[Supervisor]:
    started = Supervisor(str(probe_python))
    yield started
    await started.close()


def spawn(supervisor: Supervisor, folder: Path, **env: str) -> asyncio.Task[WorkerProcess]:
    return asyncio.create_task(supervisor.spawn(env=env, cwd=folder, isolation=IsolationProfile()))


async def let_go(process: WorkerProcess) -> None:
    process.connection.close()
    os.close(process.log_descriptor)
    await process.exit
    process.close()


async def test_a_supervisor_that_finds_too_few_descriptors_leaves_none_open(probe_python: Path) -> None:
    before = descriptors(), children_of()
    for free in range(MOST_NEEDED):
        with free_descriptors(free):
            try:
                started = Supervisor(str(probe_python))
            except OSError:
                pass
            else:
                break
        assert (descriptors(), children_of()) == before, f"with {free} free"
    else:
        pytest.fail("it was never started")
    await started.close()
    assert (descriptors(), children_of()) == before


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("where", "what"), [(lifecycle, "put_mark"), (lifecycle.os, "pidfd_open"), (log_pipe.os, "set_blocking")]
)
async def test_a_supervisor_that_cannot_be_watched_is_ended_at_once(
    probe_python: Path, monkeypatch: pytest.MonkeyPatch, where: Any, what: str
) -> None:
    before = descriptors(), children_of()
    monkeypatch.setattr(where, what, refuse)
    with pytest.raises(OSError, match="Too many open files"):
        Supervisor(str(probe_python))
    monkeypatch.undo()
    assert (descriptors(), children_of()) == before


async def test_a_name_that_no_program_can_have_leaves_nothing_open() -> None:
    before = descriptors(), children_of()
    with pytest.raises(ValueError, match="null byte"):
        Supervisor("/bin/py\0thon")
    assert (descriptors(), children_of()) == before


async def test_a_worker_for_which_there_are_too_few_descriptors_leaves_none_open(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    await let_go(await spawn(supervisor, tmp_path))  # now it has imported what it needs
    before = descriptors()
    for free in range(4):  # the ends of its socket and of its log pipe
        with free_descriptors(free):
            (refused,) = await asyncio.gather(spawn(supervisor, tmp_path), return_exceptions=True)
        assert isinstance(refused, OSError)
        assert descriptors() == before, f"with {free} free"


async def test_a_worker_that_the_host_can_take_no_hold_of_is_refused_at_once_and_ends(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    before = descriptors()
    with free_descriptors(4):  # for the ends of its socket and of its log pipe
        spawned = spawn(supervisor, tmp_path)
        async with asyncio.timeout(30):
            with pytest.raises(PluginFatalError, match="RLIMIT_NOFILE"):
                await spawned
    assert descriptors() == before
    async with asyncio.timeout(30):
        while children_of(supervisor.pid):  # noqa: ASYNC110 - nobody tells of them
            await asyncio.sleep(0.01)
    await let_go(await spawn(supervisor, tmp_path))


async def test_an_order_that_is_never_sent_is_not_remembered(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(PluginFatalError, match="environment is too large"):
        await spawn(supervisor, tmp_path, LONG="x" * 70_000)
    assert supervisor._spawning == supervisor._exits == {}
    await let_go(await spawn(supervisor, tmp_path))


def test_a_stream_that_was_left_over_starts_nothing_when_it_is_let_go(tmp_path: Path, probe_meta: MetaFactory) -> None:
    manager = PluginManager(data_dir=tmp_path / "data", grace_seconds=0.1)
    assert manager.load_plugin(probe_meta("Streamer", "streamer", "streamer"))
    stream = manager.execute_plugin_stream_sync("streamer", kind="numbers", count=10**9)
    assert next(stream) == 0
    manager.unload_all()
    threads = threading.enumerate()
    stream.close()
    assert threading.enumerate() == threads
