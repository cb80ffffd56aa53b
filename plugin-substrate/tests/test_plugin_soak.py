from __future__ import annotations

import gc
import os
import select
import signal
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_substrate import PluginManager, PluginMeta, WorkerDiedError

SOAK = float(os.environ.get("SOAK", "0.05"))
CYCLES = max(100, int(10_000 * SOAK))


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
    tasks = Path("/proc/self/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text(encoding="ascii").split()]
    return Held(
        processes=frozenset(int(pid) for pid in children),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        threads=threading.active_count(),
        files=frozenset(str(path.relative_to(folder)) for path in folder.rglob("*")),
        memory=tracemalloc.get_traced_memory()[0],
    )


def kill(pid: int) -> None:
    """Kill a process and wait until it is dead, before the event loop has heard of it."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)


@pytest.mark.timeout(3600)
async def test_loads_calls_and_kills_leave_nothing_in_the_host(
    manager: PluginManager, probe_meta: Callable[..., PluginMeta], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every tenth cycle ends with an unload, the others with the worker killed, alternately idle and under a call."""

    async def cycle(number: int) -> None:
        await manager.load_plugin_async(probe_meta())
        assert await manager.execute_plugin_async("probe", action="probe.echo", x=number) == {"x": number}
        if number % 10 == 0:
            assert await manager.unload_plugin_async("probe")
        elif number % 2:
            with pytest.raises(WorkerDiedError):
                await manager.execute_plugin_async("probe", action="probe.leave", status=1)
        else:
            kill(manager.get_instance("probe").pid or 0)

    tracemalloc.start()  # resident memory goes up and down by more than any leak
    request.addfinalizer(tracemalloc.stop)
    for number in range(1, CYCLES // 10 // 10 * 10 + 1):
        await cycle(number)
    before = held(tmp_path)
    for number in range(1, CYCLES // 10 * 10 + 1):
        await cycle(number)
    after = held(tmp_path)
    assert (after.processes, after.threads, after.files) == (before.processes, before.threads, before.files)
    assert after.descriptors == before.descriptors
    assert after.memory - before.memory < (1 << 20) + CYCLES * 100
