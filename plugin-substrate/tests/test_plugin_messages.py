"""Frames with descriptors, as either side receives them: what is whole arrives, all else ends the connection."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import (
    CallContext,
    InputFile,
    PluginError,
    PluginManager,
    PluginMeta,
    ProtocolError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.call_message import encode_call
from plugin_substrate.deaths import WorkerExit
from plugin_substrate.lifecycle import Supervisor, WorkerProcess
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker.frames import PROTOCOL_VERSION, Frame, encode_frame
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.messages import Inbox, encode_message
from plugin_substrate.worker.parked import MAX_PARKED, PARK_BYTES, park
from plugin_substrate.worker.values import pack_value, unpack_value

MetaFactory = Callable[..., PluginMeta]
Pair = tuple[socket.socket, socket.socket]


def open_descriptors() -> int:
    gc.collect()  # what an earlier test left may close some at any moment
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection; when a test is over, no descriptor but these may be open."""
    before = open_descriptors()
    here, there = socket.socketpair()
    yield here, there
    here.close()
    there.close()
    assert open_descriptors() == before


def send(end: socket.socket, header: dict[str, Any], segments: list[bytes]) -> None:
    message = encode_message(header, segments)
    socket.send_fds(end, message.pieces, message.descriptors)
    message.close()


def received(end: socket.socket) -> list[Frame]:
    inbox = Inbox(end)
    try:
        return list(inbox.frames(inbox.receive()))
    finally:
        inbox.close()


def test_a_large_segment_travels_beside_the_stream_and_arrives_in_its_place(pair: Pair) -> None:
    value = {"small": b"s", "large": b"x" * PARK_BYTES, "file": InputFile("a.bin", "text/plain", b"y" * PARK_BYTES)}
    send(pair[0], {"type": "call"}, pack_value(value, "value"))
    (frame,) = received(pair[1])
    assert frame.header == {"type": "call"}
    assert unpack_value(frame.segments) == value


def test_a_frame_that_nobody_reads_closes_its_descriptors(pair: Pair) -> None:
    send(pair[0], {}, pack_value(b"x" * PARK_BYTES, "value"))
    assert len(received(pair[1])) == 1


def parked_frame(size: int, place: int = 1) -> bytes:
    value = b'{"$":"bytes","segment":0}'
    return b"".join(encode_frame({"parked": [[place, size]]}, [value]))


def test_a_parked_segment_that_is_shorter_than_announced_is_refused(pair: Pair) -> None:
    memory = os.memfd_create("short")
    os.write(memory, b"x" * 10)
    socket.send_fds(pair[0], [parked_frame(11)], [memory])
    os.close(memory)
    (frame,) = received(pair[1])
    with pytest.raises(ProtocolError, match="short"):
        unpack_value(frame.segments)


def test_a_descriptor_that_is_no_memory_file_is_never_read(pair: Pair) -> None:
    """Reading one of another kind might never return."""
    reading, writing = os.pipe()
    for descriptor in (reading, os.open(__file__, os.O_RDONLY)):
        socket.send_fds(pair[0], [parked_frame(1)], [descriptor])
        os.close(descriptor)
        (frame,) = received(pair[1])
        with pytest.raises(ProtocolError, match="cannot be read"):
            unpack_value(frame.segments)
    os.close(writing)


@pytest.mark.parametrize("count", [1, MAX_PARKED, MAX_PARKED + 1, 200])
def test_descriptors_that_no_frame_announces_are_closed_and_end_the_connection(pair: Pair, count: int) -> None:
    socket.send_fds(pair[0], encode_frame({"type": "log"}), [pair[0].fileno()] * count)
    with pytest.raises(ProtocolError, match="descriptor"):
        received(pair[1])


def test_descriptors_cannot_pile_up_behind_a_frame_that_never_ends(pair: Pair) -> None:
    inbox = Inbox(pair[1])
    pair[0].send(struct.pack(">II", 1000, 10))
    assert list(inbox.frames(inbox.receive())) == []
    for _ in range(MAX_PARKED):
        socket.send_fds(pair[0], [b"x"], [pair[0].fileno()])
        assert list(inbox.frames(inbox.receive())) == []
    socket.send_fds(pair[0], [b"x"], [pair[0].fileno()])
    with pytest.raises(ProtocolError, match="more descriptors"):
        inbox.receive()


