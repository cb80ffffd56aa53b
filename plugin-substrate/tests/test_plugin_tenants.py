"""Tenants of one host share a plugin and nothing else."""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import (
    CallContext,
    ManifestError,
    PluginManager,
    PluginNotLoadedError,
    PluginTimeoutError,
    WorkerDiedError,
)
from plugin_substrate.manifest import DriftSection, compute_config_schema_hash, manifest_to_dict, parse_manifest
from plugin_substrate.worker_folder import NO_TENANT_FOLDER, SHARED_FOLDER, new_run_folder, tenant_folder

PLACES = 3
A, B, C, D = "tenant-a", "tenant-b", "tenant-c", "tenant-d"


@pytest.fixture
async def keeper(tmp_path: Path, probe_meta: Any) -> AsyncIterator[PluginManager]:
    """A manager with few places for tenants and the keeper loaded as ``keeper``, and a stateless one as ``shared``."""
    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, max_tenant_workers=PLACES) as manager:
        await manager.load_plugin_async(probe_meta("Keeper", "keeper", "keeper"))
        await manager.load_plugin_async(probe_meta("Keeper", "keeper", "shared", stateless=True))
        yield manager


def of(tenant: str, **fields: Any) -> CallContext:
    return CallContext(uuid.uuid4().hex, tenant, **fields)


async def ask(manager: PluginManager, action: str, tenant: str, instance: str = "keeper", **arguments: Any) -> Any:
    return await manager.execute_plugin_async(instance, action=f"keeper.{action}", call=of(tenant), **arguments)


async def running(manager: PluginManager, tenant: str, instance: str = "keeper") -> tuple[asyncio.Task[Any], str]:
    """Start a call that runs until it is cancelled, and return when the plugin is in it."""
    inside, context = asyncio.Event(), of(tenant)
    task = asyncio.create_task(
        manager.execute_call(instance, action="keeper.wait", call=context, on_progress=lambda *_: inside.set())
    )
    async with asyncio.timeout(30):
        await inside.wait()
    return task, context.call_id


# -- nothing in common


async def test_nothing_that_one_tenants_call_left_in_a_worker_is_found_by_anothers(keeper: PluginManager) -> None:
    await ask(keeper, "keep", A, secret="s3cret")
    assert str(await ask(keeper, "find", A)).count("s3cret") > 7, "the plugin keeps what it is told"
    for other in (B, ""):
        assert "s3cret" not in str(await ask(keeper, "find", other))


async def test_calls_without_a_tenant_are_of_a_tenant_of_their_own(keeper: PluginManager) -> None:
    await ask(keeper, "keep", "", secret="s3cret")
    assert "s3cret" in str(await ask(keeper, "find", ""))
    assert "s3cret" not in str(await ask(keeper, "find", A))


async def test_each_tenant_has_folders_of_its_own_that_stay(keeper: PluginManager, tmp_path: Path) -> None:
    tenant = str(uuid.uuid4())
    folder = tmp_path / "data/keeper" / tenant
    assert await ask(keeper, "places", tenant) == {
        "cwd": str(folder),
        "tmp": str(folder / "tmp"),
        "data": str(folder),
    }
    await ask(keeper, "keep", tenant, secret="mine")
    await keeper.unload_plugin_async("keeper")
    assert (folder / "kept-too").read_text() == "mine"
    assert folder.stat().st_mode & 0o077 == 0


async def test_the_log_of_one_tenants_worker_does_not_hold_anothers(keeper: PluginManager) -> None:
    await ask(keeper, "keep", A, secret="s3cret")
    with pytest.raises(WorkerDiedError) as death:
        await ask(keeper, "die", B)
    assert "last words" in death.value.log_tail
    assert "s3cret" not in str(death.value.log_tail)


async def test_a_death_in_a_shared_worker_tells_only_what_belongs_to_the_call(keeper: PluginManager) -> None:
    await ask(keeper, "say", A, "shared", text="s3cret")
    with pytest.raises(WorkerDiedError) as death:
        await ask(keeper, "die", B, "shared")
    assert death.value.log_tail == ("last words",)


async def test_one_tenants_death_is_not_anothers(keeper: PluginManager) -> None:
    task, call_id = await running(keeper, A)
    with pytest.raises(WorkerDiedError):
        await ask(keeper, "die", B)
    await keeper.cancel_call("keeper", call_id)
    assert (await task).value


