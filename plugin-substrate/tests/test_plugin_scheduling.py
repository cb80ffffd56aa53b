"""Calls wait for, are refused or are granted what their plugin needs; idle workers go, and running ones never."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    ManifestError,
    PermissiveScheduler,
    PluginManager,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    QueueScheduler,
    ResourceScheduler,
    ResourceShortfall,
    SafetyScheduler,
    SystemFigures,
)
from plugin_substrate.eviction import Candidate, eviction_order
from plugin_substrate.manifest import manifest_to_dict, parse_manifest
from plugin_substrate.scheduling import GPU_MEMORY, SYSTEM_MEMORY

GPU = {"requires_gpu": True, "min_gpu_vram_mb": 1000}
PLENTY = 10.0**9


class Machine:
    """A host whose monitor plugin says what the test wants it to say."""

    def __init__(self, manager: PluginManager, figures: Path, meta: Callable[..., Any]) -> None:
        self.manager = manager
        self.figures = figures
        self.meta = meta

    def has(self, processes: list[dict[str, Any]] | None = None, **status: Any) -> None:
        self.figures.parent.mkdir(parents=True, exist_ok=True)
        new = self.figures.with_suffix(".new")
        new.write_text(json.dumps({"status": status, "processes": processes}))
        new.replace(self.figures)

    async def load(self, name: str, **resources: Any) -> None:
        meta = self.meta("Eater", "eater", name, resources=resources or None)
        await self.manager.load_plugin_async(meta, max_concurrent_requests=2)

    async def call(self, name: str, tenant: str = "", mb: int = 1) -> Any:
        call = CallContext(f"{name}-{id(object())}", tenant)
        return await self.manager.execute_plugin_async(name, action="eater.keep", mb=mb, call=call)

    @asynccontextmanager
    async def running(self, name: str) -> AsyncIterator[asyncio.Task[Any]]:
        """A call that is in the plugin until the block is left."""
        inside, call = asyncio.Event(), CallContext(f"running-{name}")
        task = asyncio.create_task(
            self.manager.execute_call(name, action="eater.wait", call=call, on_progress=lambda *_: inside.set())
        )
        async with asyncio.timeout(30):
            await inside.wait()
        try:
            yield task
        finally:
            await self.manager.cancel_call(name, call.call_id)
            await asyncio.wait({task})
            assert task.exception()

    def pid(self, name: str) -> int | None:
        return self.manager.get_instance(name).pid


Make = Callable[[ResourceScheduler], Any]


@pytest.fixture
def machine(tmp_path: Path, probe_meta: Any) -> Make:
    @asynccontextmanager
    async def make(scheduler: ResourceScheduler) -> AsyncIterator[Machine]:
        async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, scheduler=scheduler) as manager:
            made = Machine(manager, tmp_path / "data/monitor/no-tenant/figures.json", probe_meta)
            made.has(processes=[], gpu_free_memory_mb=PLENTY, memory_available_mb=PLENTY)
            await manager.load_plugin_async(probe_meta("PretendedMonitor", "eater", "monitor"))
            manager.register_system_monitor("monitor")
            yield made

    return make


# -- what the schedulers say


def meta_of(probe_meta: Any, **resources: Any) -> Any:
    return probe_meta(resources=resources)


@pytest.mark.parametrize(
    ("needs", "figures", "shortfall"),
    [
        ({"min_system_ram_mb": 100}, {"memory_available_mb": 100}, None),
        ({"min_system_ram_mb": 100}, {"memory_available_mb": 99}, ResourceShortfall(SYSTEM_MEMORY, 100, 99)),
        (GPU, {"gpu_free_memory_mb": 1000}, None),
        (GPU, {"gpu_free_memory_mb": 400}, ResourceShortfall(GPU_MEMORY, 1000, 400)),
        ({"min_gpu_vram_mb": 1000}, {"gpu_free_memory_mb": 0}, None),
        ({}, {}, None),
    ],
)
@pytest.mark.parametrize("scheduler", [SafetyScheduler(), QueueScheduler()])
def test_what_the_manifest_asks_for_is_compared_with_what_is_free(
    probe_meta: Any, scheduler: ResourceScheduler, needs: Any, figures: Any, shortfall: Any
) -> None:
    answer = scheduler.allocate(meta_of(probe_meta, **needs), SystemFigures(**figures))
    assert (answer.granted, answer.shortfall) == (shortfall is None, shortfall)


def test_a_missing_figure_is_a_no_that_says_what_is_missing_and_why(probe_meta: Any) -> None:
    answer = SafetyScheduler().allocate(meta_of(probe_meta, **GPU), SystemFigures(missing="the driver is away"))
    assert not answer
    assert "1000 of gpu_memory_mb" in answer.reason
    assert "the driver is away" in answer.reason


def test_the_permissive_scheduler_always_says_yes(probe_meta: Any) -> None:
    assert PermissiveScheduler().allocate(meta_of(probe_meta, **GPU), SystemFigures())


def test_the_queue_scheduler_knows_which_plugins_are_active() -> None:
    scheduler = QueueScheduler(timeout=1, poll_interval=1)
    for name in ("a", "a", "b"):
        scheduler.on_execution_start(name)
    for name in ("a", "b"):
        scheduler.on_execution_finish(name)
    assert scheduler.get_active_plugins() == {"a"}


def test_the_amounts_survive_the_manifest(probe_meta: Any) -> None:
    meta = probe_meta(resources={**GPU, "min_system_ram_mb": 512.5, "platforms": ["linux-x64"]})
    again = parse_manifest(manifest_to_dict(meta.manifest)).resources
    assert (again.requires_gpu, again.min_gpu_vram_mb, again.min_system_ram_mb) == (True, 1000, 512.5)
    assert again.platforms == ("linux-x64",)


@pytest.mark.parametrize(
    "wrong",
    [{"min_gpu_vram_mb": -1}, {"min_system_ram_mb": "8 GB"}, {"requires_gpu": 1}, {"min_ram": 1}, {"platforms": [1]}],
)
def test_resources_that_cannot_be_read_are_refused_with_the_manifest(probe_meta: Any, wrong: Any) -> None:
    (name,) = wrong
    with pytest.raises(ManifestError, match=f"code.resources.{name}"):
        parse_manifest(manifest_to_dict(probe_meta(resources=wrong).manifest))


# -- refusing


async def test_a_call_that_cannot_have_what_it_needs_is_refused_with_the_shortfall_and_not_sent(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=400)
        with pytest.raises(PluginResourceError) as refused:
            await host.call("large")
        assert refused.value.resource_shortfall == ResourceShortfall(GPU_MEMORY, 1000, 400)
        assert refused.value.outcome_known
        host.has(processes=[], gpu_free_memory_mb=1000)
        assert await host.call("large")


async def test_a_call_that_is_refused_starts_no_worker_either(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=400)
        with pytest.raises(PluginResourceError):
            await host.call("large", tenant="another")
        assert [worker.tenant_id for worker in host.manager.get_instance("large").workers if worker.alive] == [""]


async def test_calls_of_plugins_without_amounts_ask_nobody(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("small")
        await host.manager.unload_plugin_async("monitor")
        assert await host.call("small")


async def test_without_a_monitor_gpu_memory_is_unknown_and_the_call_refused(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("large", **GPU)
        await host.manager.unload_plugin_async("monitor")
        with pytest.raises(PluginResourceError, match=r"nobody knows.*'monitor'") as refused:
            await host.call("large")
        assert refused.value.resource_shortfall is None


async def test_the_kernel_tells_of_memory_where_no_monitor_does(tmp_path: Path, probe_meta: Any) -> None:
    async with PluginManager(data_dir=tmp_path, scheduler=SafetyScheduler()) as manager:
        for name, needed in (("modest", 1.0), ("greedy", PLENTY)):
            await manager.load_plugin_async(probe_meta("Eater", "eater", name, resources={"min_system_ram_mb": needed}))
        assert await manager.execute_plugin_async("modest", action="eater.keep", mb=1)
        with pytest.raises(PluginResourceError) as refused:
            await manager.execute_plugin_async("greedy", action="eater.keep", mb=1)
        assert refused.value.resource_shortfall is not None
        assert 0 < refused.value.resource_shortfall.available < PLENTY


async def test_a_monitor_has_to_be_loaded(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        with pytest.raises(PluginNotLoadedError):
            host.manager.register_system_monitor("nobody")


async def test_what_a_running_call_was_granted_is_not_free_for_another(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("first", **GPU)
        await host.load("second", **GPU)
        host.has(processes=[], gpu_free_memory_mb=1500)
        async with host.running("first"):
            with pytest.raises(PluginResourceError) as refused:
                await host.call("second")
            assert refused.value.resource_shortfall == ResourceShortfall(GPU_MEMORY, 1000, 500)
            taken = [{"pid": host.pid("first"), "gpu_index": 0, "gpu_memory_mb": 1000}]
            host.has(processes=taken, gpu_free_memory_mb=1000)  # it has taken what it was granted
            assert await host.call("second")
        host.has(processes=[], gpu_free_memory_mb=1500)
        assert await host.call("second")


async def test_what_its_own_worker_holds_already_need_not_be_free_again(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("large", **GPU)
        held = [{"pid": host.pid("large"), "gpu_index": 0, "gpu_memory_mb": 900}]
        host.has(processes=held, gpu_free_memory_mb=100)
        async with host.running("large"):
            assert await host.call("large"), "and a second call in it shares the grant"


# -- evicting


async def test_the_idle_worker_used_least_recently_goes_first_and_no_more_than_needed(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        for name in ("old", "young", "needy"):
            await host.load(name, **({"min_system_ram_mb": 500} if name == "needy" else {}))
        for name in ("young", "old", "young"):
            await host.call(name)
        pids = {name: host.pid(name) for name in ("old", "young")}

        async def free_when_one_is_gone() -> None:
            host.has(memory_available_mb=100)
            while host.pid("old") is not None:  # noqa: ASYNC110 - the monitor is told as a driver would
                await asyncio.sleep(0.001)
            host.has(memory_available_mb=600)

        watcher = asyncio.create_task(free_when_one_is_gone())
        await asyncio.sleep(0)
        assert await host.call("needy")
        await watcher
        assert (host.pid("old"), host.pid("young")) == (None, pids["young"])
        assert await host.call("old") != pids["old"], "it comes back with its next call"


async def test_a_running_call_is_never_evicted_nor_is_the_monitor(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("busy")
        await host.load("idle")
        await host.load("needy", min_system_ram_mb=500)
        pids = {name: host.pid(name) for name in ("busy", "monitor")}
        async with host.running("busy"):
            host.has(memory_available_mb=100)
            with pytest.raises(PluginResourceError):
                await host.call("needy")
            assert {name: host.pid(name) for name in pids} == pids
            assert host.pid("idle") is None


async def test_of_gpu_memory_only_those_are_evicted_that_hold_some(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        for name in ("holds", "holds-none"):
            await host.load(name)
        await host.load("needy", **GPU)
        host.has(processes=[{"pid": host.pid("holds"), "gpu_index": 0, "gpu_memory_mb": 800}], gpu_free_memory_mb=300)
        with pytest.raises(PluginResourceError):
            await host.call("needy")
        assert (host.pid("holds"), host.pid("holds-none") is None) == (None, False)


async def test_an_evicted_plugin_cleans_up(machine: Make, probe_meta: Any, tmp_path: Path) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.manager.load_plugin_async(probe_meta())
        await host.load("needy", min_system_ram_mb=500)
        host.has(memory_available_mb=100)
        with pytest.raises(PluginResourceError):
            await host.call("needy")
        assert (tmp_path / "data/probe/no-tenant/cleanups").read_text() == "cleaned\n"


async def test_an_idle_worker_of_another_tenant_of_the_same_plugin_may_go(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("needy", min_system_ram_mb=500)
        await host.call("needy", tenant="idle")
        host.has(memory_available_mb=100)
        with pytest.raises(PluginResourceError):
            await host.call("needy", tenant="needy")
        assert all(worker.tenant_id != "idle" for worker in host.manager.get_instance("needy").workers)


def test_of_workers_used_at_the_same_time_the_one_that_holds_most_goes_first() -> None:
    class Used:
        def __init__(self, last_used: float) -> None:
            self.last_used = last_used

    def candidate(last_used: float, memory_mb: float, gpu_mb: float | None) -> Candidate:
        return Candidate(worker=Used(last_used), pool=None, memory_mb=memory_mb, gpu_mb=gpu_mb)  # type: ignore[arg-type]

    young, small, large, no_gpu = (
        candidate(2, 900, 900),
        candidate(1, 100, 500),
        candidate(1, 300, 200),
        candidate(0, 800, 0),
    )
    assert eviction_order([young, small, large, no_gpu], SYSTEM_MEMORY) == [no_gpu, large, small, young]
    assert eviction_order([young, small, large, no_gpu], GPU_MEMORY) == [small, large, young]


# -- waiting


async def test_a_queued_call_starts_as_soon_as_what_was_in_its_way_has_ended(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=60, poll_interval=60)) as host:
        await host.load("first", **GPU)
        await host.load("second", **GPU)
        host.has(processes=[], gpu_free_memory_mb=1500)
        async with host.running("first"):
            waiting = asyncio.create_task(host.call("second"))
            done, _ = await asyncio.wait({waiting}, timeout=0.2)
            assert not done
        async with asyncio.timeout(20):  # the interval is longer: an event has woken it
            assert await waiting


async def test_what_another_program_frees_is_noticed_at_the_next_look(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=60, poll_interval=0.05)) as host:
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=0)
        waiting = asyncio.create_task(host.call("large"))
        await asyncio.wait({waiting}, timeout=0.1)
        assert not waiting.done()
        host.has(processes=[], gpu_free_memory_mb=1000)
        async with asyncio.timeout(20):
            assert await waiting


async def test_calls_wait_first_come_first_served(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=60, poll_interval=60)) as host:
        for name in ("holder", "first", "second"):
            await host.load(name, **GPU)
        host.has(processes=[], gpu_free_memory_mb=1500)
        order: list[str] = []

        async def call(name: str) -> None:
            await host.call(name)
            order.append(name)

        async with host.running("holder"):
            tasks = []
            for name in ("first", "second"):
                tasks.append(asyncio.create_task(call(name)))
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
        assert order == ["first", "second"]


async def test_a_queued_call_is_refused_when_its_time_is_up(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=0.1, poll_interval=0.02)) as host:
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=400)
        with pytest.raises(PluginResourceError) as refused:
            await host.call("large")
        assert refused.value.resource_shortfall == ResourceShortfall(GPU_MEMORY, 1000, 400)


async def test_a_queued_call_waits_no_longer_than_its_deadline(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=60, poll_interval=60)) as host:
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=0)
        call = CallContext("late", deadline=time.time() + 0.1)
        async with asyncio.timeout(20):
            with pytest.raises(PluginTimeoutError, match="not sent"):
                await host.manager.execute_plugin_async("large", action="eater.keep", mb=1, call=call)
        host.has(processes=[], gpu_free_memory_mb=1000)
        assert await host.call("large")


async def test_who_gives_up_waiting_lets_the_next_one_have_its_turn(machine: Make) -> None:
    async with machine(QueueScheduler(timeout=60, poll_interval=60)) as host:
        await host.load("huge", requires_gpu=True, min_gpu_vram_mb=5000)
        await host.load("large", **GPU)
        host.has(processes=[], gpu_free_memory_mb=1500)
        huge = asyncio.create_task(host.call("huge"))
        await asyncio.sleep(0.05)
        large = asyncio.create_task(host.call("large"))
        await asyncio.sleep(0)
        huge.cancel()
        async with asyncio.timeout(20):
            assert await large


# -- figures with a monitor


async def test_a_snapshot_has_the_gpu_of_its_processes(machine: Make) -> None:
    async with machine(PermissiveScheduler()) as host:
        await host.load("user")
        gpus = [{"index": 1, "type": "Test", "total_mb": 8000, "load_percent": 30}]
        host.has(processes=[{"pid": host.pid("user"), "gpu_index": 1, "gpu_memory_mb": 640}], gpus=gpus)
        snapshot = await host.manager.get_resource_snapshot_async("user")
        assert (snapshot.gpu_index, snapshot.gpu_memory_mb, snapshot.gpu_type) == (1, 640.0, "Test")
        assert (snapshot.gpu_total_mb, snapshot.worker_pid) == (8000, host.pid("user"))
        assert snapshot.memory_rss_mb > 0
        host.has(processes=[])
        assert (await host.manager.get_resource_snapshot_async("user")).gpu_memory_mb == 0.0


async def test_without_a_monitor_there_are_no_gpu_figures(probe: PluginManager) -> None:
    assert (await probe.get_resource_snapshot_async("probe")).gpu_memory_mb is None


async def test_the_gpu_memory_seen_while_a_call_ran_is_recorded(machine: Make) -> None:
    async with machine(SafetyScheduler()) as host:
        await host.load("user", requires_gpu=True)
        held = {"pid": host.pid("user"), "gpu_index": 0, "gpu_memory_mb": 640}
        host.has(processes=[held], gpu_free_memory_mb=PLENTY)
        async with host.running("user"):
            async with asyncio.timeout(20):
                while not any(watched.peak_mb for watched in host.manager._instances._books._gpus._watched.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            host.has(processes=[], gpu_free_memory_mb=PLENTY)
        (record,) = await host.manager.get_empirical_records_async("user")
        assert record.gpu_memory_mb_peak_max == 640.0
