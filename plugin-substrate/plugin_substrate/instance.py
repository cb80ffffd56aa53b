"""One loaded plugin: its workers, and the way a call goes through one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from plugin_substrate.before_sending import ask_before, in_time, not_sent
from plugin_substrate.call_books import CallBooks
from plugin_substrate.call_message import CallArguments
from plugin_substrate.errors import (
    PluginError,
    PluginInputError,
    PluginNotLoadedError,
    PluginTimeoutError,
)
from plugin_substrate.gate import Gate
from plugin_substrate.home_loop import Begun
from plugin_substrate.interface import CallContext
from plugin_substrate.lifecycle import Supervisor
from plugin_substrate.metadata import CallResult, CallTerms, PluginInstance
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.recorder import Payer
from plugin_substrate.stores.empirical import compute_config_hash
from plugin_substrate.switch import Switch
from plugin_substrate.templates import TemplateTable
from plugin_substrate.tenant_worker import InstanceSettings, Seat, TenantWorker
from plugin_substrate.worker.messages import Message
from plugin_substrate.worker_pool import WorkerPool

Pending = TypeVar("Pending", bound=PendingCall)
#: A hook that takes longer is logged and left to itself.
_HOOK_SECONDS = 30.0


class CancelOutcome(StrEnum):
    """How a request to cancel ended."""

    NOT_RUNNING = "not_running"  #: no such call was in the worker
    COOPERATIVE = "cooperative"  #: the call ended by itself within the grace
    FORCED = "forced"  #: its worker was killed


class CallListeners(NamedTuple):
    """Whom a call tells what: all but ``before_start`` are called on the event loop and must be quick.

    ``before_start`` is awaited when everything is ready and the frame would be written next; a false answer or an
    exception means that it is not.
    """

    before_start: Callable[[], Awaitable[bool]] | None = None
    on_started: Callable[[], object] | None = None
    on_progress: Callable[[float, str], object] | None = None
    on_usage: Callable[[dict[str, float]], object] | None = None
    on_log: Callable[[str], object] | None = None

    def pending(self, kind: type[Pending], context: CallContext) -> Pending:
        """Return a call that is about to be sent, and tells these what becomes of it."""
        return kind(context, on_progress=self.on_progress, on_usage=self.on_usage, on_log=self.on_log)


class LoadedInstance:
    """A plugin's workers and their calls. Belongs to one event loop."""

    def __init__(
        self,
        settings: InstanceSettings,
        supervisor: Callable[[], Supervisor],
        templates: TemplateTable,
        books: CallBooks,
    ) -> None:
        self.settings = settings
        self._books = books
        self._payer = _payer(settings)
        self.workers = WorkerPool(
            settings.instance_id,
            lambda seat: TenantWorker(lambda: self.settings, seat, supervisor, templates),
            settings.max_workers,
        )
        self.switch = Switch(settings.instance_id, settings.meta.name, enabled=settings.enabled, fire=self._fire)
        self.live_config_schema: Mapping[str, Any] | None = None
        self.keeping = asyncio.Lock()  # held while its state is kept, so that the last state is kept last
        self._created_at = datetime.now(UTC)
        self._last_executed: datetime | None = None
        self._gate = Gate()
        self._restarting = asyncio.Lock()
        self._closed = False
        self._calls: dict[str, tuple[PendingCall, RemotePluginProxy]] = {}  # those sent, and about to be
        self._cancels: set[asyncio.Task[CancelOutcome]] = set()

    def view(self) -> PluginInstance:
        """Return what stands now; the single values are those of the worker used last."""
        settings = self.settings
        workers = sorted(self.workers, key=lambda worker: (worker.alive, worker.last_used), reverse=True)
        views = tuple(worker.view() for worker in workers)
        latest = views[0] if views else None
        return PluginInstance(
            instance_id=settings.instance_id,
            plugin_name=settings.meta.name,
            plugin_version=settings.meta.version,
            config=dict(settings.config),
            enabled=self.switch.enabled,
            created_at=self._created_at,
            last_executed=self._last_executed,
            max_concurrent_requests=settings.max_concurrent_requests,
            running_calls=sum(view.running_calls for view in views),
            alive=any(view.alive for view in views),
            pid=latest.pid if latest else None,
            supervisor_pid=latest.supervisor_pid if latest else None,
            python_version=latest.python_version if latest else "",
            layers=latest.layers if latest else (),
            stateless=settings.meta.stateless,
            idempotent=settings.meta.idempotent,
            resources=settings.meta.resources,
            workers=views,
        )

    def terms(self) -> CallTerms:
        """Return what stands now of what a queue of calls must know, without a look at the workers."""
        meta = self.settings.meta
        return CallTerms(
            instance_id=self.settings.instance_id,
            plugin_name=meta.name,
            enabled=self.switch.enabled,
            stateless=meta.stateless,
            idempotent=meta.idempotent,
            resources=meta.resources,
        )

    async def load(self, tenant_id: str = "") -> None:
        """Start the worker of a tenant; a `PluginLoadError` leaves no process."""
        async with self._held(tenant_id) as worker:
            await worker.ready()

    async def execute(self, arguments: CallArguments, context: CallContext, listeners: CallListeners) -> CallResult:
        """Carry out one call, once. Before it is sent everything that can fail has been tried."""
        pending = self._begin_at_once(arguments, context, listeners)
        if pending is None:
            pending = await self._start(PendingCall, arguments, context, listeners)
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

    async def stream(
        self, arguments: CallArguments, context: CallContext, listeners: CallListeners
    ) -> AsyncGenerator[list[Any], None]:
        """Carry out one streaming call, once, and yield its chunks in batches; closing the iterator ends the call."""
        pending = await self._start(PendingStream, arguments, context, listeners)
        seconds = None if context.deadline is None else context.deadline - time.time()
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._end_late, pending)
        try:
            while batch := await pending.next_batch():
                yield batch
        except PluginError as error:
            if pending.late and seconds is not None:
                raise self._too_late(pending, seconds) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if not pending.done:
                await asyncio.shield(self._cancel_soon(context.call_id))

    def _end_late(self, pending: PendingStream) -> None:
        pending.late = True
        self._cancel_soon(pending.context.call_id)

    async def _start(
        self,
        kind: type[Pending],
        arguments: CallArguments,
        context: CallContext,
        listeners: CallListeners,
    ) -> Pending:
        """Wait for a worker and a slot, and send; the slot is held until the worker is free again."""
        worker = await in_time(context, self._enter(context))
        pending = listeners.pending(kind, context)
        pending.when_done(lambda: self._leave(worker, pending))
        try:
            await self._prepare_and_send(worker, pending, arguments, listeners)
        except BaseException:
            pending.fail(asyncio.CancelledError())
            raise
        return pending

    def begin(self, arguments: CallArguments, context: CallContext, listeners: CallListeners) -> Begun[Any] | None:
        """Send a call for which nothing has to be waited for, or return None; its value comes as `execute` gives it."""
        if arguments.any_files:
            return None
        pending = self._begin_at_once(arguments, context, listeners)
        return None if pending is None else Begun(pending, lambda: self._cancel_soon(context.call_id))

    def _begin_at_once(
        self, arguments: CallArguments, context: CallContext, listeners: CallListeners
    ) -> PendingCall | None:
        """Do what `_start` does in one step, where nothing has to be waited for; most calls are such."""
        if listeners.before_start is not None or context.deadline is not None:
            return None
        if not (self.switch.enabled and self._gate.is_open) or self._books.has_to_admit(self.settings.meta):
            return None
        worker = self.workers.find(self._seat_of(context))
        proxy = worker.ready_now if worker is not None else None
        if worker is None or proxy is None or worker.slots.locked():
            return None
        message = arguments.small_message(context)
        if message is None:
            return None
        self.switch.enter()
        self._gate.enter_at_once()
        self.workers.hold(worker)
        worker.take_free_slot()
        pending = listeners.pending(PendingCall, context)
        pending.when_done(lambda: self._leave(worker, pending))
        try:
            self._announce(pending, proxy)
            self._send(worker, proxy, pending, message, listeners.on_started)
        except BaseException:
            pending.fail(asyncio.CancelledError())
            raise
        return pending

    async def ask(
        self,
        verb: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_progress: Callable[[float, str], object] | None = None,
        tenant_id: str | None = None,
    ) -> Any:
        """Ask something of the plugin that is no call, in a tenant's worker, which is started if need be.

        Without a tenant any worker is asked that is there, for what does not depend on whom it serves.
        """
        if tenant_id is None:
            latest = max(self.workers, key=lambda worker: (worker.alive, worker.last_used), default=None)
            tenant_id = latest.seat.tenant_id if latest else ""
        async with self._held(tenant_id) as worker:
            proxy = await worker.ready()
            return await proxy.ask(verb, arguments, on_progress=on_progress)

    async def kill_worker(self, tenant_id: str = "") -> None:
        """End the worker of a tenant at once; the next call starts another."""
        worker = self.worker_of(tenant_id)
        if worker is not None and worker.proxy is not None:
            await worker.proxy.kill()

    def worker_of(self, tenant_id: str) -> TenantWorker | None:
        """Return the worker that serves a tenant, if there is one."""
        return self.workers.find(self._seat(tenant_id))

    async def restart(self, config: Mapping[str, Any] | None = None) -> None:
        """Replace the workers, with another configuration if one is given; one restart at a time.

        One is started at once, the others at their next call. When it does not come up, a `PluginLoadError` says why,
        the configuration stays as it was, and the next call starts a worker with it.
        """
        async with self._restarting:
            if self._closed:
                raise PluginNotLoadedError(f"{self.settings.instance_id!r} is being unloaded")
            await self._restart(self.settings if config is None else replace(self.settings, config=config))

    async def _restart(self, settings: InstanceSettings) -> None:
        before = self.settings
        self._take_over(settings)
        latest = max(self.workers, key=lambda worker: worker.last_used, default=None)
        try:
            await self.workers.stop_processes()
            async with self._held(latest.seat.tenant_id if latest else "") as worker:
                await worker.ready()
        except BaseException:
            self._take_over(before)
            await self.workers.stop_processes()  # another tenant's may have come up with the new settings
            raise

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Have the plugin take over a configuration while no call runs; calls that come meanwhile wait.

        When it fails in one worker all of them, in nobody knows what state, are ended, and the next starts with the
        old configuration.
        """
        settings = replace(self.settings, config=config)
        async with self._gate.shut():
            proxies = self._live_proxies()
            if not proxies:
                await self.restart(config)
                return
            change = {"old": dict(self.settings.config), "new": dict(config)}
            try:
                for proxy in proxies:
                    await proxy.ask("reconfigure", change)
            except BaseException:
                await asyncio.gather(*(proxy.kill() for proxy in proxies))
                raise
            self._take_over(settings)
            await self._stop_all_but(proxies)

    async def _stop_all_but(self, told: list[RemotePluginProxy]) -> None:
        """End what came up with the settings before, while others were told the new ones."""
        untold = [worker for worker in self.workers if not (worker.proxy in told and worker.alive)]
        await asyncio.gather(*(worker.stop_process() for worker in untold))

    def _take_over(self, settings: InstanceSettings) -> None:
        self.settings = settings
        self._payer = _payer(settings)

    async def _fire(self, hook: str) -> None:
        """Send a hook to the workers that are there; one that is not has nothing to be told."""
        for proxy in self._live_proxies():
            async with asyncio.timeout(_HOOK_SECONDS):
                await proxy.ask(hook)

    def _live_proxies(self) -> list[RemotePluginProxy]:
        return [worker.proxy for worker in self.workers if worker.proxy is not None and worker.proxy.alive]

    async def cancel(self, call_id: str, on_force: Callable[[], object] | None = None) -> CancelOutcome:
        """Ask a call to end and kill the worker when it has not within the grace; ``on_force`` hears of that before."""
        call, proxy = self._calls.get(call_id, (None, None))
        if call is None or proxy is None or call_id not in proxy.calls:
            return CancelOutcome.NOT_RUNNING
        if proxy.alive:
            proxy.request_cancel(call_id)
        if await call.wait(self.settings.grace_seconds):
            return CancelOutcome.COOPERATIVE
        call.forced = True
        if on_force is not None:
            on_force()
        await proxy.kill()
        return CancelOutcome.FORCED

    async def close(self) -> None:
        """Unload: no new calls, cleanup in the plugin, and in any case the end of its processes."""
        self._closed = True
        await self.workers.close()
        if self._cancels:
            await asyncio.wait(self._cancels)

    def _seat(self, tenant_id: str) -> Seat:
        """Whose worker serves a tenant. Who names no tenant is a tenant of their own."""
        return Seat("", shared=True) if self.settings.meta.stateless else Seat(tenant_id)

    @asynccontextmanager
    async def _held(self, tenant_id: str) -> AsyncIterator[TenantWorker]:
        """Keep a tenant's worker from being taken away, without one of its slots."""
        worker = await self.workers.admit(self._seat(tenant_id))
        try:
            yield worker
        finally:
            self.workers.leave(worker)

    def _seat_of(self, context: CallContext) -> Seat:
        if context.confidential:
            return Seat(context.tenant_id, run=context.run_id or context.call_id)
        return self._seat(context.tenant_id)

    async def _enter(self, context: CallContext) -> TenantWorker:
        """Wait for a worker of the call's tenant and a free slot in it; whoever got it must `_leave` once."""
        self.switch.enter()
        try:
            await self._gate.enter()
        except BaseException:
            self.switch.leave()
            raise
        try:
            return await self._take_slot(context)
        except BaseException:
            self._gate.leave()
            self.switch.leave()
            raise

    async def _take_slot(self, context: CallContext) -> TenantWorker:
        worker = await self.workers.admit(self._seat_of(context))
        try:
            await worker.slots.acquire()
        except BaseException:
            self.workers.leave(worker)
            raise
        return worker

    def _leave(self, worker: TenantWorker, pending: PendingCall) -> None:
        if self._calls.get(pending.context.call_id, (None,))[0] is pending:
            del self._calls[pending.context.call_id]
        self._books.ended(self._payer, self.settings.meta, pending)
        worker.slots.release()
        self.workers.leave(worker)
        self._gate.leave()
        self.switch.leave()

    async def _prepare_and_send(
        self,
        worker: TenantWorker,
        pending: PendingCall,
        arguments: CallArguments,
        listeners: CallListeners,
    ) -> None:
        if self._books.has_to_admit(self.settings.meta):
            await in_time(pending.context, self._books.admit(self.settings.meta, worker, pending))
        context = pending.context
        proxy = await worker.ready()
        message = await arguments.message(context, stream=isinstance(pending, PendingStream))
        self._announce(pending, proxy)
        if listeners.before_start is not None:
            await ask_before(listeners.before_start, context.call_id)
        if not proxy.alive:  # it may have died in any of the steps that were waited for
            raise not_sent(context.call_id)
        self._send(worker, proxy, pending, message, listeners.on_started)

    def _announce(self, pending: PendingCall, proxy: RemotePluginProxy) -> None:
        """Make a call known under its id before it is sent: a cancel cannot miss it."""
        context = pending.context
        if context.call_id in self._calls:
            raise PluginInputError(
                f"a call with the id {context.call_id!r} is already running", fields_invalid=["call"]
            )
        if context.deadline is not None and context.deadline <= time.time():
            raise PluginTimeoutError(
                f"call {context.call_id} was not sent: its deadline has passed", timeout_seconds=0.0
            )
        self._calls[context.call_id] = pending, proxy

    def _send(
        self,
        worker: TenantWorker,
        proxy: RemotePluginProxy,
        pending: PendingCall,
        message: Message,
        on_started: Callable[[], object] | None = None,
    ) -> None:
        if self._closed:
            raise not_sent(pending.context.call_id)
        if on_started is not None:
            on_started()
        self._last_executed = datetime.now(UTC)
        self._books.sent(self.settings.meta, worker, pending)
        proxy.send_call(pending, message)

    async def _outcome(self, pending: PendingCall) -> Any:
        """Wait for the end of a call, and see to its end at its deadline."""
        deadline = pending.context.deadline
        if deadline is not None:
            remaining = deadline - time.time()
            if not await pending.wait(max(0.0, remaining)):
                await self._end_late_call(pending, remaining)
        return await pending.outcome()

    async def _end_late_call(self, pending: PendingCall, seconds: float) -> None:
        """Cancel a call past its deadline; a result that arrives meanwhile is still its result."""
        await asyncio.shield(self._cancel_soon(pending.context.call_id))
        with suppress(PluginError):
            await pending.outcome()
            return
        raise self._too_late(pending, seconds) from pending.error

    def _too_late(self, pending: PendingCall, seconds: float) -> PluginTimeoutError:
        return PluginTimeoutError(
            f"call {pending.context.call_id} passed its deadline after {seconds:.3f} s",
            timeout_seconds=seconds,
            outcome_known=not pending.forced,
        )

    def _cancel_soon(self, call_id: str) -> asyncio.Task[CancelOutcome]:
        task = asyncio.get_running_loop().create_task(self.cancel(call_id))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)
        return task


def _payer(settings: InstanceSettings) -> Payer:
    return Payer(
        plugin_name=settings.meta.name,
        instance_id=settings.instance_id,
        config_hash=compute_config_hash(settings.config),
    )