async def test_a_stateless_plugin_serves_all_tenants_in_one_worker_and_has_no_folder_to_keep_things_in(
    keeper: PluginManager, tmp_path: Path
) -> None:
    assert await ask(keeper, "pid", A, "shared") == await ask(keeper, "pid", B, "shared")
    places = await ask(keeper, "places", A, "shared")
    assert places == {
        "cwd": str(tmp_path / "data/shared" / SHARED_FOLDER),
        "tmp": str(tmp_path / "data/shared" / SHARED_FOLDER / "tmp"),
        "data": "",
    }


async def test_an_operator_need_not_believe_that_a_plugin_is_stateless(manager: PluginManager, probe_meta: Any) -> None:
    meta = probe_meta("Keeper", "keeper", "keeper", stateless=True)
    await manager.load_plugin_async(replace(meta, manifest=replace(meta.manifest, overrides={"stateless": False})))
    assert await ask(manager, "pid", A) != await ask(manager, "pid", B)


@pytest.mark.parametrize("said", ["no", 0, None])
def test_an_override_that_is_no_yes_or_no_is_refused(probe_meta: Any, said: object) -> None:
    manifest = {**manifest_to_dict(probe_meta(stateless=True).manifest), "overrides": {"stateless": said}}
    with pytest.raises(ManifestError, match=r"overrides\.stateless"):
        parse_manifest(manifest)


@given(st.lists(st.text(), unique=True, max_size=20))
def test_distinct_tenants_have_distinct_folders_whatever_they_are_called(tenants: list[str]) -> None:
    names = [tenant_folder(tenant) for tenant in tenants]
    assert len(set(names)) == len(tenants)
    assert all(name.isascii() and name.replace("-", "").isalnum() and name != SHARED_FOLDER for name in names)


@pytest.mark.parametrize("tenant", ["../../etc", "/", ".", "a/b", "a\0b", NO_TENANT_FOLDER, SHARED_FOLDER, "\ud800"])
def test_what_is_no_uuid_never_becomes_a_path(tenant: str) -> None:
    assert tenant_folder(tenant).startswith("t-")


async def test_a_link_in_place_of_a_tenants_folder_is_refused(keeper: PluginManager, tmp_path: Path) -> None:
    (tmp_path / "data/keeper" / tenant_folder(A)).symlink_to(tmp_path / "data/keeper" / tenant_folder(B))
    with pytest.raises(Exception, match="is a link"):
        await ask(keeper, "pid", A)


async def test_knowing_the_path_of_anothers_folder_or_log_is_of_no_use(keeper: PluginManager, tmp_path: Path) -> None:
    """Landlock, a layer of the kernel, sees to it; without it the instance's layers say so."""
    await ask(keeper, "keep", A, secret="s3cret")
    for other, instance in ((B, "keeper"), ("", "keeper"), (B, "shared")):
        seen = await ask(keeper, "look_into", other, instance, folder=str(tmp_path / "data/keeper" / tenant_folder(A)))
        confined = any(layer.startswith("landlock") for layer in keeper.get_instance(instance).layers)
        assert confined, f"this kernel has no Landlock: {seen}"
        assert {attempt for attempt, outcome in seen.items() if outcome == "done"} <= {"link"}
    logs = await ask(keeper, "look_into", B, folder=str(tmp_path / "logs"))
    assert logs["list"] in ("PermissionError", "FileNotFoundError")


async def test_loading_for_a_tenant_starts_that_tenants_worker_alone(manager: PluginManager, probe_meta: Any) -> None:
    meta = probe_meta("Keeper", "keeper", "keeper")
    checked = DriftSection(config_schema_hash=compute_config_schema_hash({}))  # so that it is asked for its schema
    await manager.load_plugin_async(replace(meta, manifest=replace(meta.manifest, drift_tracking=checked)), tenant_id=A)
    (worker,) = manager.get_instance("keeper").workers
    assert (worker.tenant_id, worker.alive) == (A, True)
    assert await ask(manager, "pid", A) == worker.pid


# -- confidential runs


