"""Both ends of the wire under whatever bytes come: the decoders in this process, and a few rounds with real workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plugin_substrate import CallContext, PluginError, PluginManager, PluginMeta, ProtocolError
from plugin_substrate.errors import WorkerDiedError
from plugin_substrate.lifecycle import Supervisor
from plugin_substrate.worker.frames import FrameDecoder, encode_frame
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.messages import Inbox
from plugin_substrate.worker.values import pack_value, unpack_value

SOAK = float(os.environ.get("SOAK", "0.05"))
ROUNDS = max(40, int(1000 * SOAK))
PATIENCE = 30  # seconds of a busy machine

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
segments = st.lists(
    st.sampled_from([b"{}", b"1", b'{"args":[],"kwargs":{}}', b'{"$":"bytes","segment":0}', b"[" * 3000, b""])
    | st.binary(max_size=20),
    max_size=3,
)
ids = st.sampled_from(["a", "b"]) | json_values
calls = st.fixed_dictionaries({"call_id": ids}, optional={"tenant_id": st.text(max_size=3), "more": json_values})

#: What a host says, in its form and out of it. ``unload`` alone is missing: it ends a worker as it should.
host_says = st.one_of(
    st.fixed_dictionaries({
        "type": st.just("load"),
        "module": st.sampled_from(["probe", "json", "no.such"]) | json_values,
        "class": st.sampled_from(["Probe", "loads"]) | json_values,
        "threads": st.integers(-1, 3) | st.text(max_size=2),
    }),
    st.fixed_dictionaries({"type": st.just("call"), "context": calls | json_values}, optional={"stream": json_values}),
    st.fixed_dictionaries({"type": st.just("ask"), "id": ids, "verb": st.sampled_from(["stats", "x"]) | json_values}),
    st.fixed_dictionaries({"type": st.just("credit"), "id": ids, "bytes": json_values}),
    st.fixed_dictionaries({"type": st.just("cancel"), "id": ids}),
    st.fixed_dictionaries({}, optional={"type": json_values, "parked": json_values}),
)  # fmt: skip
worker_says = st.fixed_dictionaries(
    {"type": st.sampled_from(["progress", "usage", "log", "chunks", "result", "error", "ready"]) | json_values},
    optional={
        "id": st.sampled_from(["c", "d"]) | json_values,
        **dict.fromkeys(("progress", "message", "usage", "line", "counts", "error", "seconds", "spent"), json_values),
    },
)


@st.composite
def conversations(draw: st.DrawFn, headers: st.SearchStrategy[dict[str, Any]]) -> bytes:
    """Draw some frames, with now and then a byte of them changed, left out or doubled, and what else may follow."""
    frames = draw(st.lists(st.tuples(headers, segments), max_size=5))
    stream = bytearray(b"".join(piece for header, body in frames for piece in encode_frame(header, body)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(-1, 256)), max_size=3)):
        if stream:
            place = at % len(stream)
            stream[place : place + 1] = {-1: b"", 256: bytes([stream[place]] * 2)}.get(value) or bytes([value % 256])
    return bytes(stream) + draw(st.binary(max_size=12))


@given(conversations(host_says) | conversations(worker_says), st.integers(1, 40))
def test_however_bytes_are_cut_a_decoder_gives_the_same_frames_or_the_same_refusal(data: bytes, size: int) -> None:
    assert decoded([data]) == decoded([data[at : at + size] for at in range(0, len(data), size)])


def decoded(portions: list[bytes]) -> list[Any]:
    """The frames, as values where they hold one, and the word refused when one is no frame."""
    decoder, found = FrameDecoder(), []
    try:
        for portion in portions:
            for frame in decoder.feed(portion):
                found.append((frame.header, opened(frame.segments)))
    except ProtocolError:
        found.append("refused")
    return found


def opened(segments: Any) -> Any:
    try:
        return repr(unpack_value(segments, "value"))
    except (ProtocolError, PluginError) as error:
        return type(error).__name__


# -- host to worker


def test_whatever_a_worker_hears_it_ends_by_itself_and_says_nothing_but_frames(
    probe_python: Path, tmp_path: Path
) -> None:
    """A real worker for each round; when all is said the host's end is closed, and a worker that hangs would stay."""
    with asyncio.Runner() as runner, supervisor_on(runner, probe_python) as supervisor:

        @settings(max_examples=ROUNDS, suppress_health_check=list(HealthCheck))
        @given(conversations(host_says))
        def one_round(data: bytes) -> None:
            status, heard = runner.run(told(supervisor, tmp_path, data))
            assert status in (0, 1), "it ended by itself"
            assert next(iter(FrameDecoder().feed(heard))).header["type"] == "hello"

        one_round()


