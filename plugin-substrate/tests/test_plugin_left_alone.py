"""Who stops waiting, or changes something while others work, leaves nothing half-done behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    PluginDisabledError,
    PluginError,
    PluginInputError,
    PluginLoadError,
    PluginManager,
    PluginMeta,
    WorkerDiedError,
)
from plugin_substrate import call_message as message_module
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker.messages import Message
from plugin_substrate.worker.parked import PARK_BYTES, is_parking_called_for

MetaFactory = Callable[..., PluginMeta]


async def test_who_stops_waiting_for_everything_to_be_unloaded_does_not_stop_it(
    probe: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloading, may_end = asyncio.Event(), asyncio.Event()
    unload = RemotePluginProxy.unload

    async def slow_unload(self: RemotePluginProxy, grace_seconds: float) -> None:
        unloading.set()
        await may_end.wait()
        await unload(self, grace_seconds)

    monkeypatch.setattr(RemotePluginProxy, "unload", slow_unload)
    supervisor = probe.get_instance("probe").supervisor_pid
    assert supervisor is not None
    waiting = asyncio.create_task(probe.unload_all_async())
    await unloading.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_end.set()
    await probe.unload_all_async()
    with pytest.raises(ProcessLookupError):
        os.kill(supervisor, 0)


async def test_a_second_call_of_one_id_is_refused_when_both_wait_for_their_permission(
    probe: PluginManager,
) -> None:
    asked, may_start = asyncio.Event(), asyncio.Event()

    async def before_start() -> bool:
        asked.set()
        await may_start.wait()
        return True

    async def call() -> Any:
        return await probe.execute_call(
            "twice", action="probe.echo", call=CallContext("the same"), before_start=before_start
        )

    await probe.load_plugin_async(probe.get_plugin_meta("probe"), instance_id="twice", max_concurrent_requests=2)
    first = asyncio.create_task(call())
    await asked.wait()
    asked.clear()
    second = asyncio.create_task(call())
    asks = asyncio.create_task(asked.wait())
    await asyncio.wait({second, asks}, return_when=asyncio.FIRST_COMPLETED)
    asks.cancel()
    may_start.set()
    async with asyncio.timeout(60):
        assert (await first).value == {}
        with pytest.raises(PluginInputError, match="'the same' is already running"):
            await second


@pytest.fixture
def filling(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Set when a large argument is about to be written down; it goes on when the second is set."""
    began, may_end = threading.Event(), threading.Event()
    encode = message_module.encode_message

    def slow_encode(header: dict[str, Any], segments: Sequence[bytes] = ()) -> Message:
        if is_parking_called_for(segments):
            began.set()
            assert may_end.wait(60)
        return encode(header, segments)

    monkeypatch.setattr(message_module, "encode_message", slow_encode)
    return began, may_end


async def test_the_loop_goes_on_while_a_large_argument_is_written_down(
    probe: PluginManager, filling: tuple[threading.Event, threading.Event]
) -> None:
    began, may_end = filling
    await probe.load_plugin_async(probe.get_plugin_meta("probe"), instance_id="two", max_concurrent_requests=2)
    large = asyncio.create_task(probe.execute_plugin_async("two", action="probe.echo", x=b"x" * PARK_BYTES))
    assert await asyncio.to_thread(began.wait, 60)
    assert await probe.execute_plugin_async("two", action="probe.echo", x=1) == {"x": 1}
    may_end.set()
    async with asyncio.timeout(60):
        assert await large == {"x": b"x" * PARK_BYTES}


async def test_a_call_whose_worker_dies_while_its_argument_is_written_down_was_not_sent(
    probe: PluginManager, filling: tuple[threading.Event, threading.Event]
) -> None:
    began, may_end = filling
    large = asyncio.create_task(probe.execute_plugin_async("probe", action="probe.echo", x=b"x" * PARK_BYTES))
    assert await asyncio.to_thread(began.wait, 60)
    pid = probe.get_instance("probe").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while probe.get_instance("probe").alive:  # noqa: ASYNC110 - nobody tells of a death
            await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(WorkerDiedError, match="was not sent") as caught:
            await large
    assert caught.value.outcome_known
    assert await probe.execute_plugin_async("probe", action="probe.echo", x=1) == {"x": 1}


