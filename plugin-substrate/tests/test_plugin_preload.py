"""With `preload` a plugin is imported once, in a template; its workers are copies of that, and share nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    ManifestError,
    PluginConfigError,
    PluginLoadError,
    PluginManager,
    PluginMeta,
    WorkerDiedError,
    control_group,
    write_manifest,
)
from plugin_substrate.manifest import manifest_to_dict, parse_manifest
from plugin_substrate.testing.leftovers import descendants

MetaFactory = Callable[..., PluginMeta]
A, B = "tenant-a", "tenant-b"
SECRET = "s3cret-value"
SILENCE_SECONDS = 5  # so long may a load that goes well say nothing on a busy machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates are forked under filters of Linux")


@pytest.fixture
def preloaded_meta(probe_meta: MetaFactory) -> MetaFactory:
    return lambda **options: probe_meta("Preloaded", "preloaded", "preloaded", **{"preload": True, **options})


@pytest.fixture
async def preloaded(manager: PluginManager, preloaded_meta: MetaFactory) -> PluginManager:
    await manager.load_plugin_async(preloaded_meta())
    return manager


@asynccontextmanager
async def impatient(tmp_path: Path, case: str) -> AsyncIterator[PluginManager]:
    """A manager with a folder of its own, which soon gives up a load that says nothing; it leaves no process."""
    async with PluginManager(data_dir=tmp_path / case, grace_seconds=0.3, load_timeout=SILENCE_SECONDS) as owner:
        yield owner


@pytest.fixture
def unwilling(tmp_path: Path, probe_meta: MetaFactory) -> Callable[..., PluginMeta]:
    """Make the description of a plugin whose import does a deed; ``data_dir`` is its manager's."""

    def make(deed: str, data_dir: str = "data") -> PluginMeta:
        folder = unwilling_folder(tmp_path, data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deed").write_text(deed)
        return probe_meta("Unwilling", "unwilling", "unwilling", preload=True)

    return make


def unwilling_folder(tmp_path: Path, data_dir: str) -> Path:
    return tmp_path / data_dir / "data/unwilling/no-tenant"


async def ask(manager: PluginManager, action: str, instance: str = "preloaded", **arguments: Any) -> Any:
    call = CallContext(uuid.uuid4().hex, tenant_id=arguments.pop("tenant", ""), **arguments.pop("context", {}))
    return await manager.execute_plugin_async(instance, action=f"preloaded.{action}", call=call, **arguments)


def ended(descriptor: int) -> bool:
    readable = select.poll()
    readable.register(descriptor, select.POLLIN)
    return bool(readable.poll(0))


async def all_ended(descriptors: list[int]) -> None:
    deadline = time.monotonic() + 20
    try:
        while not all(map(ended, descriptors)):
            assert time.monotonic() < deadline, "some are still there"
            await asyncio.sleep(0.005)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def nobody_below(pid: int) -> None:
    deadline = time.monotonic() + 20
    while found := descendants(pid):
        assert time.monotonic() < deadline, f"left behind: {found}"
        await asyncio.sleep(0.005)


# -- what is shared, and what is not


async def test_every_worker_of_a_tenant_is_a_copy_of_one_import(
    preloaded: PluginManager, preloaded_meta: MetaFactory
) -> None:
    await preloaded.load_plugin_async(preloaded_meta(), instance_id="two")
    one, two = await ask(preloaded, "where"), await ask(preloaded, "where", "two")
    assert one["imported_by"] == two["imported_by"]
    assert len({one["pid"], two["pid"], one["imported_by"]}) == 3
    supervisor = preloaded.get_instance("preloaded").supervisor_pid
    assert one["parent"] == two["parent"] == supervisor, "the supervisor reaps and kills them as its own"
    assert (one["session"], two["session"]) == (one["pid"], two["pid"])


async def test_a_copy_has_its_own_socket_log_folder_configuration_and_calls(
    preloaded: PluginManager, preloaded_meta: MetaFactory
) -> None:
    await preloaded.load_plugin_async(preloaded_meta(), {"of": "two"}, strict=False, instance_id="two")
    assert (await ask(preloaded, "have", keep="mine"))["kept"] == []
    other = await ask(preloaded, "have", "two")
    assert (other["kept"], other["config"]) == ([], {"of": "two"})
    assert other["descriptors"] == [(0, False), (1, False), (2, False), (3, True)], "nothing of the template's"
    await ask(preloaded, "say", text="said by the first")
    await ask(preloaded, "say", "two", text="said by the second")
    first = second = ""
    async with asyncio.timeout(30):
        while min(first.count("said by"), second.count("said by")) < 3:  # a line of the pipe may lag
            await asyncio.sleep(0.002)
            first, second = preloaded.get_plugin_logs("preloaded"), preloaded.get_plugin_logs("two")
    assert (first.count("said by the first"), first.count("said by the second")) == (3, 0)
    assert (second.count("said by the first"), second.count("said by the second")) == (0, 3)
    assert "imported" in first, "whose load had the template made has its lines"


async def test_a_template_finds_the_declared_variables_but_no_secret(
    manager: PluginManager, preloaded_meta: MetaFactory
) -> None:
    variables = ({"name": "TOKEN", "secret": True}, {"name": "FLAVOUR", "default": "plain"})
    meta = preloaded_meta(worker_env=variables)
    await manager.load_plugin_async(meta)
    await manager.set_plugin_secret_async("preloaded", "TOKEN", SECRET)
    found = await ask(manager, "have")
    assert (found["environment"]["TOKEN"], found["environment"]["FLAVOUR"]) == (SECRET, "plain")
    assert ("TOKEN" in found["at import"], found["at import"]["FLAVOUR"]) == (False, "plain")


async def test_each_tenant_has_a_template_of_its_own_which_goes_with_its_last_worker(
    tmp_path: Path, preloaded_meta: MetaFactory
) -> None:
    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3, max_tenant_workers=1) as manager:
        await manager.load_plugin_async(preloaded_meta(), tenant_id=A)
        of_a = await ask(manager, "where", tenant=A)
        template = os.pidfd_open(of_a["imported_by"])
        of_b = await ask(manager, "where", tenant=B)  # there is one place
        assert of_b["imported_by"] != of_a["imported_by"]
        await all_ended([template])
        found = await ask(manager, "have", tenant=B)
        assert found["folder"].endswith(Path(found["at import"]["HOME"]).name)