@pytest.mark.parametrize(
    "parked",
    [
        [],
        {},
        "x",
        [[1]],
        [[0, 5]],
        [[2, 5]],
        [[1, 0]],
        [[1, -1]],
        [[1, 5], [2, 5]],
        [[1, 1 << 40]],
        [["1", 5]],
        [[True, 5]],
    ],
    ids=str,
)
def test_a_list_of_parked_segments_that_does_not_fit_is_refused(pair: Pair, parked: Any) -> None:
    memory = os.memfd_create("five")
    os.write(memory, b"12345")
    socket.send_fds(pair[0], encode_frame({"parked": parked}, [b"0"]), [memory])
    os.close(memory)
    with pytest.raises(ProtocolError):
        received(pair[1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    st.binary(max_size=100)
    | st.fixed_dictionaries({"segments": st.just([1])}, optional={"parked": json_values}).map(
        lambda header: (
            struct.pack(">II", len(json.dumps(header)) + 1, len(json.dumps(header)))
            + json.dumps(header).encode()
            + b"0"
        )
    ),
    st.integers(0, 3),
)
def test_whatever_comes_is_a_frame_or_a_protocol_error_and_leaves_no_descriptor_open(data: bytes, count: int) -> None:
    before = open_descriptors()
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [data or b"x"], [here.fileno()] * count)
        try:
            frames = received(there)
        except ProtocolError:
            frames = []
        for frame in frames:
            assert isinstance(frame.header, dict)
        del frames[:]
    assert open_descriptors() == before


# -- arrays where numpy is not


