"""The host's end of a supervisor: start it, have it fork workers, hear of their deaths, and see that nothing stays."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.control_group import ControlGroup
from plugin_substrate.deaths import WorkerExit
from plugin_substrate.errors import PluginFatalError, ResourceShortfall
from plugin_substrate.log_pipe import LOG_TAIL_LINES, LogPipe
from plugin_substrate.sweep import new_mark, put_mark, sweep_dead_hosts, sweep_supervisor
from plugin_substrate.worker.first_order import MAX_MESSAGE_BYTES
from plugin_substrate.worker.isolation import IsolationProfile, profile_to_json
from plugin_substrate.worker.own_user import uid_of

WORKER_MAIN = Path(__file__).parent / "worker" / "__main__.py"

_SOCKET_BUFFER_BYTES = 1 << 20
_CLOSE_SECONDS = 5.0

_logger = logging.getLogger(__name__)


def interpreter_command(python: str, *arguments: str) -> list[str]:
    """Return the command that runs our files by path: isolated, without site, never writing bytecode beside them."""
    return [python, "-I", "-S", "-B", str(WORKER_MAIN), *arguments]


def bubblewrap_program() -> str | None:
    """Return the path of bubblewrap, None where it is not installed, or not in a folder that PATH has in full."""
    found = shutil.which("bwrap") if sys.platform == "linux" else None
    return found if found is not None and Path(found).is_absolute() else None


@dataclass(kw_only=True)
class WorkerProcess:
    """A forked worker: its socket, its log pipe's read end, and a future of its end.

    ``number`` is its name with its supervisor. ``wake_reaper`` is called when it is dead: who has to reap it, and to
    kill what it left, may have been stopped.
    """

    connection: socket.socket
    log_descriptor: int
    pid: int
    pidfd: int
    exit: asyncio.Future[WorkerExit]
    number: int = 0
    wake_reaper: Callable[[], object] = lambda: None

    @property
    def ended(self) -> bool:
        """Whether the process is dead already, even if nobody has heard of it yet. Any thread may ask."""
        pidfd = self.pidfd
        if pidfd < 0:
            return True
        readable = select.poll()  # one for each question: an object shared between threads refuses the second
        readable.register(pidfd, select.POLLIN)
        return bool(readable.poll(0))

    def kill(self) -> None:
        """Kill it through its pidfd, which never means another process."""
        if self.pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Have the event loop call ``callback`` once, when the process is dead; not after `close`."""

        def on_end() -> None:
            loop.remove_reader(self.pidfd)
            self.wake_reaper()
            callback()

        loop = self.exit.get_loop()
        if self.pidfd >= 0:
            loop.add_reader(self.pidfd, on_end)

    def close(self) -> None:
        """Give up the descriptor of the process."""
        if self.pidfd >= 0:
            self.exit.get_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


