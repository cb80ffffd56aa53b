from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_substrate import PluginManager, PluginMeta, WorkerDiedError

SOAK = float(os.environ.get("SOAK", "0.05"))
LANES = 4
CYCLES_OF_EACH = max(30, int(10_000 * SOAK) // LANES // 10 * 10)


@dataclass(frozen=True)
class Held:
    """What this process holds and what lies in its plugins' folder."""

    processes: frozenset[int]
    descriptors: int
    threads: int
    files: frozenset[str]
    memory: int


def held(folder: Path) -> Held:
    gc.collect()
    children: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            children.update(map(int, (task / "children").read_text(encoding="ascii").split()))
    return Held(
        processes=frozenset(children),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        threads=threading.active_count(),
        # "cleanups" is what the plugin writes at its end, if a busy machine lets it in its grace
        files=frozenset(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "cleanups"),
        memory=tracemalloc.get_traced_memory()[0],
    )


def kill(pid: int | None, *takes_along: int | None) -> None:
    """Kill a process and wait until it, and what dies with it, is dead: before the event loop has heard of it."""
    descriptors = [os.pidfd_open(each or 0) for each in (pid, *takes_along)]
    signal.pidfd_send_signal(descriptors[0], signal.SIGKILL)
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


async def life(manager: PluginManager, meta: PluginMeta, number: int) -> None:
    """Load or revive, call, and end: by a kill, idle or under a call, or by what else can end a worker."""
    name = meta.name
    await manager.load_plugin_async(meta)
    assert await manager.execute_plugin_async(name, action="probe.echo", x=number) == {"x": number}
    match number % 10:
        case 0:
            assert await manager.unload_plugin_async(name)
        case 4:
            await manager.reload_plugin_async(name)
            kill(manager.get_instance(name).pid)
        case 8:
            instance = manager.get_instance(name)
            kill(instance.supervisor_pid, instance.pid)
        case 2 | 6:
            kill(manager.get_instance(name).pid)
        case _:
            with pytest.raises(WorkerDiedError):
                await manager.execute_plugin_async(name, action="probe.leave", status=1)


@pytest.mark.timeout(3600)
async def test_loads_calls_and_kills_leave_nothing_in_the_host(
    manager: PluginManager, probe_meta: Callable[..., PluginMeta], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Several plugins side by side, each loaded, called and ended again and again, and in the end unloaded."""

    async def lives(of_each: int) -> None:
        async def lane(meta: PluginMeta) -> None:
            for number in range(1, of_each + 1):
                await life(manager, meta, number)

        async with asyncio.TaskGroup() as group:
            for number in range(LANES):
                group.create_task(lane(probe_meta(name=f"probe-{number}")))

    threads = ThreadPoolExecutor(LANES)  # all of them at once, so that none comes later
    asyncio.get_running_loop().set_default_executor(threads)
    together = threading.Barrier(LANES)
    await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(LANES)))
    tracemalloc.start()  # resident memory goes up and down by more than any leak
    request.addfinalizer(tracemalloc.stop)
    await lives(max(10, CYCLES_OF_EACH // 10 // 10 * 10))
    before = held(tmp_path)
    started = time.monotonic()
    await lives(CYCLES_OF_EACH)
    after = held(tmp_path)
    seconds, more = time.monotonic() - started, after.memory - before.memory
    print(f"{CYCLES_OF_EACH * LANES} cycles in {seconds:.0f} s, {more} bytes more")  # noqa: T201 - what a long run tells
    assert (after.processes, after.threads, after.files) == (before.processes, before.threads, before.files)
    assert after.descriptors == before.descriptors
    assert more < (1 << 20) + CYCLES_OF_EACH * LANES * 100
