"""What plugins take, measured on real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import CallContext, IsolationProfile, PluginManager, PluginNotLoadedError, ProtocolError
from plugin_substrate.headers import Spent, spent_of
from plugin_substrate.process_tree import CpuClock, memory_available_mb, tree_usage
from plugin_substrate.telemetry import attribute_gpus


@pytest.fixture
async def eater(tmp_path: Path, probe_meta: Any) -> AsyncIterator[PluginManager]:
    """A manager that grants processes, with the eater loaded as ``eater``."""
    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, isolation=IsolationProfile(processes=8)) as manager:
        await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
        yield manager


async def test_resident_memory_is_that_of_the_process_now_and_the_peak_stays(eater: PluginManager) -> None:
    before = await eater.get_plugin_stats_async("eater")
    assert 0 < before.memory_rss_mb < 64
    await eater.execute_plugin_async("eater", action="eater.taste", mb=64)
    after = await eater.get_plugin_stats_async("eater")
    assert after.memory_rss_mb < before.memory_rss_mb + 32
    assert after.workers[0].memory_peak_mb is not None
    assert after.workers[0].memory_peak_mb > 64
    await eater.execute_plugin_async("eater", action="eater.keep", mb=64)
    kept = await eater.get_plugin_stats_async("eater")
    assert kept.memory_rss_mb > before.memory_rss_mb + 60
    assert kept.workers[0].memory_uss_mb is not None
    assert kept.workers[0].memory_uss_mb > 60


async def test_the_processes_a_plugin_starts_count(eater: PluginManager) -> None:
    await eater.execute_plugin_async("eater", action="eater.child", mb=48)
    stats = await eater.get_plugin_stats_async("eater")
    worker, child = stats.subtree_pids
    assert worker == eater.get_instance("eater").pid
    assert child in tree_usage(worker).pids, "the numbers are those of the host"
    assert stats.memory_rss_mb > 48


async def test_each_tenants_worker_is_measured_apart(eater: PluginManager) -> None:
    await eater.execute_plugin_async("eater", action="eater.keep", mb=48, call=CallContext("c", "tenant-a"))
    stats = {worker.tenant_id: worker for worker in (await eater.get_plugin_stats_async("eater")).workers}
    assert stats["tenant-a"].memory_rss_mb > stats[""].memory_rss_mb + 40


async def test_a_worker_that_does_nothing_but_work_is_measured_from_outside(
    manager: PluginManager, probe_meta: Any
) -> None:
    await manager.load_plugin_async(probe_meta())
    started = asyncio.Event()
    task = asyncio.create_task(
        manager.execute_call(
            "probe", action="probe.busy", call=CallContext("busy"), on_progress=lambda *_: started.set()
        )
    )
    await started.wait()
    async with asyncio.timeout(30):
        stats = await manager.get_plugin_stats_async("probe")
    assert stats.workers[0].memory_rss_mb > 0
    assert stats.workers[0].memory_peak_mb is None
    assert (await manager.get_plugin_stats_async("probe")).cpu_percent > 10
    await manager.cancel_call("probe", "busy")
    await asyncio.wait({task})
    assert task.exception()


def test_a_synchronous_host_has_the_same_figures(tmp_path: Path, probe_meta: Any) -> None:
    manager = PluginManager(data_dir=tmp_path)
    try:
        assert manager.load_plugin(probe_meta("Eater", "eater", "eater"))
        pid = manager.execute_plugin("eater", action="eater.keep", mb=1)
        assert manager.get_plugin_stats("eater").subtree_pids == (pid,)
        assert manager.get_resource_snapshot("eater").worker_pid == pid
        assert [record.sample_count for record in manager.get_empirical_records("eater")] == [1]
    finally:
        manager.unload_all()


async def test_there_are_no_figures_of_what_is_not_loaded_and_none_of_a_worker_that_is_gone(
    eater: PluginManager,
) -> None:
    with pytest.raises(PluginNotLoadedError):
        await eater.get_plugin_stats_async("nobody")
    await eater._instances.get("eater").kill_worker()
    assert (await eater.get_plugin_stats_async("eater")).workers == ()


def test_a_process_that_is_gone_has_no_tree() -> None:
    assert tree_usage(2**22 + 1) == ((), 0, 0.0)


def test_the_machine_tells_what_it_has_left() -> None:
    available = memory_available_mb()
    assert available is not None
    assert available > 0


def test_a_percentage_needs_two_looks_at_the_same_process() -> None:
    clock = CpuClock()
    assert clock.percent(1, 10.0) == 0.0
    assert clock.percent(1, 11.0) > 0.0
    assert clock.percent(2, 50.0) == 0.0


@pytest.mark.parametrize("spent", [[], "much", {"cpu_seconds": -1}, {"peak_bytes": float("inf")}, {"peak_bytes": "1"}])
def test_what_a_worker_says_it_spent_is_checked(spent: object) -> None:
    with pytest.raises(ProtocolError):
        spent_of({"spent": spent})


def test_a_worker_need_not_say_what_it_spent() -> None:
    assert spent_of({}) == Spent(None, None)


def test_gpu_memory_is_that_of_the_subtree_and_the_index_that_of_the_largest_holder() -> None:
    processes = [
        {"pid": 1, "gpu_index": 0, "gpu_memory_mb": 100.0},
        {"pid": 2, "gpu_index": 1, "gpu_memory_mb": 300},
        {"pid": 9, "gpu_index": 0, "gpu_memory_mb": 9000},
    ]
    status = {"gpus": [{"index": 1, "type": "Test", "total_mb": 1000, "load_percent": 50}]}
    assert attribute_gpus([1, 2], processes, status) == {
        "gpu_index": 1,
        "gpu_memory_mb": 400.0,
        "gpu_type": "Test",
        "gpu_total_mb": 1000,
        "gpu_load_percent": 50,
    }
    assert attribute_gpus([3], processes, status) == {"gpu_memory_mb": 0.0}


@pytest.mark.parametrize(
    "nonsense", [None, "x", [None], [{"pid": "1"}], [{"pid": 1, "gpu_index": 0, "gpu_memory_mb": float("nan")}]]
)
def test_what_a_monitor_says_in_another_shape_is_not_used(nonsense: object) -> None:
    assert attribute_gpus([1], nonsense, nonsense) == {"gpu_memory_mb": 0.0}
