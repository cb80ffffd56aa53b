"""One worker of an instance: the process that serves one tenant, started, brought back when it died, and ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from plugin_substrate.errors import (
    PluginConfinementError,
    PluginError,
    PluginLoadError,
    PluginNotLoadedError,
    PluginTimeoutError,
)
from plugin_substrate.lifecycle import Supervisor, WorkerProcess
from plugin_substrate.log_file import LogFile
from plugin_substrate.metadata import PluginMeta, WorkerView
from plugin_substrate.process_tree import CpuClock
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.removal import remove_tree
from plugin_substrate.revival import Revival, Reviver
from plugin_substrate.templates import Template, TemplateKey, TemplateTable
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker_folder import (
    SHARED_FOLDER,
    clear_dead_runs,
    new_run_folder,
    prepare_folder,
    tenant_folder,
    tenant_log,
    worker_environment,
)


@dataclass(frozen=True, kw_only=True)
class InstanceSettings:
    """What an instance is loaded with. ``data_dir`` holds a folder for each of its workers, ``log_path`` names a log.

    ``worker_env`` is asked at each start of a worker for the variables its plugin declares, secrets included; with the
    tenant that it serves, an empty text for one that serves nobody in particular.
    """

    instance_id: str
    meta: PluginMeta
    config: Mapping[str, Any]
    data_dir: Path
    log_path: Path
    worker_env: Callable[[str], Mapping[str, str]] = field(default=lambda _: {}, repr=False)
    enabled: bool = True
    max_concurrent_requests: int
    max_workers: int
    grace_seconds: float
    load_timeout: float
    revive: Revival = Revival.ON_CALL
    isolation: IsolationProfile
    required_layers: tuple[str, ...] = ()
    models_dir: Path | None = None


class Seat(NamedTuple):
    """Whom a worker serves: a tenant (all of them when the plugin is stateless), or one confidential run of it."""

    tenant_id: str
    run: str = ""
    shared: bool = False

    @property
    def folder(self) -> str:
        """The name of the folder it works in; a confidential run has one of its own, see `new_run_folder`."""
        return SHARED_FOLDER if self.shared else tenant_folder(self.tenant_id)


class TenantWorker:
    """A worker process and its slots. Belongs to one event loop.

    ``holders`` counts the calls that run in it or wait for one of its slots; while it is not zero, nobody takes the
    worker away.
    """

    def __init__(
        self,
        settings: Callable[[], InstanceSettings],
        seat: Seat,
        supervisor: Callable[[], Supervisor],
        templates: TemplateTable,
    ) -> None:
        """``settings`` is asked at each start of a process."""
        self.seat = seat
        self.slots = asyncio.Semaphore(settings().max_concurrent_requests)
        self.holders = 0
        self.last_used = time.monotonic()
        self.cpu_clock = CpuClock()
        self._settings = settings
        self._supervisor = supervisor
        self._served_by: Supervisor | None = None
        self._templates = templates
        self._copied_from: tuple[TemplateKey, Template] | None = None
        self._proxy: RemotePluginProxy | None = None
        self._log = LogFile(settings().log_path if seat.shared else tenant_log(settings().log_path, seat.tenant_id))
        self._reviving = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None
        self._folder_name = new_run_folder() if seat.run else seat.folder
        self._closed = False
        self._reviver = Reviver(self.ready) if settings().revive is Revival.AT_ONCE else None

    @property
    def proxy(self) -> RemotePluginProxy | None:
        """The process it has or had last, None before the first."""
        return self._proxy

    @property
    def closed(self) -> bool:
        """Whether its end was ordered."""
        return self._closed

    @property
    def alive(self) -> bool:
        """Whether its process can be called."""
        return self._proxy is not None and self._proxy.alive

    @property
    def ready_now(self) -> RemotePluginProxy | None:
        """The live process, None when it is not there or is being replaced: see `ready`."""
        return self._proxy if self._proxy is not None and self._proxy.alive and not self._reviving.locked() else None

    def take_free_slot(self) -> None:
        """Take a slot where ``slots`` are not locked, which is where that takes no waiting."""
        with suppress(StopIteration):
            self.slots.acquire().send(None)
            raise AssertionError("a semaphore that is not locked has made its taker wait")

    async def supervisor_stats(self) -> Mapping[str, Any]:
        """Ask the supervisor what it has used; nothing when there is none."""
        return {} if self._served_by is None else await self._served_by.stats()

    def view(self) -> WorkerView:
        """Return what stands now."""
        proxy, alive = self._proxy, self.alive
        return WorkerView(
            tenant_id=self.seat.tenant_id,
            shared=self.seat.shared,
            alive=alive,
            pid=proxy.pid if proxy and alive else None,
            supervisor_pid=self._served_by.pid if self._served_by and alive else None,
            running_calls=len(proxy.calls) if proxy else 0,
            python_version=proxy.python_version if proxy else "",
            layers=proxy.layers if proxy else (),
        )

    async def ready(self) -> RemotePluginProxy:
        """Return the live process, starting one when there is none; a `PluginLoadError` leaves no process."""
        proxy = self.ready_now
        if proxy is not None:
            return proxy
        async with self._reviving:
            if self._closed:
                raise PluginNotLoadedError(f"{self._settings().instance_id!r} is being unloaded")
            if self._proxy is None or not self._proxy.alive:
                self._proxy = await self._start()
                self._watch(self._proxy)
            return self._proxy

    def _watch(self, proxy: RemotePluginProxy) -> None:
        if self._reviver is not None:
            self._reviver.born()
            proxy.when_gone(self._on_gone)

    def _on_gone(self) -> None:
        if self._reviver is not None and not self._reviving.locked():  # else it was meant to go
            self._reviver.died()

    async def stop_process(self) -> None:
        """Let the plugin clean up and end its process; the next call starts another."""
        async with self._reviving:
            if self._proxy is not None:
                await self._proxy.unload(self._settings().grace_seconds)

    async def close(self) -> None:
        """End it: no new process, cleanup in the plugin, and in any case the end of its process."""
        self._closed = True
        if self._reviver is not None:
            self._reviver.stop()
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(0)  # what is being loaded now is no longer wanted
        await self.stop_process()
        await self._leave_template()
        self._log.close()
        if self.seat.run:
            await asyncio.to_thread(remove_tree, self._settings().data_dir / self._folder_name)

    async def _start(self) -> RemotePluginProxy:
        settings = self._settings()
        code, folder = settings.meta.manifest.code, settings.data_dir / self._folder_name
        phase = "preload" if self._is_copied(settings) else "spawn"
        supervisor, proxy = None, None
        try:
            async with asyncio.timeout(settings.load_timeout) as self._patience:
                if self.seat.run:
                    await asyncio.to_thread(clear_dead_runs, settings.data_dir)
                prepare_folder(folder)
                self._log.start(settings.meta.name, settings.meta.version)
                supervisor = self._served_by = self._supervisor()
                process = await self._spawn(supervisor, settings, folder)
                layers = self._template.layers if self._template is not None else ()
                proxy = RemotePluginProxy(process, self._log.line, shared=self.seat.shared, layers=layers)
                phase = "confine"
                await proxy.require(settings.required_layers)
                phase = "load"
                await proxy.load(
                    code.module,
                    code.class_name,
                    settings.config,
                    settings.max_concurrent_requests,
                    on_progress=lambda *_: self._be_patient(settings.load_timeout),
                )
        except BaseException as error:
            self._patience = None  # as it has failed, there is nothing to hurry
            failure = error
            if isinstance(error, PluginError | OSError):
                failure = self._load_error(error, phase, proxy)
            await self._clear_away(error, supervisor, proxy)
            if failure is error:
                raise
            raise failure from error.__cause__ or error
        finally:
            self._patience = None
        return proxy

    async def _clear_away(
        self, error: BaseException, supervisor: Supervisor | None, proxy: RemotePluginProxy | None
    ) -> None:
        """See that a load that failed leaves no process."""
        if proxy is not None:
            await proxy.kill()
        elif supervisor is not None and isinstance(error, TimeoutError) and not self._closed:
            answered = self._template is not None and self._template.began
            if not answered:
                supervisor.dismiss()
        self._log.close()
        await self._leave_template()

    def _is_copied(self, settings: InstanceSettings) -> bool:
        """Whether its process is a copy of a template. A confidential run shares nothing, not even that."""
        return settings.meta.preload and not self.seat.run

    async def _spawn(self, supervisor: Supervisor, settings: InstanceSettings, folder: Path) -> WorkerProcess:
        environment = self._environment(settings, folder, settings.worker_env(self.seat.tenant_id))
        if not self._is_copied(settings):
            return await supervisor.spawn(env=environment, cwd=folder, isolation=settings.isolation)
        template = await self._join_template(settings, folder)
        return await template.copy(
            supervisor,
            environment,
            own_env=self._environment(settings, folder, settings.meta.plain_env),
            required_layers=settings.required_layers,
            on_line=self._log.line,
            on_progress=lambda *_: self._be_patient(settings.load_timeout),
        )

    @property
    def _template(self) -> Template | None:
        return self._copied_from[1] if self._copied_from is not None else None

    async def _join_template(self, settings: InstanceSettings, folder: Path) -> Template:
        install, code = settings.meta.manifest.install, settings.meta.manifest.code
        key = TemplateKey(
            plugin_name=code.name,
            python=install.python_path,
            module=code.module,
            folder=folder,
            isolation=settings.isolation,
        )
        if self._copied_from is None or self._copied_from[0] != key:
            await self._leave_template()
            self._copied_from = key, self._templates.join(key)
        return self._copied_from[1]

    async def _leave_template(self) -> None:
        if self._copied_from is not None:
            (key, _), self._copied_from = self._copied_from, None
            await self._templates.leave(key)

    def _be_patient(self, seconds: float) -> None:
        """Count anew: it is silence that is limited, not the time a load takes."""
        if self._patience is not None and not self._closed and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + seconds)

    def _environment(self, settings: InstanceSettings, folder: Path, declared: Mapping[str, str]) -> dict[str, str]:
        python = settings.meta.manifest.install.python_path
        return worker_environment(
            python, folder, declared, keeps_data=not settings.meta.stateless, models_dir=settings.models_dir
        )

    def _load_error(self, error: Exception, phase: str, proxy: RemotePluginProxy | None) -> PluginError:
        settings = self._settings()
        name = settings.meta.name
        if self._closed:
            return PluginNotLoadedError(f"{settings.instance_id!r} was unloaded while it was being loaded")
        if isinstance(error, PluginConfinementError):
            error.plugin_name, error.phase = name, phase
            return error
        if isinstance(error, PluginLoadError):
            phase = error.phase
        elif phase == "load" and proxy is not None:
            phase = proxy.phase
        lines = proxy.log_tail if proxy is not None else ()
        if proxy is None and self._template is not None:
            lines = self._template.log_tail
        if isinstance(error, TimeoutError):
            error = PluginTimeoutError(f"not ready after {settings.load_timeout} s without progress")
        return PluginLoadError(
            f"plugin {name!r} failed in phase {phase!r}: {error}", plugin_name=name, phase=phase, log_tail=lines[-20:]
        )