async def test_a_confidential_call_has_a_worker_of_its_own_that_serves_nobody_after_its_run(
    keeper: PluginManager,
) -> None:
    ordinary = await ask(keeper, "pid", A)
    secret = of(A, run_id="run", confidential=True)
    pid = await keeper.execute_plugin_async("keeper", action="keeper.keep", secret="s3cret", call=secret)
    assert pid != ordinary
    assert await ask(keeper, "pid", A) == ordinary
    again = of(A, run_id="run", confidential=True)
    found = await keeper.execute_plugin_async("keeper", action="keeper.find", call=again)
    assert "s3cret" not in str(found["memory"])
    assert all(worker.pid != pid for worker in keeper.get_instance("keeper").workers)


async def test_a_confidential_call_of_a_stateless_plugin_is_not_in_the_shared_worker(keeper: PluginManager) -> None:
    shared = await ask(keeper, "pid", A, "shared")
    secret = of(A, run_id="run", confidential=True)
    assert await keeper.execute_plugin_async("shared", action="keeper.pid", call=secret) != shared


def below(folder: Path, pattern: str) -> list[Path]:
    return list(folder.rglob(pattern))


async def test_the_files_of_a_confidential_run_go_with_its_worker(keeper: PluginManager, tmp_path: Path) -> None:
    await ask(keeper, "keep", A, secret="everyday")
    secret = of(A, run_id="run", confidential=True)
    await keeper.execute_plugin_async("keeper", action="keeper.keep", secret="s3cret", call=secret)
    found = await keeper.execute_plugin_async(
        "keeper", action="keeper.find", call=of(A, run_id="next", confidential=True)
    )
    assert not found["files"], "neither the tenant's nor another run's"
    await keeper.unload_plugin_async("keeper")
    held = [path for path in below(tmp_path, "*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert {path.suffix for path in held} <= {".log"}
    assert below(tmp_path, "run-*") == []


async def test_what_a_confidential_run_buried_goes_too(keeper: PluginManager, tmp_path: Path) -> None:
    secret = of(A, run_id="run", confidential=True)
    await keeper.execute_plugin_async("keeper", action="keeper.bury", secret="s3cret", depth=1500, call=secret)
    await keeper.unload_plugin_async("keeper")
    assert below(tmp_path, "run-*") == []


async def test_what_a_killed_host_left_of_a_confidential_run_goes_with_the_next(
    keeper: PluginManager, tmp_path: Path
) -> None:
    await ask(keeper, "pid", A)
    data_dir = below(tmp_path, tenant_folder(A))[0].parent
    mine = new_run_folder()
    kind, namespace, pid, start, chance = mine.split("-")
    dead = data_dir / "-".join([kind, namespace, pid, f"{int(start) - 1}", chance])
    elsewhere = data_dir / "-".join([kind, "1", pid, "1", chance])
    for folder in (dead, elsewhere, data_dir / mine):
        (folder / "tmp").mkdir(parents=True)
    await keeper.execute_plugin_async("keeper", action="keeper.pid", call=of(A, run_id="run", confidential=True))
    assert not dead.exists()
    assert elsewhere.exists(), "nobody here can tell whether its host lives"
    assert (data_dir / mine).exists()


# -- places


async def test_there_are_never_more_workers_than_places_and_the_least_recently_used_idle_one_goes(
    keeper: PluginManager,
) -> None:
    pids = {tenant: await ask(keeper, "pid", tenant) for tenant in (A, B, C)}
    assert await ask(keeper, "pid", A) == pids[A]
    await ask(keeper, "pid", D)
    workers = keeper.get_instance("keeper").workers
    assert {worker.tenant_id for worker in workers} == {A, C, D}
    assert await ask(keeper, "pid", A) == pids[A]


async def test_a_busy_worker_is_not_taken_away(keeper: PluginManager) -> None:
    calls = [await running(keeper, tenant) for tenant in (A, B)]
    pids = {worker.tenant_id: worker.pid for worker in keeper.get_instance("keeper").workers}
    for tenant in (C, D, C, D):
        await ask(keeper, "pid", tenant)
    for (task, call_id), tenant in zip(calls, (A, B), strict=True):
        await keeper.cancel_call("keeper", call_id)
        assert (await task).value == pids[tenant]


async def test_a_tenant_that_never_stops_calling_does_not_keep_another_out(keeper: PluginManager) -> None:
    served = asyncio.Event()

    async def calls_on(tenant: str) -> None:
        while not served.is_set():
            await asyncio.gather(*(ask(keeper, "pid", tenant) for _ in range(3)))

    busy = [asyncio.create_task(calls_on(tenant)) for tenant in (A, B, C)]
    async with asyncio.timeout(30):
        for _ in range(3):
            assert await ask(keeper, "pid", D)
        served.set()
        await asyncio.gather(*busy)
    assert len(keeper.get_instance("keeper").workers) <= PLACES


async def test_who_gives_up_waiting_for_a_place_leaves_it_to_others(keeper: PluginManager) -> None:
    calls = [await running(keeper, tenant) for tenant in (A, B, C)]
    impatient = asyncio.create_task(ask(keeper, "pid", D))
    patient = asyncio.create_task(ask(keeper, "pid", "tenant-e"))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait({impatient})
    for _, call_id in calls:
        await keeper.cancel_call("keeper", call_id)
    await asyncio.gather(*(task for task, _ in calls))
    async with asyncio.timeout(30):
        assert await patient


async def test_who_waits_for_a_place_or_a_slot_past_the_deadline_is_told_and_nothing_was_sent(
    keeper: PluginManager,
) -> None:
    calls = [await running(keeper, tenant) for tenant in (A, B, C)]
    for tenant in (D, A):
        call = of(tenant, deadline=time.time() + 0.1)
        async with asyncio.timeout(30):
            with pytest.raises(PluginTimeoutError, match="not sent") as late:
                await keeper.execute_plugin_async("keeper", action="keeper.meet", call=call)
        assert late.value.outcome_known
    for _, call_id in calls:
        await keeper.cancel_call("keeper", call_id)
    await asyncio.gather(*(task for task, _ in calls))
    assert await ask(keeper, "meet", D) == [D]


async def test_unloading_turns_away_who_waits_for_a_place(keeper: PluginManager) -> None:
    calls = [await running(keeper, tenant) for tenant in (A, B, C)]
    waiting = asyncio.create_task(ask(keeper, "pid", D))
    await asyncio.sleep(0)
    await keeper.unload_plugin_async("keeper")
    with pytest.raises(PluginNotLoadedError, match="'keeper' is being unloaded"):
        await waiting
    ended = await asyncio.gather(*(task for task, _ in calls), return_exceptions=True)
    assert [type(error) for error in ended] == [WorkerDiedError] * PLACES


async def test_slots_are_per_tenant(keeper: PluginManager) -> None:
    task, call_id = await running(keeper, A)
    assert await ask(keeper, "pid", B), "another tenant's call does not hold it up"
    await keeper.cancel_call("keeper", call_id)
    await task


async def test_whatever_tenants_do_at_once_each_call_meets_its_own_worker_and_places_are_kept(
    tmp_path: Path, probe_meta: Any
) -> None:
    """Calls, cancels, deaths and confidential runs of eight tenants in three places, at random."""
    rounds = max(60, int(2000 * float(os.environ.get("SOAK", "0.05"))))
    chance = random.Random(7)
    tenants = [f"tenant-{number}" for number in range(8)]
    most = 0

    async def one_call(manager: PluginManager) -> None:
        nonlocal most
        tenant = chance.choice(tenants)
        confidential = chance.random() < 0.1
        what = chance.choices(["meet", "die", "give up"], [10, 1, 2])[0]
        call = of(tenant, run_id=f"run-{chance.randrange(4)}", confidential=confidential)
        action = "keeper.die" if what == "die" else "keeper.meet"
        task = asyncio.create_task(manager.execute_plugin_async("keeper", action=action, call=call))
        if what == "give up":
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
        (met,) = await asyncio.gather(task, return_exceptions=True)
        most = max(most, len(manager.get_instance("keeper").workers))
        if isinstance(met, list):
            assert set(met) == {tenant}
        else:
            assert isinstance(met, WorkerDiedError | asyncio.CancelledError), met

    async def caller(manager: PluginManager, count: int) -> None:
        for _ in range(count):
            await one_call(manager)

    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, max_tenant_workers=PLACES) as manager:
        await manager.load_plugin_async(probe_meta("Keeper", "keeper", "keeper"), max_concurrent_requests=2)
        async with asyncio.timeout(300):
            await asyncio.gather(*(caller(manager, rounds // 12) for _ in range(12)))
            for tenant in tenants:
                assert set(await ask(manager, "meet", tenant)) == {tenant}
        assert most == PLACES
        view = manager.get_instance("keeper")
        assert view.running_calls == 0
        pool = manager._instances.get("keeper").workers
        assert all(worker.holders == 0 for worker in pool)
