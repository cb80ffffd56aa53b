"""One loaded plugin: its worker, brought back when it died, its slots, and the way a call goes through it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from plugin_substrate.errors import (
    CallNotStartedError,
    PluginConfinementError,
    PluginError,
    PluginInputError,
    PluginLoadError,
    PluginNotLoadedError,
    PluginTimeoutError,
    WorkerDiedError,
)
from plugin_substrate.hashing import hash_dict_canonical
from plugin_substrate.interface import DATA_DIR_VARIABLE, CallContext
from plugin_substrate.lifecycle import Supervisor
from plugin_substrate.log_file import LogFile
from plugin_substrate.metadata import CallResult, PluginInstance, PluginMeta
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.switch import Switch
from plugin_substrate.worker.isolation import IsolationProfile


class CancelOutcome(StrEnum):
    """How a request to cancel ended."""

    NOT_RUNNING = "not_running"  #: no such call was in the worker
    COOPERATIVE = "cooperative"  #: the call ended by itself within the grace
    FORCED = "forced"  #: its worker was killed


@dataclass(frozen=True, kw_only=True)
class CallListeners:
    """Whom a call tells what: all but ``before_start`` are called on the event loop and must be quick.

    ``before_start`` is awaited when everything is ready and the frame would be written next; a false answer or an
    exception means that it is not.
    """

    before_start: Callable[[], Awaitable[bool]] | None = None
    on_started: Callable[[], object] | None = None
    on_progress: Callable[[float, str], object] | None = None
    on_usage: Callable[[dict[str, float]], object] | None = None
    on_log: Callable[[str], object] | None = None


@dataclass(frozen=True, kw_only=True)
class InstanceSettings:
    """What an instance is loaded with.

    ``worker_env`` is asked at each start of a worker for the variables its plugin declares, secrets included.
    """

    instance_id: str
    meta: PluginMeta
    config: Mapping[str, Any]
    data_dir: Path
    log_path: Path
    worker_env: Callable[[], Mapping[str, str]] = field(default=dict, repr=False)
    enabled: bool = True
    max_concurrent_requests: int
    grace_seconds: float
    load_timeout: float
    isolation: IsolationProfile
    required_layers: tuple[str, ...] = ()


class LoadedInstance:
    """A plugin's worker and its calls. Belongs to one event loop."""

    def __init__(self, settings: InstanceSettings, supervisor: Callable[[], Supervisor]) -> None:
        self.settings = settings
        self._supervisor = supervisor
        self.switch = Switch(settings.instance_id, settings.meta.name, enabled=settings.enabled, fire=self._fire)
        self.live_config_schema: Mapping[str, Any] | None = None
        self._log = LogFile(settings.log_path)
        self._created_at = datetime.now(UTC)
        self._last_executed: datetime | None = None
        self._proxy: RemotePluginProxy | None = None
        self._supervisor_pid: int | None = None
        self._slots = asyncio.Semaphore(settings.max_concurrent_requests)
        self._reviving = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None
        self._closed = False
        self._cancels: set[asyncio.Task[CancelOutcome]] = set()

    def view(self) -> PluginInstance:
        """Return what stands now."""
        proxy, settings = self._proxy, self.settings
        alive = proxy is not None and proxy.alive
        return PluginInstance(
            instance_id=settings.instance_id,
            plugin_name=settings.meta.name,
            plugin_version=settings.meta.version,
            config=dict(settings.config),
            config_hash=hash_dict_canonical(settings.config),
            enabled=self.switch.enabled,
            created_at=self._created_at,
            last_executed=self._last_executed,
            max_concurrent_requests=settings.max_concurrent_requests,
            running_calls=len(proxy.calls) if proxy else 0,
            alive=alive,
            pid=proxy.pid if proxy and alive else None,
            supervisor_pid=self._supervisor_pid if alive else None,
            python_version=proxy.python_version if proxy else "",
            layers=proxy.layers if proxy else (),
        )

    async def worker(self) -> RemotePluginProxy:
        """Return the live worker, starting one when there is none; a `PluginLoadError` leaves no process."""
        async with self._reviving:
            if self._closed:
                raise PluginNotLoadedError(f"{self.settings.instance_id!r} is being unloaded")
            if self._proxy is None or not self._proxy.alive:
                self._proxy = await self._start()
            return self._proxy

    async def execute(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], context: CallContext, listeners: CallListeners
    ) -> CallResult:
        """Carry out one call, once. Before it is sent everything that can fail has been tried."""
        self.switch.enter()
        try:
            await self._slots.acquire()
        except BaseException:
            self.switch.leave()
            raise
        pending = PendingCall(
            context,
            on_progress=listeners.on_progress,
            on_usage=listeners.on_usage,
            on_log=listeners.on_log,
        )
        pending.value.add_done_callback(self._end_of_call)  # the slot is held until the worker is free
        try:
            await self._prepare_and_send(pending, args, kwargs, listeners)
        except BaseException:
            pending.value.cancel()
            raise
        started = time.monotonic()
        try:
            value = await self._outcome(pending)
        except asyncio.CancelledError:
            self._cancel_soon(context.call_id)
            raise
        return CallResult(
            value=value,
            usage=dict(pending.usage),
            logs=tuple(pending.logs),
            duration_seconds=time.monotonic() - started,
        )

    def _end_of_call(self, _: asyncio.Future[Any]) -> None:
        self._slots.release()
        self.switch.leave()

    async def ask(
        self,
        verb: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_progress: Callable[[float, str], object] | None = None,
    ) -> Any:
        """Ask something of the plugin that is no call, in a worker that is started if there is none."""
        proxy = await self.worker()
        return await proxy.ask(verb, arguments, on_progress=on_progress)

    async def kill_worker(self) -> None:
        """End the worker at once; the next call starts another."""
        if self._proxy is not None:
            await self._proxy.kill()

    async def restart(self, settings: InstanceSettings | None = None) -> None:
        """Replace the worker, taking over other settings; the number of slots stays.

        When the new one does not come up, a `PluginLoadError` says why, the settings stay as they were, and the next
        call starts a worker with them.
        """
        async with self._reviving:
            if self._closed:
                raise PluginNotLoadedError(f"{self.settings.instance_id!r} is being unloaded")
            if self._proxy is not None:
                await self._proxy.unload(self.settings.grace_seconds)
            before, self.settings = self.settings, settings or self.settings
            try:
                self._proxy = await self._start()
            except BaseException:
                self.settings = before
                raise

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Have the plugin take over a configuration while no call runs; calls that come meanwhile wait.

        When it fails the worker, in nobody knows what state, is ended, and the next starts with the old configuration.
        """
        settings = replace(self.settings, config=config)
        async with self._without_calls():
            proxy = self._proxy
            if proxy is None or not proxy.alive:
                await self.restart(settings)
                return
            try:
                await proxy.ask("reconfigure", {"old": dict(self.settings.config), "new": dict(config)})
            except BaseException:
                await proxy.kill()
                raise
            self.settings = settings

    @asynccontextmanager
    async def _without_calls(self) -> AsyncIterator[None]:
        async with self._changing:  # two that each hold some of the slots would wait for ever
            held = 0
            try:
                for _ in range(self.settings.max_concurrent_requests):
                    await self._slots.acquire()
                    held += 1
                yield
            finally:
                for _ in range(held):
                    self._slots.release()

    async def _fire(self, hook: str) -> None:
        """Send a hook to the worker that is there; one that is not has nothing to be told."""
        if self._proxy is not None and self._proxy.alive:
            await self._proxy.ask(hook)

    async def cancel(self, call_id: str) -> CancelOutcome:
        """Ask a call to end and kill the worker when it has not within the grace."""
        proxy = self._proxy
        call = proxy.calls.get(call_id) if proxy is not None else None
        if proxy is None or call is None:
            return CancelOutcome.NOT_RUNNING
        if proxy.alive:
            proxy.request_cancel(call_id)
        await asyncio.wait({call.value}, timeout=self.settings.grace_seconds)
        if call.value.done():
            return CancelOutcome.COOPERATIVE
        call.forced = True
        await proxy.kill()
        return CancelOutcome.FORCED

    async def close(self) -> None:
        """Unload: no new calls, cleanup in the plugin, and in any case the end of its process."""
        self._closed = True
        if self._patience is not None:
            self._patience.reschedule(0)  # what is being loaded now is no longer wanted
        async with self._reviving:
            if self._proxy is not None:
                await self._proxy.unload(self.settings.grace_seconds)
        if self._cancels:
            await asyncio.wait(self._cancels)
        self._log.close()

    async def _prepare_and_send(
        self, pending: PendingCall, args: tuple[Any, ...], kwargs: dict[str, Any], listeners: CallListeners
    ) -> None:
        proxy = await self.worker()
        call_id = pending.context.call_id
        if call_id in proxy.calls:
            raise PluginInputError(f"a call with the id {call_id!r} is already running", fields_invalid=["call"])
        frame = proxy.encode_call(pending.context, args, kwargs)
        if pending.context.deadline is not None and pending.context.deadline <= time.time():
            raise PluginTimeoutError(f"call {call_id} was not sent: its deadline has passed", timeout_seconds=0.0)
        await _ask(listeners.before_start, call_id)
        if self._closed or not proxy.alive:
            raise WorkerDiedError("the worker ended before the call was sent", outcome_known=True)
        if listeners.on_started is not None:
            listeners.on_started()
        self._last_executed = datetime.now(UTC)
        proxy.send_call(pending, frame)

    async def _outcome(self, pending: PendingCall) -> Any:
        """Wait for the end of a call, and see to its end at its deadline."""
        deadline = pending.context.deadline
        if deadline is not None:
            remaining = deadline - time.time()
            await asyncio.wait({pending.value}, timeout=max(0.0, remaining))
            if not pending.value.done():
                await self._end_late_call(pending, remaining)
        return await asyncio.shield(pending.value)

    async def _end_late_call(self, pending: PendingCall, seconds: float) -> None:
        """Cancel a call past its deadline; a result that arrives meanwhile is still its result."""
        await asyncio.shield(self._cancel_soon(pending.context.call_id))
        with suppress(PluginError):
            await asyncio.shield(pending.value)
            return
        forced = pending.forced
        raise PluginTimeoutError(
            f"call {pending.context.call_id} passed its deadline after {seconds:.3f} s",
            timeout_seconds=seconds,
            outcome_known=not forced,
        ) from pending.value.exception()

    def _cancel_soon(self, call_id: str) -> asyncio.Task[CancelOutcome]:
        task = asyncio.get_running_loop().create_task(self.cancel(call_id))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)
        return task

    async def _start(self) -> RemotePluginProxy:
        settings, code = self.settings, self.settings.meta.manifest.code
        phase, supervisor, proxy = "spawn", None, None
        try:
            async with asyncio.timeout(settings.load_timeout) as self._patience:
                _prepare_folder(settings.data_dir)
                self._log.start(settings.meta.name, settings.meta.version)
                supervisor = self._supervisor()
                self._supervisor_pid = supervisor.pid
                process = await supervisor.spawn(
                    env=_environment(settings), cwd=settings.data_dir, isolation=settings.isolation
                )
                proxy = await RemotePluginProxy.connect(process, self._log.line)
                phase = "confine"
                await proxy.require(settings.required_layers)
                phase = "load"
                await proxy.load(code.module, code.class_name, settings.config, settings.max_concurrent_requests)
        except BaseException as error:
            if proxy is not None:
                await proxy.kill()
            elif supervisor is not None and isinstance(error, TimeoutError) and not self._closed:
                supervisor.dismiss()  # it does not answer
            self._log.close()
            if isinstance(error, PluginError | OSError):
                raise self._load_error(error, phase, proxy) from error.__cause__ or error
            raise
        finally:
            self._patience = None
        return proxy

    def _load_error(self, error: Exception, phase: str, proxy: RemotePluginProxy | None) -> PluginError:
        name = self.settings.meta.name
        if self._closed:
            return PluginNotLoadedError(f"{self.settings.instance_id!r} was unloaded while it was being loaded")
        if isinstance(error, PluginConfinementError):
            error.plugin_name, error.phase = name, phase
            return error
        if isinstance(error, PluginLoadError):
            phase = error.phase
        if isinstance(error, TimeoutError):
            error = PluginTimeoutError(f"not ready after {self.settings.load_timeout} s")
        tail = proxy.log_tail[-20:] if proxy is not None else ()
        return PluginLoadError(
            f"plugin {name!r} failed in phase {phase!r}: {error}", plugin_name=name, phase=phase, log_tail=tail
        )


async def _ask(before_start: Callable[[], Awaitable[bool]] | None, call_id: str) -> None:
    if before_start is None:
        return
    try:
        allowed = await before_start()
    except Exception as error:
        raise CallNotStartedError(f"call {call_id} was not sent: {type(error).__name__}: {error}") from error
    if not allowed:
        raise CallNotStartedError(f"call {call_id} was not sent: it is no longer allowed")


def _prepare_folder(folder: Path) -> None:
    """Make what is missing of a plugin's folder; plugin code may have put anything in its place."""
    for place in (folder, folder / "tmp"):
        if place.is_symlink():
            raise NotADirectoryError(f"{place} is a link, not a folder")
        place.mkdir(parents=True, exist_ok=True, mode=0o700)


def _environment(settings: InstanceSettings) -> dict[str, str]:
    """Return the worker's whole environment: nothing of the host's but what is listed here."""
    install = settings.meta.manifest.install
    return {
        "PATH": os.pathsep.join([str(Path(install.python_path).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        "HOME": str(settings.data_dir),
        "TMPDIR": str(settings.data_dir / "tmp"),
        **settings.worker_env(),
        DATA_DIR_VARIABLE: str(settings.data_dir),
    }
