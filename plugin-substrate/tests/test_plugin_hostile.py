from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import select
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    PluginError,
    PluginFatalError,
    PluginInputError,
    PluginLoadError,
    PluginManager,
    PluginMeta,
    PluginNotLoadedError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.testing.leftovers import seen_from_here

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
def hostile_meta(probe_meta: MetaFactory) -> MetaFactory:
    """Make the description of a plugin of tests/plugins/hostile.py."""
    return lambda class_name="Hostile", **options: probe_meta(class_name, module="hostile", name="hostile", **options)


@pytest.fixture
async def hostile(manager: PluginManager, hostile_meta: MetaFactory) -> PluginManager:
    """The manager with the hostile plugin loaded."""
    await manager.load_plugin_async(hostile_meta())
    return manager


@pytest.fixture
async def forking(manager: PluginManager, hostile_meta: MetaFactory) -> PluginManager:
    """The manager with the hostile plugin loaded, which may have processes."""
    await manager.load_plugin_async(hostile_meta(granted={"processes": 64}))
    return manager


async def call(manager: PluginManager, action: str, **arguments: Any) -> Any:
    """Call an action under the id ``c``, and never wait for ever."""
    async with asyncio.timeout(20):
        return await manager.execute_plugin_async(
            "hostile", action=f"hostile.{action}", call=CallContext("c"), **arguments
        )


