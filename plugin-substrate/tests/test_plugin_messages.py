"""What either side receives beside frames or in odd ones: it ends the connection, typed, and leaves nothing open."""

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
    PluginError,
    PluginManager,
    PluginMeta,
    ProtocolError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.deaths import WorkerExit
from plugin_substrate.lifecycle import Supervisor, WorkerProcess
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker.frames import PROTOCOL_VERSION, Frame, encode_frame
from plugin_substrate.worker.inbox import Inbox
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.values import unpack_value

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


def frame_of(header: bytes, body: bytes) -> bytes:
    return struct.pack(">II", len(header) + len(body), len(header)) + header + body


def received(end: socket.socket) -> list[Frame]:
    inbox = Inbox(end)
    return list(inbox.frames(inbox.receive()))


@pytest.mark.parametrize("count", [1, 8, 200])
def test_descriptors_are_closed_and_end_the_connection(pair: Pair, count: int) -> None:
    socket.send_fds(pair[0], encode_frame({"type": "log"}), [pair[0].fileno()] * count)
    with pytest.raises(ProtocolError, match="descriptors"):
        received(pair[1])


def test_descriptors_that_come_within_a_frame_end_the_connection_too(pair: Pair) -> None:
    inbox = Inbox(pair[1])
    pair[0].send(struct.pack(">II", 1 << 20, 10))
    assert list(inbox.frames(inbox.receive())) == []
    socket.send_fds(pair[0], [b"x"], [pair[0].fileno()])
    with pytest.raises(ProtocolError, match="descriptors"):
        inbox.receive()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    st.binary(max_size=100)
    | st.fixed_dictionaries({"segments": st.just([1])}, optional={"more": json_values}).map(
        lambda header: frame_of(json.dumps(header).encode(), b"0")
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
            assert not count
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
        proxy.send_call(call, proxy.encode_call(call.context, (), {}))
    with there:
        there.sendall(data)
    os.close(writing)
    await sleeper.wait()
    exit_.set_result(WorkerExit(-9))
    await proxy.kill()
    for call in calls:
        error = call.value.exception()
        assert error is None or isinstance(error, PluginError)
    assert faults == []