@contextmanager
def supervisor_on(runner: asyncio.Runner, python: Path) -> Iterator[Supervisor]:
    async def start() -> Supervisor:
        return Supervisor(str(python))

    supervisor = runner.run(start())
    yield supervisor
    runner.run(supervisor.close())


async def told(supervisor: Supervisor, folder: Path, data: bytes) -> tuple[int | None, bytes]:
    """Start a worker, say something to it and hear it out; returns how it ended and what it said."""
    process = await supervisor.spawn(env={}, cwd=folder, isolation=IsolationProfile())
    loop, connection, heard = asyncio.get_running_loop(), process.connection, bytearray()
    connection.setblocking(False)
    try:
        async with asyncio.timeout(PATIENCE):
            try:
                await loop.sock_sendall(connection, data)
                connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it did not want to hear the rest
            while portion := await received(connection):
                heard += portion
            return (await process.exit).returncode, bytes(heard)
    finally:
        connection.close()
        os.close(process.log_descriptor)
        process.close()


async def received(connection: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(connection, 1 << 16)
    except ConnectionResetError:  # it ended with something of ours unread
        return b""


# -- worker to host


def test_whatever_a_worker_says_its_call_ends_typed_and_the_next_one_works(
    probe_meta: Callable[..., PluginMeta], tmp_path: Path
) -> None:
    with asyncio.Runner() as runner:
        faults: list[dict[str, Any]] = []
        runner.get_loop().set_exception_handler(lambda _, context: faults.append(context))
        # No records of calls: another thread would have their file open just when descriptors are counted.
        manager = PluginManager(data_dir=tmp_path / "data", grace_seconds=0.3, empirical_tracking=False)
        runner.run(manager.load_plugin_async(probe_meta("Hostile", "hostile", "hostile")))
        before = descriptors()

        @settings(max_examples=ROUNDS, suppress_health_check=list(HealthCheck))
        @given(conversations(worker_says))
        @example(b"".join(encode_frame({"id": "c", "type": "error"}, [])))
        def one_round(data: bytes) -> None:
            runner.run(survived(manager, data))

        one_round()
        assert faults == []
        assert descriptors() <= before + 3, "no more than another worker's socket, log and process"
        runner.run(manager.unload_all_async())


async def survived(manager: PluginManager, data: bytes) -> None:
    """Have the plugin write these bytes to the host in the place of an answer, and leave."""
    async with asyncio.timeout(PATIENCE):
        with suppress(PluginError):
            await manager.execute_plugin_async(
                "hostile", action="hostile.write", raw=data, leave=True, call=CallContext("c")
            )
        try:
            echoed = await manager.execute_plugin_async("hostile", action="hostile.echo", x=1)
        except WorkerDiedError:  # what was written was an answer, and this call met the worker on its way out
            echoed = await manager.execute_plugin_async("hostile", action="hostile.echo", x=1)
        assert echoed == {"x": 1}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- and what is well formed


@given(st.lists(st.tuples(json_values, st.binary(max_size=30)), min_size=1, max_size=4))
def test_what_one_side_packs_the_other_unpacks_through_a_real_socket(values: list[tuple[Any, bytes]]) -> None:
    here, there = socket.socketpair()
    with here, there:
        for value in values:
            here.sendall(b"".join(encode_frame({"type": "x"}, pack_value(list(value), "value"))))
        inbox, found = Inbox(there), []
        while len(found) < len(values):
            found += [tuple(unpack_value(frame.segments)) for frame in inbox.frames(inbox.receive())]
    assert found == values
