"""A watcher sees every event once, in order, and then the end, however often and wherever its connection is cut."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx
import psutil
import psycopg
import pytest

WATCHERS = 4
STREAMS = 100
POOLED = 30  # connections and threads that a busy server keeps for the next time
ENDS = ("run_succeeded", "run_failed", "run_cancelled")
HOSTILE = "é\u2028😀\r\n\r\nid: 99\r\nevent: run_succeeded\r\ndata: {}\r\n\r\n"
APPEND = "SELECT engine_append_event_v1(%s, %s, 'note', 'user:test', %s)"
NOTIFY_OFTEN = (
    "SELECT pg_notify('plm_run_news', %s || repeat(' ', n)) FROM generate_series(1, %s) AS n"  # equal ones merge
)
STORED = "SELECT seq::text, kind, payload::jsonb FROM events WHERE stream = %s ORDER BY events.seq"

Cut = Callable[["Watcher", int], bool]


@dataclass(kw_only=True)
class Watcher:
    """A client after the specification of server-sent events: what it has not received whole, it has not received."""

    run_id: str
    messages: list[tuple[str, str, Any]] = field(default_factory=list)
    reports: int = 0
    last_id: str = ""

    @property
    def ended(self) -> bool:
        return bool(self.messages) and self.messages[-1][1] in ENDS

    def read(self, client: Any, *, most: int | None = None, cut: Cut = lambda *_: False) -> bool:
        """Follow from the last message on, for `most` bytes or until `cut`; answers whether the server ended it."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        buffer, taken = b"", 0
        try:
            with client.stream("GET", f"/v1/runs/{self.run_id}/events", headers=headers) as answer:
                if answer.status_code == 503:  # the database is away
                    return False
                assert answer.status_code == 200, answer.read()
                for chunk in answer.iter_bytes():
                    part = chunk if most is None else chunk[: most - taken]
                    taken += len(part)
                    buffer = self._take(buffer + part)
                    if taken == most or cut(self, taken):
                        return False
        except httpx.TransportError:
            return False
        assert buffer == b"", "a stream that the server ends, ends between two messages"
        return True

    def follow(self, *clients: Any, cuts: Iterator[int]) -> Watcher:
        """Come back, to one server after the other, until the end was seen."""
        for client in cycle(clients):
            if self.ended:
                return self
            self.read(client, most=next(cuts))
        raise AssertionError

    def _take(self, buffer: bytes) -> bytes:
        *whole, rest = buffer.split(b"\r\n\r\n")
        for message in whole:
            lines = [line.split(": ", 1) for line in message.decode().splitlines() if not line.startswith(":")]
            fields = dict(lines)
            if fields.get("event") == "progress":
                assert "id" not in fields, "a report must not move the place to resume from"
                self.reports += 1
            elif fields:
                self.last_id = fields["id"]
                self.messages.append((fields["id"], fields["event"], json.loads(fields["data"])["payload"]))
        return rest


def _stored(server: Any, run_id: str) -> list[tuple[str, str, Any]]:
    """The record itself, as the owner reads it."""
    with closing(server.database()) as books:
        rows = books.execute(STORED, [f"run/{run_id}"]).fetchall()
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert rows[-1][1] in ENDS
    return list(rows)


def _append(server: Any, run_id: str, *notes: Any, reports: int = 0) -> None:
    """Events of another process, committed one by one, each with news and more reports than a watcher's queue holds."""
    news = {"tenant": str(server.tenant), "run": run_id}
    report = json.dumps({**news, "progress": {"fraction": 0.5, "message": HOSTILE}})
    with psycopg.connect(server.environment["PG_DSN"], autocommit=True) as connection:
        for note in notes:
            with connection.transaction():
                connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(server.tenant)])
                connection.execute(APPEND, [server.tenant, f"run/{run_id}", json.dumps({"note": note})])
                connection.execute("SELECT pg_notify('plm_run_news', %s)", [json.dumps(news)])
            connection.execute(NOTIFY_OFTEN, [report, reports])


@pytest.fixture(scope="module")
def other_api(platform: Any, launch: Callable[..., Any]) -> Iterator[Any]:
    """Another process that serves the same runs and drives none."""
    with launch(like=platform, PLM_RUN_CONCURRENCY="0") as server:
        yield server


def _approve(server: Any, run_id: str) -> None:
    approver = server.client(scopes=("plm.hitl.resolve",))
    tickets = approver.get("/v1/approvals", params={"state": "pending", "limit": 200}).json()["items"]
    ticket = next(ticket["ticket_id"] for ticket in tickets if ticket["run_id"] == run_id)
    assert approver.post(f"/v1/approvals/{ticket}/decision", json={"decision": "approve"}).status_code == 200