async def test_a_stateless_plugin_has_one_template_for_all_tenants(
    manager: PluginManager, preloaded_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(preloaded_meta(stateless=True))
    of_a, of_b = await ask(manager, "where", tenant=A), await ask(manager, "where", tenant=B)
    assert (of_a["pid"], of_a["imported_by"]) == (of_b["pid"], of_b["imported_by"])
    assert of_a["pid"] != of_a["imported_by"]


async def test_a_confidential_run_is_no_copy(preloaded: PluginManager) -> None:
    confidential = await ask(preloaded, "where", context={"run_id": "r", "confidential": True})
    assert confidential["imported_by"] == confidential["pid"]


async def test_a_copy_may_do_no_more_than_any_worker_and_an_honest_one_does_not_notice(
    preloaded: PluginManager,
) -> None:
    assert set((await ask(preloaded, "attempt")).values()) == {"PermissionError"}
    assert await ask(preloaded, "threads") == 50
    kept_by = "cgroup" if control_group.usable() else "descendants_swept"
    assert kept_by in preloaded.get_instance("preloaded").layers, "the record says what ends what it leaves"
    with pytest.raises(WorkerDiedError, match="SIGABRT"):
        await ask(preloaded, "abort")


# -- ends


async def test_a_dead_worker_is_replaced_by_another_copy(preloaded: PluginManager) -> None:
    before = await ask(preloaded, "where")
    worker = os.pidfd_open(before["pid"])
    signal.pidfd_send_signal(worker, signal.SIGKILL)
    await all_ended([worker])
    after = await ask(preloaded, "where")
    assert (after["imported_by"], after["pid"] != before["pid"]) == (before["imported_by"], True)


async def test_copies_outlive_their_template_and_the_next_load_makes_another(
    preloaded: PluginManager, preloaded_meta: MetaFactory
) -> None:
    before = await ask(preloaded, "where")
    template = os.pidfd_open(before["imported_by"])
    signal.pidfd_send_signal(template, signal.SIGKILL)
    await all_ended([template])
    assert await ask(preloaded, "where") == before
    await preloaded.load_plugin_async(preloaded_meta(), instance_id="two")
    assert (await ask(preloaded, "where", "two"))["imported_by"] != before["imported_by"]


async def test_unloading_the_last_instance_leaves_no_process(
    preloaded: PluginManager, preloaded_meta: MetaFactory
) -> None:
    await preloaded.load_plugin_async(preloaded_meta(), instance_id="two")
    template = os.pidfd_open((await ask(preloaded, "where"))["imported_by"])
    await preloaded.unload_plugin_async("preloaded")
    assert not ended(template), "another instance's workers are copies of it"
    await preloaded.unload_plugin_async("two")
    await all_ended([template])


@pytest.mark.parametrize("who", ["host", "supervisor"])
def test_template_and_copies_end_with_a_killed(who: str, tmp_path: Path, preloaded_meta: MetaFactory) -> None:
    manifest = tmp_path / "preloaded.json"
    write_manifest(manifest, preloaded_meta().manifest)
    script = Path(__file__).parent / "plugins" / "preload_host.py"
    with subprocess.Popen(
        [sys.executable, str(script), str(manifest), str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
    ) as host:
        try:
            assert host.stdout is not None
            pids = json.loads(host.stdout.readline())
            descriptors = [os.pidfd_open(pid) for pid in pids]
            if who == "host":
                host.kill()
            else:
                signal.pidfd_send_signal(descriptors[2], signal.SIGKILL)
            asyncio.run(all_ended(descriptors))
        finally:
            host.kill()


# -- loads that fail


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("fail", "libmissing.so"),
        ("leave", "status 3"),
        ("start_a_thread", "background"),
        ("fork", "Operation not permitted"),
    ],
)
async def test_an_import_that_fails_is_a_load_error_of_its_phase_and_leaves_no_process(
    manager: PluginManager, unwilling: Callable[..., PluginMeta], deed: str, message: str
) -> None:
    error = await load_error(manager, unwilling(deed), message)
    assert error.plugin_name == "unwilling"
    if deed == "leave":
        assert any("leaving" in line for line in error.log_tail)
    await nobody_below(os.getpid())