ARRAY = {"$": "array", "dtype": "<f8", "shape": [2], "segment": 0}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (ARRAY, "result"),
        ({"rows": [1, ARRAY]}, "result.rows[1]"),
        ({"$": "tuple", "items": [{"$": "dict", "items": {"$": ARRAY}}]}, "result[0]['$']"),
    ],
)
def test_an_array_that_comes_where_numpy_is_not_imported_is_refused_with_its_place(
    value: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    with pytest.raises(WireValueError, match="numpy") as caught:
        unpack_value([json.dumps(value).encode(), b"x" * 16], "result")
    assert caught.value.path == place


@pytest.mark.parametrize(
    "forged",
    [
        {"dtype": "O"},
        {"dtype": "<f8,<i4"},
        {"dtype": "S4"},
        {"dtype": 1},
        {"shape": [-2]},
        {"shape": 2},
        {"shape": [True]},
    ],
    ids=str,
)
def test_a_forged_array_is_refused_whether_numpy_is_there_or_not(forged: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack_value([json.dumps({**ARRAY, **forged}).encode(), b"x" * 16])


# -- against real workers


async def test_a_worker_that_floods_the_host_with_descriptors_is_ended_and_nothing_stays_open(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("Hostile", "hostile", "hostile"))
    before = open_descriptors()
    with pytest.raises(WorkerDiedError, match="descriptors"):
        await manager.execute_plugin_async("hostile", action="hostile.flood_descriptors")
    assert await manager.execute_plugin_async("hostile", action="hostile.echo", x=1) == {"x": 1}
    assert open_descriptors() == before


async def test_a_worker_that_parks_what_is_no_memory_file_is_ended(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("Hostile", "hostile", "hostile"))
    with pytest.raises(WorkerDiedError, match="parked segment cannot be read"):
        await manager.execute_plugin_async("hostile", action="hostile.park_a_file")


def test_who_gets_a_memory_file_cannot_use_it_as_memory() -> None:
    _, _, (memory,) = park([b"{}", bytes(PARK_BYTES)])
    try:
        for use in (
            lambda: os.pwrite(memory, b"x", 0),
            lambda: os.ftruncate(memory, 0),
            lambda: os.ftruncate(memory, 1 << 30),
        ):
            with pytest.raises(PermissionError):
                use()
    finally:
        os.close(memory)


@pytest.fixture
async def worker(probe_python: Path, tmp_path: Path) -> Any:
    """A worker that nothing was said to yet, and its supervisor."""
    supervisor = Supervisor(str(probe_python))
    process = await supervisor.spawn(env={}, cwd=tmp_path, isolation=IsolationProfile())
    yield process
    process.connection.close()
    os.close(process.log_descriptor)
    process.close()
    await supervisor.close()


@pytest.mark.parametrize(
    "odd",
    [
        b"\xff" * 64,
        b"".join(encode_frame({})),
        b"".join(encode_frame({"type": "no such thing"})),
        b"".join(encode_frame({"type": "call"})),
        b"".join(encode_frame({"type": "call", "context": {"tenant_id": "x"}})),
        b"".join(encode_frame({"type": ["call"]})),
        b"".join(encode_frame({"type": "credit", "id": "x"})),
        b"".join(encode_frame({"type": "ask", "id": [], "verb": {}})),
    ],
    ids=range(8),
)
async def test_a_worker_that_hears_what_it_cannot_understand_ends_and_says_why(
    worker: WorkerProcess, odd: bytes
) -> None:
    """Its own host breaks the protocol only by a fault: better no worker than one that does something else."""
    worker.connection.sendall(odd)
    assert (await asyncio.wait_for(worker.exit, 30)).returncode == 1
    assert select.select([worker.log_descriptor], [], [], 0)[0]
    assert b"Traceback" in os.read(worker.log_descriptor, 1 << 16)


# -- the host, whatever a worker says

frame_types = st.sampled_from(
    [
        "hello",
        "ready",
        "load_failed",
        "loading",
        "log",
        "progress",
        "phase",
        "usage",
        "chunks",
        "result",
        "error",
        "unloaded",
        "no-such-thing",
    ]
)
said = st.fixed_dictionaries(
    {"type": frame_types | json_values},
    optional={
        "id": st.sampled_from(["call", "stream", "nobody"]) | json_values,
        "protocol": st.just(PROTOCOL_VERSION) | json_values,
        "python": st.just("3.11.7") | json_values,
        "layers": st.lists(st.text(), max_size=2) | json_values,
        **dict.fromkeys(("line", "message", "phase"), st.text() | json_values),
        **dict.fromkeys(("progress", "usage", "error", "seconds", "spent", "counts"), json_values),
    },
)
sent_segments = st.lists(st.sampled_from([b"1", b"{}", b'{"$":"bytes","segment":0}', b"", b"\xff"]), max_size=3)


@given(st.lists(st.tuples(said, sent_segments), max_size=5), st.binary(max_size=20))
def test_whatever_a_worker_says_ends_its_calls_typed_and_never_harms_the_host(
    frames: list[tuple[dict[str, Any], list[bytes]]], rest: bytes
) -> None:
    """The worker is a process that only sleeps; the test speaks in its place, then its end of the socket is closed."""
    asyncio.run(hear(b"".join(piece for frame in frames for piece in encode_frame(*frame)) + rest))


async def hear(data: bytes) -> None:
    faults: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.append(context))
    sleeper = await asyncio.create_subprocess_exec("sleep", "1000")
    here, there = socket.socketpair()
    reading, writing = os.pipe()
    exit_: asyncio.Future[WorkerExit] = loop.create_future()
    process = WorkerProcess(
        connection=here, log_descriptor=reading, pid=sleeper.pid, pidfd=os.pidfd_open(sleeper.pid), exit=exit_
    )
    proxy = RemotePluginProxy(process)
    calls = [PendingCall(CallContext("call")), PendingStream(CallContext("stream"))]
    for call in calls:
        proxy.send_call(call, encode_call(call.context, (), {}))
    with there:
        there.sendall(data)
    os.close(writing)
    await sleeper.wait()
    exit_.set_result(WorkerExit(-9))
    await proxy.kill()
    for call in calls:
        error = call.error
        assert error is None or isinstance(error, PluginError)
    assert faults == []
