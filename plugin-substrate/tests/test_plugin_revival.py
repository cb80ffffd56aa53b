"""What becomes of an instance whose worker died."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import PluginManager, Revival, WorkerDiedError
from plugin_substrate.revival import Backoff


@pytest.fixture
async def eager(tmp_path: Path, probe_meta: Any) -> AsyncIterator[PluginManager]:
    """A manager that revives at once, with the probe loaded."""
    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, revive=Revival.AT_ONCE) as manager:
        await manager.load_plugin_async(probe_meta())
        yield manager


async def successor(manager: PluginManager, of: int | None) -> int:
    """Wait for a live worker other than ``of``."""
    async with asyncio.timeout(30):
        while (pid := manager.get_instance("probe").pid) in (None, of):  # noqa: ASYNC110 - nothing tells of a birth
            await asyncio.sleep(0.002)
    assert pid is not None
    return pid


async def test_a_worker_that_dies_idle_has_a_successor_before_anybody_calls(eager: PluginManager) -> None:
    for _ in range(3):
        pid = eager.get_instance("probe").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await successor(eager, pid)
    assert (await eager.execute_plugin_async("probe", action="probe.count"))[0] == 1


async def test_a_worker_that_dies_under_a_call_has_a_successor_which_is_not_sent_the_call(eager: PluginManager) -> None:
    pid = eager.get_instance("probe").pid
    with pytest.raises(WorkerDiedError):
        await eager.execute_plugin_async("probe", action="probe.leave", status=3)
    await successor(eager, pid)
    assert (await eager.execute_plugin_async("probe", action="probe.count"))[0] == 1


async def test_a_call_does_not_wait_for_the_pause_before_a_revival(eager: PluginManager) -> None:
    for _ in range(9):
        with pytest.raises(WorkerDiedError):
            await eager.execute_plugin_async("probe", action="probe.leave", status=3)
    async with asyncio.timeout(20):  # the pause is 25.6 s by now
        assert await eager.execute_plugin_async("probe", action="probe.echo") == {}


async def test_a_supervisor_that_died_unheard_is_replaced_by_the_next_call(probe: PluginManager) -> None:
    """Both are dead before the event loop could be told."""
    instance = probe.get_instance("probe")
    descriptors = [os.pidfd_open(pid or 0) for pid in (instance.supervisor_pid, instance.pid)]
    signal.pidfd_send_signal(descriptors[0], signal.SIGKILL)
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


async def test_unloading_ends_a_revival_that_waits(eager: PluginManager) -> None:
    for _ in range(9):
        with pytest.raises(WorkerDiedError):
            await eager.execute_plugin_async("probe", action="probe.leave", status=3)
    async with asyncio.timeout(20):
        assert await eager.unload_plugin_async("probe")
    assert eager.list_instances() == []


async def test_by_default_a_dead_worker_stays_dead_until_it_is_called(probe: PluginManager) -> None:
    with pytest.raises(WorkerDiedError):
        await probe.execute_plugin_async("probe", action="probe.leave", status=3)
    assert not probe.get_instance("probe").alive
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


def test_pauses_double_to_a_bound_and_begin_anew_when_a_worker_has_settled() -> None:
    now = [0.0]
    backoff = Backoff(lambda: now[0])
    pauses = []
    for _ in range(11):
        backoff.born()
        pauses.append(backoff.pause())
    assert pauses == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30])
    backoff.born()
    now[0] += 60
    assert backoff.pause() == 0