async def load_error(manager: PluginManager, meta: PluginMeta, message: str, **options: Any) -> PluginLoadError:
    with pytest.raises(PluginLoadError, match=message) as caught:
        await manager.load_plugin_async(meta, **options)
    assert caught.value.phase == "preload"
    return caught.value


async def test_who_says_nothing_while_a_copy_is_wanted_fails_that_load_alone_and_leaves_no_process(
    tmp_path: Path, unwilling: Callable[..., PluginMeta], preloaded_meta: MetaFactory
) -> None:
    """All at once, as each takes as long as the silence that a busy machine must not be mistaken for."""

    async def an_import_that_hangs() -> None:
        async with impatient(tmp_path, "hang") as manager:
            error = await load_error(manager, unwilling("hang", "hang"), "without progress")
            assert any("importing for ever" in line for line in error.log_tail)

    async def one_that_takes_the_forks_for_itself_and_gets_two_at_most() -> None:
        async with impatient(tmp_path, "fork_greedily") as manager:
            await load_error(manager, unwilling("fork_greedily", "fork_greedily"), "without progress")
        assert len((unwilling_folder(tmp_path, "fork_greedily") / "forked").read_text()) <= 2

    async def one_whose_copy_refuses_to_be_tied_to_the_supervisor() -> None:
        async with impatient(tmp_path, "refuse_the_tie") as manager:
            await load_error(manager, unwilling("refuse_the_tie", "refuse_the_tie"), "without progress")
        assert (unwilling_folder(tmp_path, "refuse_the_tie") / "untied").exists()

    async def a_template_that_was_stopped_and_is_replaced() -> None:
        async with impatient(tmp_path, "stopped") as manager:
            await manager.load_plugin_async(preloaded_meta())
            before = await ask(manager, "where")
            template = os.pidfd_open(before["imported_by"])
            signal.pidfd_send_signal(template, signal.SIGSTOP)
            await load_error(manager, preloaded_meta(), "without progress", instance_id="two")
            await all_ended([template])
            assert await ask(manager, "where") == before
            await manager.load_plugin_async(preloaded_meta(), instance_id="two")
            assert (await ask(manager, "where", "two"))["imported_by"] != before["imported_by"]

    async with asyncio.TaskGroup() as together:
        for case in (
            an_import_that_hangs,
            one_that_takes_the_forks_for_itself_and_gets_two_at_most,
            one_whose_copy_refuses_to_be_tied_to_the_supervisor,
            a_template_that_was_stopped_and_is_replaced,
        ):
            together.create_task(case())
    await nobody_below(os.getpid())


async def test_a_preload_is_limited_by_silence_not_by_time(
    tmp_path: Path, unwilling: Callable[..., PluginMeta]
) -> None:
    async with PluginManager(data_dir=tmp_path / "data", grace_seconds=0.3, load_timeout=1) as manager:
        meta = unwilling("take_long")
        deadline = time.monotonic() + 60
        while True:  # each step has four times as long as it takes, and a busy machine may still be late
            try:
                await manager.load_plugin_async(meta)
                break
            except PluginLoadError:
                assert time.monotonic() < deadline
        assert await manager.execute_plugin_async("unwilling") > 0


# -- who may have it


async def test_preload_and_processes_exclude_each_other(manager: PluginManager, preloaded_meta: MetaFactory) -> None:
    with pytest.raises(PluginConfigError, match="preload") as caught:
        await manager.load_plugin_async(preloaded_meta(granted={"processes": 1}))
    assert "preload" in caught.value.fields_invalid
    assert not descendants(os.getpid())


async def test_an_operator_can_switch_it_off(manager: PluginManager, preloaded_meta: MetaFactory) -> None:
    meta = preloaded_meta()
    off = replace(meta, manifest=replace(meta.manifest, overrides={"preload": False}))
    await manager.load_plugin_async(off)
    where = await ask(manager, "where")
    assert where["imported_by"] == where["pid"]


def test_a_manifest_keeps_preload_and_an_override_that_is_no_truth_value_is_refused(
    preloaded_meta: MetaFactory,
) -> None:
    data = manifest_to_dict(preloaded_meta().manifest)
    assert parse_manifest(data).preload
    data["overrides"] = {"preload": "no"}
    with pytest.raises(ManifestError, match=r"overrides\.preload"):
        parse_manifest(data)
