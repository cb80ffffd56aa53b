"""What goes to a loaded plugin besides calls: questions, hooks, a new configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from plugin_substrate import (
    PluginDisabledError,
    PluginFatalError,
    PluginInputError,
    PluginManager,
    PluginMeta,
    PluginTransientError,
    ProtocolError,
)
from plugin_substrate.instance import LoadedInstance

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
def meta(probe_meta: MetaFactory) -> MetaFactory:
    return lambda class_name="Adjustable", **code: probe_meta(class_name, "adjustable", "adjustable", **code)


@pytest.fixture
async def monitor(manager: PluginManager, meta: MetaFactory) -> LoadedInstance:
    await manager.load_plugin_async(meta("Monitor"), {"model": "small"})
    return manager._instances.get("adjustable")


@pytest.fixture
def diary(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: (tmp_path / "data" / "data" / "adjustable" / "no-tenant" / "diary").read_text().splitlines()


@asynccontextmanager
async def running_call(manager: PluginManager) -> AsyncIterator[asyncio.Task[object]]:
    """A call that runs until the block is left."""
    started = asyncio.Event()
    call = manager.execute_plugin_async("adjustable", action="adjust.polite", on_progress=lambda *_: started.set())
    task = asyncio.get_running_loop().create_task(call)
    await asyncio.wait_for(started.wait(), 30)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it is a file that is watched
            await asyncio.sleep(0.002)


async def test_a_question_is_answered_while_every_slot_is_taken(
    manager: PluginManager, monitor: LoadedInstance
) -> None:
    async with running_call(manager):
        options = await monitor.ask("config_options")
        assert options["device"]["options"] == [{"value": "cpu", "label": "Processor", "metadata": {"cores": 2}}]
        assert await monitor.ask("get_system_status") == {"memory_available_mb": 1000.0}
        assert (await monitor.ask("list_processes"))[0]["pid"] == monitor.view().pid


async def test_what_a_plugin_has_not_is_the_askers_error_and_an_unknown_verb_a_fault(
    manager: PluginManager, meta: MetaFactory
) -> None:
    await manager.load_plugin_async(meta())
    instance = manager._instances.get("adjustable")
    with pytest.raises(PluginInputError, match="not a system monitor"):
        await instance.ask("get_system_status")
    with pytest.raises((ProtocolError, Exception), match="unknown verb 'explode'"):
        await instance.ask("explode")
    assert (await instance.ask("current_config")) == {
        "model": "small",
        "device": "cpu",
        "index": "flat",
        "threshold": 0.5,
    }


async def test_progress_and_prints_of_a_question_belong_to_it(monitor: LoadedInstance) -> None:
    heard: list[tuple[float, str]] = []
    await monitor.ask("prefetch", on_progress=lambda *report: heard.append(report))
    assert heard == [(0.0, "fetching"), (1 / 3, "fetching"), (2 / 3, "fetching")]


async def test_on_disable_fires_when_the_last_of_several_calls_has_ended(
    manager: PluginManager, meta: MetaFactory, diary: Callable[[], list[str]]
) -> None:
    await manager.load_plugin_async(meta(), max_concurrent_requests=2)
    switch = manager._instances.get("adjustable").switch
    async with running_call(manager):
        async with running_call(manager):
            assert await switch.set(enabled=False)
            with pytest.raises(PluginDisabledError, match="is disabled") as caught:
                await manager.execute_plugin_async("adjustable", action="adjust.config")
            assert caught.value.plugin_name == "adjustable"
        await until(lambda: switch.calls == 1)
        assert "on_disable" not in diary()
    await until(lambda: "on_disable" in diary())
    assert not await switch.set(enabled=False)
    assert await switch.set(enabled=True)
    assert diary().count("on_disable") == diary().count("on_enable") == 1


async def test_enabling_again_before_the_calls_have_ended_fires_nothing(
    manager: PluginManager, meta: MetaFactory, diary: Callable[[], list[str]]
) -> None:
    await manager.load_plugin_async(meta())
    switch = manager._instances.get("adjustable").switch
    async with running_call(manager):
        await switch.set(enabled=False)
        await switch.set(enabled=True)
    await until(lambda: switch.calls == 0)
    assert (await manager.execute_plugin_async("adjustable", action="adjust.environment", name="X")) is None
    assert diary() == ["initialize None"]


async def test_a_new_configuration_waits_for_running_calls_and_calls_wait_for_it(
    manager: PluginManager, meta: MetaFactory
) -> None:
    await manager.load_plugin_async(meta("Applying"), {"model": "small"})
    instance = manager._instances.get("adjustable")
    async with running_call(manager):
        change = asyncio.create_task(instance.reconfigure({"model": "large"}))
        await asyncio.sleep(0)
        later = asyncio.create_task(manager.execute_plugin_async("adjustable", action="adjust.config"))
        await instance.ask("current_config")  # a whole round: neither has moved
        assert not change.done()
    await change
    config, pid = await later
    assert (config, pid) == ({"model": "large"}, instance.view().pid)


async def test_a_plugin_that_cannot_take_a_configuration_over_gets_a_new_worker_with_the_old_one(
    manager: PluginManager, meta: MetaFactory
) -> None:
    await manager.load_plugin_async(meta("Applying"), {"model": "small"})
    instance = manager._instances.get("adjustable")
    before = instance.view().pid
    with pytest.raises(PluginInputError, match="not this one"):
        await instance.reconfigure({"model": "refused"})
    config, pid = await manager.execute_plugin_async("adjustable", action="adjust.config")
    assert config == instance.view().config == {"model": "small"}
    assert pid != before


async def test_each_release_runs_once_even_when_one_raises(
    manager: PluginManager, meta: MetaFactory, diary: Callable[[], list[str]]
) -> None:
    await manager.load_plugin_async(meta(), {"model": "small", "device": "cpu", "index": "flat"})
    await manager._instances.get("adjustable").reconfigure({"model": "large", "device": "gpu", "index": "tree"})
    assert diary() == ["initialize small", "release model", "release index", "initialize large"]


async def test_a_plugin_needs_a_name_a_version_and_execute_and_nothing_else(
    manager: PluginManager, probe_meta: MetaFactory, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "object", "properties": {"rows": {"type": "integer", "default": 3}}}
    await manager.load_plugin_async(probe_meta("Smallest", "smallest", "smallest", config_schema=schema))
    assert await manager.execute_plugin_async("smallest", 1, b"x") == [1, b"x"]
    instance = manager._instances.get("smallest")
    assert await instance.ask("current_config") == {"rows": 3}
    await manager.reconfigure_async("smallest", {"rows": 4})
    assert await instance.ask("current_config") == {"rows": 4}
    found = manager.get_plugin_meta("smallest")
    assert found is not None
    assert not found.config_schema_drift, "a schema that stands in the metadata alone is no other one"


async def test_a_dataclass_that_is_named_makes_the_schema_and_keeps_drift_known(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    schema = {"type": "object", "properties": {"rows": {"type": "integer", "default": 10}}}
    await manager.load_plugin_async(probe_meta("Configured", "smallest", "smallest", config_schema=schema))
    assert await manager.execute_plugin_async("smallest") == {"rows": 10}
    found = manager.get_plugin_meta("smallest")
    assert found is not None
    assert found.config_schema_drift
    assert set((found.live_config_schema or {})["properties"]) == {"rows", "unit"}


async def test_a_plugin_that_keeps_its_configuration_its_own_way_is_told_to_say_it_too(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("Forgetful", "smallest", "smallest"))
    with pytest.raises(PluginFatalError, match=r"Forgetful overrides initialize\(\).* super\(\)\.initialize"):
        await manager._instances.get("smallest").ask("current_config")


async def test_a_plugin_that_answers_nothing_is_not_asked_for_ever(
    manager: PluginManager, meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not answered is kept, here and there, until it is."""
    monkeypatch.setattr("plugin_substrate.proxy.MAX_QUESTIONS", 3)
    monkeypatch.setattr("plugin_substrate.managing.configuring._QUESTION_SECONDS", 0.2)
    await manager.load_plugin_async(meta("NeverAnswers"))  # which asks for the schema
    for _ in range(2):
        assert await manager.get_config_options_async("adjustable") == {}
    with pytest.raises(PluginTransientError, match="stats was not asked: 3 questions before it"):
        await manager._instances.get("adjustable").ask("stats")
    await manager.reload_plugin_async("adjustable")
    assert await manager._instances.get("adjustable").ask("stats")


async def test_a_restart_that_fails_leaves_the_instance_as_it_was_for_the_next_call(
    manager: PluginManager, meta: MetaFactory
) -> None:
    await manager.load_plugin_async(meta(), {"model": "small"})
    instance = manager._instances.get("adjustable")
    with pytest.raises(Exception, match="no such model"):
        await instance.restart({"model": "unloadable"})
    assert not instance.view().alive
    assert (await manager.execute_plugin_async("adjustable", action="adjust.config"))[0] == {"model": "small"}