async def started(manager: PluginManager, action: str) -> tuple[asyncio.Task[Any], str]:
    """Start a call and return it with its first progress message."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(
        manager.execute_plugin_async(
            "hostile",
            action=f"hostile.{action}",
            call=CallContext("c"),
            on_progress=lambda _, message: heard.put_nowait(message),
        )
    )
    async with asyncio.timeout(20):
        return task, await heard.get()


def supervisor_of(manager: PluginManager) -> int:
    pid = manager.get_instance("hostile").supervisor_pid
    assert pid is not None
    return pid


def frame(header: str, *segments: bytes) -> bytes:
    lengths = json.dumps([len(segment) for segment in segments])
    raw = f'{{{header},"segments":{lengths}}}'.encode()
    body = b"".join(segments)
    return (len(raw) + len(body)).to_bytes(4, "big") + len(raw).to_bytes(4, "big") + raw + body


HUGE = "1" + "0" * 400
DEEP = "[" * 900 + "]" * 900
FORGED = {
    "progress of 400 digits": frame(f'"type":"progress","id":"c","progress":{HUGE}'),
    "usage of 400 digits": frame(f'"type":"usage","id":"c","usage":{{"x":{HUGE}}}'),
    "usage in 1000 units": frame(
        f'"type":"usage","id":"c","usage":{json.dumps(dict.fromkeys(map(str, range(1000)), 1))}'
    ),
    "usage with control characters": frame('"type":"usage","id":"c","usage":{"\\u001b[31m":1}'),
    "a deep type": frame(f'"type":{DEEP}'),
    "a deep id": frame(f'"type":"log","id":{DEEP},"line":""'),
    "no value": frame('"type":"result","id":"c"'),
    "infinity in disguise": frame('"type":"result","id":"c"', b"1e999"),
    "a decimal that is no number": frame('"type":"result","id":"c"', b'{"$":"decimal","text":"sNaN"}'),
    "one segment used twice": frame(
        '"type":"result","id":"c"', b'[{"$":"bytes","segment":0},{"$":"bytes","segment":0}]', b"x"
    ),
    "a segment nobody uses": frame('"type":"result","id":"c"', b"1", b"x"),
    "a large value that is malformed at its end": frame('"type":"result","id":"c"', b"[" + b"1," * 200_000),
    "a large value that is infinite at its end": frame('"type":"result","id":"c"', b"[" + b"1," * 200_000 + b"1e999]"),
    "a second hello": frame('"type":"hello","protocol":1,"layers":5'),
    "ready once more": frame('"type":"ready"'),
    "an answer to nobody": frame('"type":"result","id":"d"', b"1"),
    "an id that is no text": frame('"type":"result","id":["c"]', b"1"),
    "a length beyond the limit": b"\xff" * 8,
}


@pytest.mark.parametrize("raw", FORGED.values(), ids=FORGED)
async def test_a_forged_frame_ends_its_worker_and_nothing_else(
    hostile: PluginManager, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WorkerDiedError, match="broke the protocol") as caught:
        await call(hostile, "write", raw=raw)
    assert not caught.value.outcome_known
    assert len(str(caught.value)) < 500
    assert await call(hostile, "echo", x=1) == {"x": 1}
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_forged_error_arrives_as_a_typed_one(hostile: PluginManager) -> None:
    raw = frame(
        '"type":"error","id":"c","error":{"class":"PluginResourceError","message":"x","fields":'
        f'{{"resource_shortfall":{{"resource":"ram","needed":{HUGE},"available":[]}}}}}}'
    )
    with pytest.raises(PluginFatalError, match="x"):
        await call(hostile, "write", raw=raw)


@pytest.mark.parametrize("value", [b"1", b"[" + b"1," * 100_000 + b"1]"], ids=["small", "large"])
async def test_a_second_answer_costs_the_worker_not_the_call(hostile: PluginManager, value: bytes) -> None:
    raw = frame('"type":"result","id":"c"', value)
    assert await call(hostile, "write", raw=raw * 2) == json.loads(value)
    assert await call(hostile, "echo", x=1) == {"x": 1}


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("unprintable", PluginFatalError, "UnprintableError"),
        ("exits", PluginFatalError, "ExitsWhenPrintedError"),
        ("lying", PluginInputError, "LyingError"),
        ("interrupt", PluginFatalError, "KeyboardInterrupt"),
        ("base", PluginFatalError, "BaseException: base"),
    ],
)
async def test_an_exception_that_cannot_even_be_printed_is_still_a_typed_error(
    manager: PluginManager, hostile_meta: MetaFactory, how: str, kind: type[PluginError], text: str
) -> None:
    """Also in a second executor thread, and with the same worker afterwards."""
    await manager.load_plugin_async(hostile_meta(), max_concurrent_requests=2)
    pid = await call(manager, "pid")
    for _ in range(4):
        with pytest.raises(PluginError, match=text) as caught:
            await call(manager, "raise", how=how)
        assert type(caught.value) is kind
    assert await call(manager, "pid") == pid


async def test_the_text_of_an_error_can_be_shown_and_stored_anywhere(hostile: PluginManager) -> None:
    with pytest.raises(PluginInputError) as caught:
        await call(hostile, "raise", how="surrogate")
    assert str(caught.value) == "ValueError: bad \\ud800 text \\x00 \\x1b[31m\nsecond line"
    for text in (caught.value.remote_traceback, caught.value.original_exc_repr):
        assert not {"\0", "\x1b", "\ud800"} & set(text)


async def test_endless_recursion_is_an_error_of_its_call(hostile: PluginManager) -> None:
    with pytest.raises(PluginFatalError, match="RecursionError"):
        await call(hostile, "recursion")
    assert await call(hostile, "threads_exit") == "still here"


@pytest.mark.parametrize("what", ["subclass", "digits", "file"])
async def test_a_result_that_only_looks_like_a_value_is_refused(hostile: PluginManager, what: str) -> None:
    with pytest.raises((WireValueError, PluginInputError)):
        await call(hostile, "return", what=what)


@pytest.mark.parametrize("amount", ["nan", "inf", "negative", "huge", "true", "many"])
async def test_usage_that_is_no_amount_is_the_plugins_own_error(hostile: PluginManager, amount: str) -> None:
    with pytest.raises(PluginInputError, match="usage"):
        await call(hostile, "usage", amount=amount)


# -- floods


@pytest.mark.parametrize(
    ("descriptor", "raw"),
    [
        (1, b"\n" * 65536),
        (1, b"\x1b" * 65536),
        (3, frame('"type":"progress","id":"c","progress":0.5,"message":""') * 1000),
        (3, frame('"type":"log","id":"c","line":""') * 1000),
        (3, frame('"type":"log","id":"c","line":"' + "\\u001b" * 8000 + '"')),
        (3, frame('"type":"progress","id":"c","progress":0.5,"message":"","x":[' + "[]," * 20_000 + "[]]")),
    ],
    ids=["newlines", "control characters", "progress", "log lines", "long log lines", "large frames"],
)
async def test_a_flood_holds_up_neither_its_own_cancel_nor_a_neighbours_calls(
    hostile: PluginManager, hostile_meta: MetaFactory, descriptor: int, raw: bytes
) -> None:
    await hostile.load_plugin_async(hostile_meta(), instance_id="neighbour")
    flood = asyncio.create_task(call(hostile, "flood", descriptor=descriptor, raw=raw))
    async with asyncio.timeout(20):
        for _ in range(50):
            await hostile.execute_plugin_async("neighbour", action="hostile.echo")
    # Within the grace it ends by itself where the flood broke a frame, for which its worker is ended.
    assert await hostile.cancel_call("hostile", "c") in ("forced", "cooperative")
    with pytest.raises(PluginError):
        await flood


# -- processes and descriptors


async def test_a_plugin_that_closes_its_descriptors_ends_itself_and_nothing_else(hostile: PluginManager) -> None:
    assert await call(hostile, "close", descriptors=[0, 1, 2]) == "closed"
    with pytest.raises(WorkerDiedError):
        await call(hostile, "close", descriptors=[3])
    assert await call(hostile, "echo", x=1) == {"x": 1}


async def test_a_lost_data_folder_is_made_anew_for_the_next_worker(hostile: PluginManager, tmp_path: Path) -> None:
    with pytest.raises(PluginInputError, match="Permission denied"):
        await call(hostile, "lose_data_dir")
    shutil.rmtree(tmp_path / "data/data/hostile")
    with pytest.raises(WorkerDiedError):
        await call(hostile, "close", descriptors=[3])
    assert await call(hostile, "echo", x=1) == {"x": 1}


async def test_a_data_folder_that_cannot_be_used_is_a_load_error(hostile: PluginManager) -> None:
    await call(hostile, "replace_tmp")
    with pytest.raises(WorkerDiedError):
        await call(hostile, "close", descriptors=[3])
    with pytest.raises(PluginLoadError, match="tmp"):
        await call(hostile, "echo")


async def test_a_worker_that_stops_itself_is_killed_like_any_other(
    hostile: PluginManager, hostile_meta: MetaFactory, tmp_path: Path
) -> None:
    task, _ = await started(hostile, "stop_itself")
    assert await hostile.cancel_call("hostile", "c") == "forced"
    with pytest.raises(PluginError):
        await task
    async with PluginManager(data_dir=tmp_path / "short", load_timeout=0.5) as impatient:
        with pytest.raises(PluginLoadError, match="not ready"):
            await impatient.load_plugin_async(hostile_meta("StopsItself"))


async def test_a_stopped_supervisor_is_woken_when_it_is_needed(hostile: PluginManager) -> None:
    os.kill(supervisor_of(hostile), signal.SIGSTOP)
    with pytest.raises(WorkerDiedError):
        await call(hostile, "close", descriptors=[3])
    assert await call(hostile, "echo", x=1) == {"x": 1}
    os.kill(supervisor_of(hostile), signal.SIGSTOP)
    assert await hostile.unload_plugin_async("hostile")


async def test_a_call_ends_even_when_a_descendant_of_its_dead_worker_holds_the_socket(forking: PluginManager) -> None:
    task, child = await started(forking, "escape")
    descriptor = os.pidfd_open(seen_from_here(int(child), os.getpid()))
    os.kill(supervisor_of(forking), signal.SIGKILL)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(WorkerDiedError):
                await task
        assert await call(forking, "echo", x=1) == {"x": 1}
        assert select.select([descriptor], [], [], 10)[0], "it has not outlived its worker"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)


async def test_a_forked_process_is_no_part_of_the_conversation(forking: PluginManager) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    status = await forking.execute_plugin_async(
        "hostile", action="hostile.fork_and_print", on_log=heard.put_nowait, on_progress=heard.put_nowait
    )
    assert status == 7, "in the child no call is running"
    assert await call(forking, "return_twice") == "once"
    assert await call(forking, "echo", x=1) == {"x": 1}


async def test_a_worker_that_can_no_longer_hear_the_host_ends(hostile: PluginManager) -> None:
    task, _ = await started(hostile, "no_more_threads")
    await hostile.cancel_call("hostile", "c")
    with pytest.raises(PluginError):
        await task
    assert await call(hostile, "echo", x=1) == {"x": 1}


async def test_a_process_that_gives_way_to_its_own_child_for_ever_is_caught(forking: PluginManager) -> None:
    await call(forking, "fork_chain")
    descriptor = os.pidfd_open(supervisor_of(forking))
    async with asyncio.timeout(20):
        await forking.unload_plugin_async("hostile")
    assert select.select([descriptor], [], [], 0)[0]
    os.close(descriptor)


# -- loading and unloading at the wrong moment


async def test_unloading_does_not_wait_for_a_plugin_that_never_finishes_loading(
    manager: PluginManager, hostile_meta: MetaFactory
) -> None:
    load = asyncio.create_task(manager.load_plugin_async(hostile_meta("SlowToLoad")))
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await manager.unload_plugin_async("hostile")
        with pytest.raises(PluginNotLoadedError):
            await load
    assert manager.list_instances() == []


async def test_a_load_that_nobody_waits_for_any_more_may_fail_in_silence(
    manager: PluginManager, hostile_meta: MetaFactory, caplog: pytest.LogCaptureFixture
) -> None:
    load = asyncio.create_task(manager.load_plugin_async(hostile_meta("SlowToLoad")))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert await manager.unload_plugin_async("hostile")
    gc.collect()
    assert caplog.records == []


async def test_a_cancelled_unload_is_finished_all_the_same(hostile: PluginManager) -> None:
    pid = hostile.get_instance("hostile").supervisor_pid
    assert pid is not None
    descriptor = os.pidfd_open(pid)
    unload = asyncio.create_task(hostile.unload_plugin_async("hostile"))
    await asyncio.sleep(0)
    unload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unload
    await hostile.unload_all_async()
    assert select.select([descriptor], [], [], 0)[0], "nothing is left when unload_all returns"
    os.close(descriptor)


async def test_loads_given_up_at_any_moment_leave_nothing_behind(
    hostile: PluginManager, hostile_meta: MetaFactory
) -> None:
    def kept() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())

    before, sibling = kept(), hostile.get_instance("hostile").pid
    for turns in range(40):
        load = asyncio.create_task(hostile.load_plugin_async(hostile_meta(), instance_id="other"))
        for _ in range(turns % 20):
            await asyncio.sleep(0.0005 if turns < 20 else 0)
        load.cancel()
        await asyncio.wait({load})
        await hostile.unload_plugin_async("other")
    assert kept() == before
    assert (hostile.get_instance("hostile").pid, hostile.get_instance("hostile").alive) == (sibling, True)


async def test_eight_workers_with_large_environments_start_at_once(
    manager: PluginManager, hostile_meta: MetaFactory
) -> None:
    meta = hostile_meta()
    meta.manifest.install.env_vars["BIG"] = "x" * 50_000
    await asyncio.gather(*(manager.load_plugin_async(meta, instance_id=f"n{number}") for number in range(8)))
    assert all(instance.alive for instance in manager.list_instances())
