from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    PluginCancelledError,
    PluginInputError,
    PluginManager,
    PluginMeta,
    PluginResourceError,
    PluginTimeoutError,
    ProtocolError,
    ResourceShortfall,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.worker.streams import LEAST_CHARGE, WINDOW_BYTES

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
async def streamer(manager: PluginManager, probe_meta: MetaFactory) -> PluginManager:
    await manager.load_plugin_async(probe_meta("Streamer", "streamer", "streamer"))
    return manager


async def read(manager: PluginManager, hear: Callable[[Any], object], **arguments: Any) -> None:
    async for chunk in manager.execute_plugin_stream("streamer", **arguments):
        hear(chunk)


async def collected(manager: PluginManager, kind: str, **arguments: Any) -> list[Any]:
    return [chunk async for chunk in manager.execute_plugin_stream("streamer", kind=kind, **arguments)]


async def test_every_chunk_arrives_once_and_in_order(streamer: PluginManager) -> None:
    assert await collected(streamer, "numbers", count=20_000) == list(range(20_000))


async def test_chunks_are_values_like_all_others_however_large(streamer: PluginManager) -> None:
    assert await collected(streamer, "values") == [{"a": (1, b"x")}, b"y" * (5 << 20), None]


async def test_a_plugin_that_does_not_stream_gives_its_result_in_one_chunk(probe: PluginManager) -> None:
    chunks = [chunk async for chunk in probe.execute_plugin_stream("probe", action="probe.echo", x=1)]
    assert chunks == [{"x": 1}]


async def test_a_chunk_arrives_while_the_plugin_works_on_the_next(streamer: PluginManager) -> None:
    async with closing_stream(streamer, kind="pauses") as chunks, asyncio.timeout(30):
        assert await anext(chunks) == "first"


async def test_a_slow_reader_slows_the_plugin(streamer: PluginManager) -> None:
    """The generator tells at once how far it is, which its chunks do not: it is never more than the window ahead."""
    made, taken = 0, 0

    def hear(_: float, message: str) -> None:
        nonlocal made
        made = int(message)

    async for _ in streamer.execute_plugin_stream("streamer", kind="reported", count=3000, on_progress=hear):
        taken += 1
        assert made <= taken + WINDOW_BYTES // LEAST_CHARGE
        await asyncio.sleep(0)
    assert (made, taken) == (2999, 3000)


async def test_memory_stays_flat_however_much_passes_through(streamer: PluginManager) -> None:
    size, blocks = 256 << 10, 256
    received = 0
    before = await streamer.execute_plugin_async("streamer", kind="resident")
    async for chunk in streamer.execute_plugin_stream("streamer", kind="blocks", count=blocks, size=size):
        received += len(chunk)
    after = await streamer.execute_plugin_async("streamer", kind="resident")
    assert received == size * blocks
    assert after - before < 8 << 20


def test_chunks_without_credit_are_refused_so_a_hostile_plugin_cannot_fill_the_host() -> None:
    async def overfill() -> None:
        stream = PendingStream(CallContext("x"))
        for _ in range(WINDOW_BYTES // LEAST_CHARGE):
            stream.receive([1], [b"1"])
        stream.receive([1], [b"1"])

    with pytest.raises(ProtocolError, match="credit"):
        asyncio.run(overfill())


async def test_a_typed_error_arrives_whole_after_the_chunks_before_it(streamer: PluginManager) -> None:
    chunks: list[Any] = []
    with pytest.raises(PluginResourceError, match="too big") as caught:
        await read(streamer, chunks.append, kind="fails", after=700)
    assert chunks == list(range(700))
    assert caught.value.resource_shortfall == ResourceShortfall("ram", 10, 4)
    with pytest.raises(PluginInputError) as early:
        await collected(streamer, "fails_at_once")
    assert early.value.fields_invalid == ("rows",)


async def test_a_chunk_that_cannot_cross_names_its_place(streamer: PluginManager) -> None:
    with pytest.raises(WireValueError) as caught:
        await collected(streamer, "unencodable")
    assert (caught.value.path, caught.value.outcome_known) == ("chunk[1].rows[1]", False)


async def test_progress_and_logs_of_a_stream_are_pushed_beside_it(streamer: PluginManager) -> None:
    lines: list[str] = []
    heard: list[float] = []
    stream = streamer.execute_plugin_stream(
        "streamer", kind="chatty", on_log=lines.append, on_progress=lambda progress, _: heard.append(progress)
    )
    assert [chunk async for chunk in stream] == [0, 1, 2]
    assert lines == ["line 0", "line 1", "line 2"]
    assert heard == [0, 1 / 3, 2 / 3]


async def test_ending_the_iteration_ends_the_generator_and_frees_the_worker(streamer: PluginManager) -> None:
    pid = streamer.get_instance("streamer").pid
    async with closing_stream(streamer, kind="numbers", count=10**9) as chunks:
        assert await anext(chunks) == 0
    assert await streamer.execute_plugin_async("streamer", kind="ended") is True
    assert streamer.get_instance("streamer").pid == pid


async def test_cancelling_the_call_ends_a_stream_whose_reader_waits(streamer: PluginManager) -> None:
    def cancel(_: Any) -> None:
        cancels.append(asyncio.create_task(streamer.cancel_call("streamer", "mine")))

    cancels: list[asyncio.Task[Any]] = []
    with pytest.raises(PluginCancelledError):
        await read(streamer, cancel, kind="pauses", call=CallContext("mine"))
    assert await cancels[0] == "cooperative"


async def test_cancelling_ends_a_stream_that_waits_for_its_reader(streamer: PluginManager) -> None:
    async with closing_stream(streamer, kind="numbers", count=10**9, call=CallContext("mine")) as chunks:
        await anext(chunks)
        assert await streamer.cancel_call("streamer", "mine") == "cooperative"
        with pytest.raises(PluginCancelledError):
            async for _ in chunks:
                pass


@pytest.mark.parametrize(("kind", "known"), [("pauses", True), ("deaf", False)])
async def test_a_deadline_ends_a_stream(streamer: PluginManager, kind: str, *, known: bool) -> None:
    chunks: list[Any] = []
    call = CallContext("x", deadline=time.time() + 0.3)
    with pytest.raises(PluginTimeoutError) as caught:
        await read(streamer, chunks.append, kind=kind, call=call)
    assert chunks == ["first"]
    assert caught.value.outcome_known is known


async def test_a_worker_that_dies_under_a_stream_is_a_typed_error_after_what_it_sent(streamer: PluginManager) -> None:
    pid = streamer.get_instance("streamer").pid
    assert pid is not None
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        await read(streamer, lambda _: os.kill(pid, signal.SIGKILL), kind="deaf")
    assert await collected(streamer, "numbers", count=3) == [0, 1, 2]


def test_a_synchronous_reader_streams_too_and_may_stop_early(tmp_path: Path, probe_meta: MetaFactory) -> None:
    manager = PluginManager(data_dir=tmp_path)
    assert manager.load_plugin(probe_meta("Streamer", "streamer", "streamer"))
    stream = manager.execute_plugin_stream_sync("streamer", kind="numbers", count=2000)
    assert list(stream) == list(range(2000))
    endless = manager.execute_plugin_stream_sync("streamer", kind="numbers", count=10**9)
    assert [chunk for chunk, _ in zip(endless, range(3), strict=False)] == [0, 1, 2]
    endless.close()
    assert manager.execute_plugin("streamer", kind="ended") is True
    manager.unload_all()


def closing_stream(manager: PluginManager, **arguments: Any) -> Any:
    return aclosing(manager.execute_plugin_stream("streamer", **arguments))