def test_a_client_cut_off_after_each_event_sees_each_once_while_the_run_works_waits_and_ends(
    platform: Any, other_api: Any, client: Any, gate: Any
) -> None:
    run_id = client.run("long-trip", gate=str(gate))["run_id"]
    watcher, servers = Watcher(run_id=run_id), cycle((platform.client(), other_api.client()))
    while not watcher.ended:
        seen = len(watcher.messages)
        watcher.read(next(servers), cut=lambda now, _, seen=seen: len(now.messages) > seen)
        match watcher.messages[-1][1]:
            case "step_started":
                gate.open()
            case "approval_requested":
                _approve(platform, run_id)
    assert watcher.messages == _stored(platform, run_id)
    kinds = [kind for _, kind, _ in watcher.messages]
    assert [kinds.count(kind) for kind in ("step_settled", "approval_requested", "run_succeeded")] == [3, 1, 1]


def _partial_reads(seed: float) -> Iterator[int]:
    """Lengths in bytes after which a connection breaks: within a line, a message, or many messages."""
    chance = random.Random(seed)
    while True:
        yield int(chance.choice((30, 300, 3000, 30_000)) * chance.uniform(0.1, 2.0)) + 1


@pytest.mark.parametrize("seed", range(3))
def test_clients_cut_off_at_any_byte_see_each_event_once_while_many_are_written(
    platform: Any, other_api: Any, client: Any, gate: Any, seed: int
) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    with ThreadPoolExecutor(WATCHERS) as pool:
        watching = [
            pool.submit(
                Watcher(run_id=run_id).follow,
                *(platform.client(), other_api.client()),
                cuts=_partial_reads(seed + number / WATCHERS),
            )
            for number in range(WATCHERS)
        ]
        _append(platform, run_id, *range(200), HOSTILE, reports=2)
        gate.open()
        seen = [each.result().messages for each in watching]
    stored = _stored(platform, run_id)
    assert len(stored) > 200
    assert [messages == stored for messages in seen] == [True] * WATCHERS


def test_reports_that_flood_a_watcher_drown_no_event(platform: Any, client: Any, gate: Any) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    watcher = Watcher(run_id=run_id)

    def flood(now: Watcher, _: int) -> bool:
        if len(now.messages) == 1:
            _append(platform, run_id, "before", reports=200)
            _append(platform, run_id, "after")
            gate.open()
        return False

    assert watcher.read(client, cut=flood)
    assert watcher.reports > 0
    assert watcher.messages == _stored(platform, run_id)


def test_a_client_that_does_not_read_for_a_while_misses_nothing(platform: Any, client: Any, gate: Any) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    watcher = Watcher(run_id=run_id)

    def dawdle(now: Watcher, _: int) -> bool:
        if not now.reports and now.messages[-1][1] == "step_started":
            _append(platform, run_id, *["x" * 5000] * 1200)  # more than a page of the store, and than a socket takes
            gate.open()
        return False

    assert watcher.read(client, cut=dawdle)
    assert watcher.messages == _stored(platform, run_id)


def test_who_comes_after_the_end_sees_all_that_is_left_and_then_the_end(
    platform: Any, other_api: Any, client: Any
) -> None:
    run_id = client.run("echo")["run_id"]
    client.finished(run_id)
    stored = _stored(platform, run_id)
    for server in (platform, other_api):
        for seen in range(len(stored) + 1):
            late = Watcher(run_id=run_id, last_id=str(seen or ""))
            assert late.read(server.client())
            assert late.messages == stored[seen:]


@pytest.mark.parametrize("ahead", [1, 10**17])
def test_an_id_that_the_stream_has_not_given_yet_is_refused(client: Any, ahead: int) -> None:
    run_id = client.run("write")["run_id"]
    client.wait(run_id, "approval_requested")
    last = next(message.id for message in client.events(run_id) if message.event == "approval_requested")
    answer = client.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": str(int(last) + ahead)})
    assert (answer.status_code, answer.json()["field"]) == (422, "Last-Event-ID")