async def test_a_call_whose_worker_dies_as_soon_as_it_is_ready_was_not_sent(
    probe: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = RemotePluginProxy.load

    async def load_and_die(self: RemotePluginProxy, *arguments: Any, **options: Any) -> None:
        await load(self, *arguments, **options)
        os.kill(self.pid, signal.SIGKILL)
        while self.alive:  # noqa: ASYNC110 - nobody tells of a death
            await asyncio.sleep(0)

    pid = probe.get_instance("probe").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(RemotePluginProxy, "load", load_and_die)
    async with asyncio.timeout(60):
        while probe.get_instance("probe").alive:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        with pytest.raises(WorkerDiedError, match="was not sent") as caught:
            await probe.execute_plugin_async("probe", action="probe.echo", x=1)
    assert caught.value.outcome_known


async def test_a_disabled_plugin_refuses_a_call_before_its_arguments_are_looked_at(probe: PluginManager) -> None:
    await probe.disable_plugin_async("probe")
    with pytest.raises(PluginDisabledError):
        await probe.execute_plugin_async("probe", action="probe.echo", x=object())


def test_large_arguments_are_packed_once(
    tmp_path: Path, probe_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, packed = message_module.pack_value, []

    def counted(value: Any, path: str) -> list[bytes]:
        segments = pack(value, path)
        packed.append(sum(map(len, segments)) > PARK_BYTES)
        return segments

    monkeypatch.setattr(message_module, "pack_value", counted)
    manager = PluginManager(data_dir=tmp_path)
    assert manager.load_plugin(probe_meta())
    try:
        large = {"x": bytes(PARK_BYTES)}
        assert manager.execute_plugin("probe", action="probe.echo", **large) == large
        assert asyncio.run(_echo_large(tmp_path / "another", probe_meta(), large)) == large
    finally:
        manager.unload_all()
    assert packed.count(True) == 2


async def _echo_large(folder: Path, meta: PluginMeta, large: dict[str, bytes]) -> Any:
    async with PluginManager(data_dir=folder) as manager:
        await manager.load_plugin_async(meta)
        return await manager.execute_plugin_async("probe", action="probe.echo", **large)


def test_synchronous_callers_go_on_while_another_ones_large_argument_is_written_down(
    tmp_path: Path, probe_meta: MetaFactory, filling: tuple[threading.Event, threading.Event]
) -> None:
    began, may_end = filling
    manager = PluginManager(data_dir=tmp_path)
    assert manager.load_plugin(probe_meta("Probe"), instance_id="two", max_concurrent_requests=2)
    echoed: list[Any] = []
    large = threading.Thread(
        target=lambda: echoed.append(manager.execute_plugin("two", action="probe.echo", x=b"x" * PARK_BYTES))
    )
    try:
        large.start()
        assert began.wait(60)
        assert manager.execute_plugin("two", action="probe.echo", x=1) == {"x": 1}
        may_end.set()
        large.join()
        assert echoed == [{"x": b"x" * PARK_BYTES}]
    finally:
        may_end.set()
        manager.unload_all()


async def test_a_worker_that_comes_up_while_others_are_reconfigured_has_the_new_configuration(
    manager: PluginManager, probe_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await manager.load_plugin_async(
        probe_meta("Applying", "adjustable", "adjustable"), {"model": "small"}, strict=False
    )
    changing, may_end = asyncio.Event(), asyncio.Event()
    ask = RemotePluginProxy.ask

    async def slow_ask(self: RemotePluginProxy, verb: str, *arguments: Any, **options: Any) -> Any:
        if verb == "reconfigure":
            changing.set()
            await may_end.wait()
        return await ask(self, verb, *arguments, **options)

    monkeypatch.setattr(RemotePluginProxy, "ask", slow_ask)
    changed = asyncio.create_task(manager.reconfigure_async("adjustable", {"model": "large"}, strict=False))
    await changing.wait()
    await manager.prefetch_async("adjustable", tenant_id="another")
    may_end.set()
    await changed
    for tenant in ("", "another"):
        config, _ = await manager.execute_plugin_async(
            "adjustable", action="adjust.config", call=CallContext(f"c-{tenant}", tenant_id=tenant)
        )
        assert config == {"model": "large"}


async def test_reloads_that_fail_side_by_side_leave_the_configuration_as_it_was(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    meta = probe_meta("Adjustable", "adjustable", "adjustable")
    await manager.load_plugin_async(meta, {"model": "small"}, strict=False)
    reloads = [
        manager.reload_plugin_async("adjustable", {"model": "unloadable", "number": number}, strict=False)
        for number in range(3)
    ]
    failed = await asyncio.gather(*reloads, return_exceptions=True)
    assert [type(failure) for failure in failed] == [PluginLoadError] * 3
    assert manager.get_plugin_config("adjustable") == {"model": "small"}


async def test_unloading_while_a_load_that_failed_is_cleared_away_fails_nowhere(
    manager: PluginManager, probe_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing, may_end = asyncio.Event(), asyncio.Event()
    kill, failures = RemotePluginProxy.kill, []

    async def slow_kill(self: RemotePluginProxy) -> None:
        killing.set()
        await may_end.wait()
        await kill(self)

    monkeypatch.setattr(RemotePluginProxy, "kill", slow_kill)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    loading = asyncio.create_task(manager.load_plugin_async(probe_meta("RaisesOnInitialize", name="failing")))
    await killing.wait()
    unloading = asyncio.create_task(manager.unload_plugin_async("failing"))
    for _ in range(10):
        await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(PluginError, match="failing"):
        await loading
    assert await unloading
    gc.collect()
    await asyncio.sleep(0)
    assert failures == []


def next_of_interrupted(stream: Iterator[Any]) -> Any:
    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    return next(stream)


def test_who_is_interrupted_in_a_synchronous_stream_hears_of_that_alone_and_the_call_ends(
    tmp_path: Path, probe_meta: MetaFactory
) -> None:
    manager = PluginManager(data_dir=tmp_path, grace_seconds=0.3)
    assert manager.load_plugin(probe_meta("Streamer", "streamer", "streamer"))
    try:
        stream = manager.execute_plugin_stream_sync("streamer", kind="pauses")
        assert next(stream) == "first"
        with pytest.raises(KeyboardInterrupt):
            next_of_interrupted(stream)
        assert manager.execute_plugin("streamer", kind="free again") == ("free again", {})
    finally:
        manager.unload_all()