class Supervisor:
    """One supervisor process and the control socket to it. Belongs to the event loop it was started on."""

    def __init__(self, python: str, plugin_name: str = "") -> None:
        """Start the process. An interpreter that cannot be started is an OSError.

        With ``plugin_name``, and as root, workers run as a user of that plugin's own where it can reach what they need.
        """
        self._uid = uid_of(plugin_name) if plugin_name and os.geteuid() == 0 else None
        self._plugin_name = plugin_name
        self._loop = asyncio.get_running_loop()
        self._counter = 0
        self._mark = new_mark()
        self._may_leave_processes = False  # when it is killed, as far as its workers could have any
        self._group: ControlGroup | None = None  # which then is around it
        self._turn = asyncio.Lock()
        self._spawning: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._ordered: dict[int, asyncio.Future[None]] = {}
        self._asked: dict[int, asyncio.Future[dict[str, float | None]]] = {}
        self._exits: dict[int, asyncio.Future[WorkerExit]] = {}
        self._bubblewrap = bubblewrap_program()
        self.lacks: dict[str, str] = {}  #: layers that its last worker could not be given, and why
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        with ExitStack() as ours:  # given back unless all of it is there
            self._control = self._start(python, ours)
            ours.pop_all()

    def _start(self, python: str, ours: ExitStack) -> socket.socket:
        """Start the process and return our end of its control socket; ``ours`` undoes what has been done."""
        with ExitStack() as theirs:
            control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.enter_context(control)
            theirs.enter_context(remote)
            log_read, log_write = os.pipe()
            theirs.callback(os.close, log_write)
            self._log = LogPipe(log_read, self._lines.append)
            ours.callback(self._log.close)
            self._process = subprocess.Popen(
                interpreter_command(python, "supervise", str(remote.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=log_write,
                stderr=log_write,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                cwd="/",
                pass_fds=(remote.fileno(),),
                start_new_session=True,
            )
        ours.callback(self._process.wait)
        ours.callback(self._process.kill)
        put_mark(self._process.pid, self._mark)  # it forks nothing before it is asked to
        control.setblocking(False)
        self._loop.add_reader(control, self._on_control)
        ours.callback(self._loop.remove_reader, control)
        self._ended = self._watch_end()
        return control

    @property
    def pid(self) -> int:
        """The process id, for display only."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be spoken to: a dead one cannot, even if nobody has heard of its end yet."""
        if self._control.fileno() < 0:
            return False
        hung_up = select.poll()
        hung_up.register(self._control, 0)
        return not hung_up.poll(0)

    @property
    def ended(self) -> bool:
        """Whether the process is dead and reaped."""
        return self._ended.done()

    async def spawn(
        self,
        *,
        env: dict[str, str],
        cwd: Path,
        isolation: IsolationProfile,
        template: bool = False,
        copy_of: WorkerProcess | None = None,
    ) -> WorkerProcess:
        """Fork a worker. A `PluginFatalError` when the supervisor cannot, or is gone.

        With ``template`` what is forked imports a plugin and is then copied: ``copy_of`` names it, and the copy has its
        ``cwd`` and ``isolation``. A template has one copy made of it at a time. As foreign code has a hand in that, it
        may take for ever; who no longer waits must kill the template.
        """
        request: dict[str, Any] = {
            "env": env, "cwd": str(cwd), "isolation": profile_to_json(isolation), "uid": self._uid,
            "bubblewrap": self._bubblewrap,
        }  # fmt: skip
        if template:
            request["template"] = True
        if copy_of is not None:
            request["copy_of"] = copy_of.number
        may_leave_some = isolation.processes or template or copy_of is not None
        if may_leave_some:
            await self._be_ready_to_sweep()
            request["group"] = str(self._group.folder) if self._group is not None else None
        return await self._spawn(request)

    async def _be_ready_to_sweep(self) -> None:
        """Before the first worker that may have processes: end what others left, and group what this one may leave."""
        async with self._turn:
            if self._may_leave_processes or not self.alive:
                return
            self._may_leave_processes = True
            await asyncio.to_thread(self._make_ready)

    def _make_ready(self) -> None:
        sweep_dead_hosts()
        self._group = ControlGroup.for_mark(self._mark)

    async def _spawn(self, request: dict[str, Any]) -> WorkerProcess:
        spawned: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        with ExitStack() as ours, ExitStack() as theirs:
            connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.enter_context(connection)
            theirs.enter_context(remote)
            log_read, log_write = os.pipe()
            ours.callback(os.close, log_read)
            theirs.callback(os.close, log_write)
            ours.callback(_give_up, spawned)
            for end in (connection, remote):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            async with self._turn:  # one request at a time always fits into the socket
                number = self._order(request, spawned, [remote.fileno(), log_write])
                exited = self._exits[number]
                await (self._ordered[number] if "copy_of" in request else spawned)
            pid, pidfd = await spawned
            ours.pop_all()
        return WorkerProcess(
            number=number,
            connection=connection,
            log_descriptor=log_read,
            pid=pid,
            pidfd=pidfd,
            exit=exited,
            wake_reaper=self._wake,
        )

    def _order(self, request: dict[str, Any], spawned: asyncio.Future[tuple[int, int]], descriptors: list[int]) -> int:
        if not self.alive:
            raise PluginFatalError(f"the supervisor is gone: {' | '.join(self._lines) or 'no last words'}")
        self._counter += 1
        number = self._counter
        self._send({"spawn": number, **request}, descriptors)
        self._spawning[number] = spawned
        self._exits[number] = self._loop.create_future()
        if "copy_of" in request:
            self._ordered[number] = self._loop.create_future()
        self._wake()
        return number

    async def stats(self) -> dict[str, float | None]:
        """Return what it says of itself, see `worker.usage.process_stats`; a `PluginFatalError` when it is gone."""
        async with self._turn:
            if not self.alive:
                raise PluginFatalError("the supervisor is gone")
            self._counter += 1
            self._send({"stats": self._counter}, [])
            told: asyncio.Future[dict[str, float | None]] = self._loop.create_future()
            self._asked[self._counter] = told
            self._wake()
        return await told

    async def close(self) -> None:
        """Let the supervisor kill and reap everything below it and exit; kill it if it does not within 5 seconds."""
        self.dismiss()
        try:
            await asyncio.wait_for(asyncio.shield(self._ended), _CLOSE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._ended

    def dismiss(self) -> None:
        """Have no more to do with it: it kills and reaps everything below it and exits in its own time."""
        self._lose_control()
        self._wake()

    def _wake(self) -> None:
        """See that it runs: a plugin of the same user may have stopped it."""
        self._process.send_signal(signal.SIGCONT)

    def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        raw = json.dumps(request).encode()
        if len(raw) > MAX_MESSAGE_BYTES:
            raise PluginFatalError(f"the worker's environment is too large: {len(raw)} of {MAX_MESSAGE_BYTES} bytes")
        try:
            socket.send_fds(self._control, [raw], descriptors)
        except OSError as error:
            self._lose_control()
            raise PluginFatalError(f"the supervisor cannot be reached: {error}") from error

    def _on_control(self) -> None:
        try:
            raw, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            raw, descriptors = b"", []
        if not raw:
            self._lose_control()
            return
        message = json.loads(raw)
        match message:
            case {"spawned": number, "pid": pid, "lacks": lacks}:
                self._note_lack(lacks)
                self._take_worker(self._spawning.pop(number), pid, descriptors)
            case {"ordered": number}:
                _resolve(self._ordered.pop(number), None)
            case {"refused": number, "reason": reason}:
                del self._exits[number]
                if number in self._ordered:
                    _resolve(self._ordered.pop(number), None)
                _resolve(self._spawning.pop(number), PluginFatalError(f"the worker cannot be forked: {reason}"))
            case {"stats": number, "figures": figures}:
                _resolve(self._asked.pop(number), figures)
            case {"exited": number, "returncode": returncode, "excess": excess}:
                shortfall = ResourceShortfall(**excess) if excess else None
                _resolve(self._exits.pop(number), WorkerExit(returncode, shortfall))

    def _note_lack(self, lacks: dict[str, str]) -> None:
        who = f"plugin {self._plugin_name}" if self._plugin_name else "a file plugin"
        for layer, reason in lacks.items():
            if self.lacks.get(layer) != reason:
                _logger.warning("%s runs without the layer %s: %s", who, layer, reason)
        self.lacks = lacks

    def _take_worker(self, spawned: asyncio.Future[tuple[int, int]], pid: int, descriptors: list[int]) -> None:
        if descriptors:
            _resolve(spawned, (pid, descriptors[0]), lambda: os.close(descriptors[0]))
            return
        # The kernel had nowhere to put it. Its socket is closed now, and as nothing was said to it, it ends.
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reason = f"this process already has open all the files it may; RLIMIT_NOFILE is {most}, raise it"
        _resolve(spawned, PluginFatalError(f"the worker cannot be taken over: {reason}"))

    def _lose_control(self) -> None:
        """Close our end; whoever waits for a message learns that none will come."""
        if self._control.fileno() < 0:
            return
        self._loop.remove_reader(self._control)
        self._control.close()
        self._log.drain()
        waiting: list[asyncio.Future[Any]] = [*self._spawning.values(), *self._asked.values()]
        for ordered in self._ordered.values():
            _resolve(ordered, None)
        for future in waiting:
            _resolve(future, PluginFatalError(f"the supervisor died: {' | '.join(self._lines) or 'no last words'}"))
        for exited in self._exits.values():
            _resolve(exited, WorkerExit(None))
        self._spawning.clear()
        self._ordered.clear()
        self._asked.clear()
        self._exits.clear()

    def _watch_end(self) -> asyncio.Future[None]:
        """Reap the supervisor as soon as it ends, so that no zombie waits for somebody to ask."""
        ended: asyncio.Future[None] = self._loop.create_future()
        pidfd = os.pidfd_open(self._process.pid)

        def reap() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            killed = self._process.wait() != 0
            self._lose_control()
            self._log.close()
            if self._group is None and not (killed and self._may_leave_processes):
                _resolve(ended, None)
                return
            swept = self._loop.run_in_executor(None, self._sweep, killed)
            swept.add_done_callback(lambda _: _resolve(ended, None))

        self._loop.add_reader(pidfd, reap)
        return ended

    def _sweep(self, killed: bool) -> None:
        if self._group is not None:
            self._group.end()
        if killed:
            sweep_supervisor(self._mark)


def _resolve(future: asyncio.Future[Any], outcome: Any, otherwise: Callable[[], object] = lambda: None) -> None:
    """Complete a future that may have been cancelled by its waiter; ``otherwise`` then disposes of the outcome."""
    if future.done():
        otherwise()
    elif isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _give_up(spawned: asyncio.Future[tuple[int, int]]) -> None:
    """Wait no longer for a worker, and let go of one that came just when it was no longer waited for."""
    if spawned.done() and not spawned.cancelled() and spawned.exception() is None:
        os.close(spawned.result()[1])
    spawned.cancel()
