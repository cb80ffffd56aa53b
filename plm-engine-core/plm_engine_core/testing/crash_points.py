"""Named points at every commit boundary and every hand-over, where a test may kill, stop or hold a process.

A point stands before and after every operation of a port that changes something, so that whoever adds an operation adds
its points. The product knows nothing of them: a process that a test starts wraps its ports with `instrumented`, which
asks the test at every crossing whether to go on; the test holds the other end, a `CrashPoints`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socketserver
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from socket import SO_PEERCRED, SOL_SOCKET
from typing import Any, TypeVar
from uuid import UUID

from plm_engine_core.agent_runtime.driver import Driver
from plm_engine_core.agent_runtime.executor import Executor
from plm_engine_core.control_plane.events.signals import Signals
from plm_engine_core.control_plane.identity import AuditSink
from plm_engine_core.control_plane.storage.ports import (
    AdmissionStore,
    ApprovalStore,
    Delivery,
    HaltStore,
    RunStore,
)

PORTS: Mapping[str, type] = {
    "admission": AdmissionStore,
    "approvals": ApprovalStore,
    "audit": AuditSink,
    "delivery": Delivery,
    "driver": Driver,
    "executor": Executor,
    "halts": HaltStore,
    "runs": RunStore,
    "signals": Signals,
}
"""What is wrapped, under the names that the points carry."""

READS = frozenset({
    "abandoned", "ahead", "artifact", "budgets", "comments", "decided_on", "expired", "fetch", "get", "history",
    "list", "mcrc", "met", "now", "orphaned", "scopes", "steps", "unfinished", "unrecorded", "votes",
})  # fmt: skip
"""Operations that change nothing and hand nothing over: no point stands there."""

Reach = Callable[[str, UUID | None], Awaitable[None]]
"""Told of each crossing with the run it concerns, where there is one; the crossing ends when it returns."""

Port = TypeVar("Port")


def crash_points(ports: Mapping[str, type] = PORTS) -> tuple[str, ...]:
    """Every point, as `port.operation.before` and `port.operation.after`."""
    return tuple(
        f"{name}.{operation}.{side}"
        for name, port in sorted(ports.items())
        for operation in _operations(port)
        for side in ("before", "after")
    )


def instrumented(name: str, kind: type, port: Port, reach: Reach) -> Port:
    """`port`, which asks `reach` before and after every operation of `kind` that has a point.

    An operation that raises has not been crossed to its end: its second point is not reached.
    """
    for operation in _operations(kind):
        setattr(port, operation, _crossing(f"{name}.{operation}", getattr(port, operation), reach))
    return port


def _operations(kind: type) -> list[str]:
    return [
        name
        for name, member in inspect.getmembers(kind, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in READS
    ]


def _crossing(name: str, operation: Callable[..., Awaitable[Any]], reach: Reach) -> Callable[..., Awaitable[Any]]:
    signature = inspect.signature(operation)

    @wraps(operation)
    async def crossed(*args: Any, **kwargs: Any) -> Any:
        run_id = _run_of(signature.bind(*args, **kwargs).arguments)
        await reach(f"{name}.before", run_id)
        answer = await operation(*args, **kwargs)
        await reach(f"{name}.after", run_id)
        return answer

    return crossed


def _run_of(arguments: Mapping[str, Any]) -> UUID | None:
    for name, value in arguments.items():
        found = value if name == "run_id" else getattr(value, "run_id", None)
        if isinstance(found, UUID):
            return found
    return None


def ask_test(socket_path: str) -> Reach:
    """A `Reach` that asks the test behind this socket; when nobody listens there any more, everything goes on."""

    async def reach(point: str, run_id: UUID | None) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(socket_path)
        except OSError:
            return
        try:
            writer.write(json.dumps({"point": point, "run_id": str(run_id) if run_id else None}).encode() + b"\n")
            await reader.readline()
        except OSError:
            return
        finally:
            writer.close()

    return reach


class Trap:
    """A trap at one point; the first process that reaches it is caught there, or killed."""

    def __init__(self, point: str, run_id: UUID | str | None, *, occurrence: int, kill: bool) -> None:
        self.point = point
        self._run_id = str(run_id) if run_id else None
        self._left = occurrence
        self._kill = kill
        self._pid: int | None = None
        self._reached = threading.Event()
        self._released = threading.Event()

    @property
    def has_caught(self) -> bool:
        """Whether a process is, or was, caught here."""
        return self._reached.is_set()

    def reached(self, seconds: float = 60.0) -> int:
        """The process that is caught here, once there is one.

        Raises:
            TimeoutError: in this time nobody came.
        """
        if not self._reached.wait(seconds) or self._pid is None:
            raise TimeoutError(f"in {seconds:g} s no process reached {self.point}")
        return self._pid

    def release(self) -> None:
        """Let the caught process go on, and everybody who comes later."""
        self._released.set()

    def catch(self, point: str, run_id: str | None, pid: int) -> bool:
        """Whether this crossing falls into the trap; only one ever does."""
        if self._pid is not None or self._released.is_set() or point != self.point:
            return False
        if self._run_id is not None and run_id != self._run_id:
            return False
        self._left -= 1
        if self._left:
            return False
        self._pid = pid
        return True

    def keep(self) -> None:
        """Keep the caught process until it is released."""
        if self._kill and self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
        self._reached.set()
        self._released.wait()


class CrashPoints:
    """The test's end: sets traps, and remembers which points were crossed."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.crossed: set[str] = set()
        self._traps: list[Trap] = []
        self._lock = threading.Lock()

    def hold(self, point: str, *, run_id: UUID | str | None = None, occurrence: int = 1) -> Trap:
        """Hold the process that is the next, or `occurrence`-th, to reach `point`, for this run where one is named."""
        return self._set(Trap(point, run_id, occurrence=occurrence, kill=False))

    def kill(self, point: str, *, run_id: UUID | str | None = None, occurrence: int = 1) -> Trap:
        """Kill it there with SIGKILL instead."""
        return self._set(Trap(point, run_id, occurrence=occurrence, kill=True))

    def release_all(self) -> None:
        """Let everybody go on, and forget the traps."""
        with self._lock:
            traps, self._traps = self._traps, []
        for trap in traps:
            trap.release()

    @contextmanager
    def listening(self) -> Iterator[CrashPoints]:
        """Answer the processes for the length of the block."""
        points = self

        class Crossing(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                news = json.loads(self.rfile.readline() or b"null")
                if news is None:
                    return  # its process was killed between connecting and asking
                raw = self.request.getsockopt(SOL_SOCKET, SO_PEERCRED, struct.calcsize("3i"))
                points._cross(news["point"], news["run_id"], struct.unpack("3i", raw)[0])
                try:
                    self.wfile.write(b"go\n")
                except OSError:
                    return  # killed while it was held

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 256

        with Server(str(self.socket_path), Crossing) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self.release_all()
                server.shutdown()
                thread.join()

    def _set(self, trap: Trap) -> Trap:
        with self._lock:
            self._traps.append(trap)
        return trap

    def _cross(self, point: str, run_id: str | None, pid: int) -> None:
        with self._lock:
            self.crossed.add(point)
            caught = next((trap for trap in self._traps if trap.catch(point, run_id, pid)), None)
        if caught is not None:
            caught.keep()