def test_a_stream_opened_long_before_anybody_drives_the_run_sees_it_through(launch: Any, until: Any) -> None:
    with launch(PLM_RUN_CONCURRENCY="0") as api, ThreadPoolExecutor(1) as pool:
        run_id = api.client().run("echo")["run_id"]
        watcher = Watcher(run_id=run_id)
        watching = pool.submit(watcher.read, api.client())
        until(lambda: watcher.messages, "the first event comes")
        with launch(like=api, PLM_RUN_CONCURRENCY="1"):
            assert watching.result()
        assert watcher.messages == _stored(api, run_id)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_stopped_in_the_middle_of_a_stream_is_followed_on_by_its_successor(
    launch: Any, gate: Any, number: int
) -> None:
    with launch() as server:
        run_id = server.client().run("hold-then-echo", gate=str(gate))["run_id"]
        watcher = Watcher(run_id=run_id)

        def stop(now: Watcher, _: int) -> bool:
            if now.messages[-1][1] == "step_started" and server.process.poll() is None:
                server.stop(number)
            return False

        watcher.read(server.client(), cut=stop)
        assert not watcher.ended
        gate.open()
        with launch(like=server) as successor:
            watcher.follow(successor.client(), cuts=cycle([10**9]))
        assert watcher.messages == _stored(server, run_id)
        assert [kind for _, kind, _ in watcher.messages].count("run_taken") == 2


def test_streams_go_on_after_every_connection_to_the_database_was_cut(launch: Any, gate: Any, until: Any) -> None:
    with launch() as server, ThreadPoolExecutor(1) as pool:
        run_id = server.client().run("hold", gate=str(gate))["run_id"]
        watcher = Watcher(run_id=run_id)
        watching = pool.submit(watcher.follow, server.client(), cuts=cycle([10**9]))
        until(lambda: watcher.messages and watcher.messages[-1][1] == "step_started", "the call begins")
        with psycopg.connect(server.environment["PG_DSN"], autocommit=True) as own:
            own.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'plm_app' "
                "AND datname = current_database() AND pid <> pg_backend_pid()"
            )
        _append(server, run_id, "after the cut")
        gate.open()
        assert watching.result().messages == _stored(server, run_id)


def test_a_hundred_open_streams_keep_nobody_waiting_and_leave_nothing_behind(launch: Any, until: Any) -> None:
    with launch() as server, ThreadPoolExecutor(STREAMS) as pool:
        client, crowd = server.client(), server.client()
        run_id = client.run("write")["run_id"]
        client.wait(run_id, "approval_requested")
        process = psutil.Process(server.process.pid)
        before = process.num_fds()
        watchers = [Watcher(run_id=run_id) for _ in range(STREAMS)]
        gone = threading.Event()
        watching = [pool.submit(each.read, crowd, cut=lambda *_: gone.is_set()) for each in watchers]
        until(
            lambda: all(each.messages[-1:] and each.messages[-1][1] == "approval_requested" for each in watchers),
            "all watch",
        )
        connections = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'plm_app' AND datname = current_database()"
        with closing(server.database()) as books:
            assert books.execute(connections).fetchone()[0] < STREAMS / 2
        assert client.finished(client.run("echo")["run_id"])["state"] == "succeeded"
        gone.set()
        _append(server, run_id, "the last that these see")
        assert [each.result() for each in watching] == [False] * STREAMS
        until(lambda: process.num_fds() <= before + POOLED, "the streams' connections are closed")
        watching = [pool.submit(each.read, crowd) for each in watchers]
        assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 200
        assert [each.result() for each in watching] == [True] * STREAMS
        stored = _stored(server, run_id)
        assert [each.messages == stored for each in watchers] == [True] * STREAMS


@contextmanager
def _half_closing_proxy(url: str, *, side: str, after: Iterator[int]) -> Iterator[str]:
    """Passes one request a connection on; after some bytes of the answer it sends no more to one of the two sides."""
    upstream = httpx.URL(url)

    def serve(client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection((upstream.host, upstream.port)) as server:
            server.sendall(client.recv(65536))
            left = next(after)
            while left > 0 and (data := server.recv(left)):
                client.sendall(data)
                left -= len(data)
            if side == "client":
                client.shutdown(socket.SHUT_WR)
                client.recv(1)  # until the client has gone; the server goes on sending to nobody
                return
            server.shutdown(socket.SHUT_WR)
            while data := server.recv(65536):
                client.sendall(data)

    def accept() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                pool.submit(serve, listener.accept()[0])

    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = pool.submit(accept)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.result()


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_proxy_that_half_closes_costs_no_event(platform: Any, client: Any, gate: Any, side: str) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    _append(platform, run_id, *range(20))
    watcher, lengths = Watcher(run_id=run_id), _partial_reads(7)
    with _half_closing_proxy(platform.url, side=side, after=lengths) as url:
        through = platform.client()
        through.base_url, through.headers["Connection"] = url, "close"
        while not watcher.ended:
            watcher.read(through)
            if len(watcher.messages) > 10:
                gate.open()
    assert watcher.messages == _stored(platform, run_id)
