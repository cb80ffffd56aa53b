"""Loads plugins, calls them and unloads them: the public verbs."""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from plugin_substrate.arguments import with_paths
from plugin_substrate.concurrent_loading import result_keys, run_concurrently
from plugin_substrate.discovery import find_manifests, manifest_folders
from plugin_substrate.errors import PluginConfigError, PluginError
from plugin_substrate.home_loop import HomeLoop
from plugin_substrate.instance import CallListeners, CancelOutcome
from plugin_substrate.instances import InstanceTable
from plugin_substrate.interface import CallContext
from plugin_substrate.manifest import NAME_PATTERN
from plugin_substrate.metadata import CallResult, PluginInstance, PluginLoadSpec, PluginMeta, RejectedManifest
from plugin_substrate.recorder import EmpiricalRecorder
from plugin_substrate.revival import Revival
from plugin_substrate.scheduling import PermissiveScheduler, ResourceScheduler
from plugin_substrate.stores.empirical import (
    EmpiricalResourceRecord,
    EmpiricalResourceStore,
    LocalEmpiricalResourceStore,
)
from plugin_substrate.telemetry import PluginStats, ResourceSnapshot, snapshot_of, worker_stats
from plugin_substrate.tenant_worker import InstanceSettings
from plugin_substrate.worker.isolation import IsolationProfile, parse_required_layers

_logger = logging.getLogger(__name__)

_MAX_ID = 64
_NEW_ID_BYTES = 3


class PluginManager:
    """Owns the plugin processes of one host.

    The asynchronous methods belong to the event loop they are first used on; the synchronous ones hand their work to
    that loop, or to a private one. A call is sent at most once: repeating is the caller's decision. A worker that died
    is replaced at the next call, or at once where the manager is told so.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        search_paths: Sequence[Path] = (),
        grace_seconds: float = 3.0,
        load_timeout: float = 60.0,
        isolation: IsolationProfile | None = None,
        require: Sequence[str] = (),
        max_tenant_workers: int = 16,
        revive: Revival = Revival.ON_CALL,
        scheduler: ResourceScheduler | None = None,
        empirical_store: EmpiricalResourceStore | None = None,
        empirical_tracking: bool = True,
    ) -> None:
        """``isolation`` is what plugins get where nothing else is said; ``require`` names layers all must hold.

        ``max_tenant_workers`` bounds the workers of one instance, and ``revive`` says when dead ones are replaced. A
        ``scheduler`` decides which calls may have what their plugin needs; without one, all may. What calls took goes
        to ``empirical_store``, by default a file below ``data_dir``, unless ``empirical_tracking`` is false.
        """
        problems: list[str] = []
        self._require = parse_required_layers(list(require), "require", problems)
        if problems:
            raise ValueError("; ".join(problems))
        self._data_dir = data_dir.resolve()
        self._folders = manifest_folders(self._data_dir, search_paths)
        self._grace_seconds = grace_seconds
        self._load_timeout = load_timeout
        self._isolation = isolation or IsolationProfile()
        if max_tenant_workers < 1:
            raise ValueError(f"max_tenant_workers must be at least 1, not {max_tenant_workers}")
        self._max_tenant_workers = max_tenant_workers
        self._revive = revive
        self._home = HomeLoop()
        self._discovered: dict[str, PluginMeta] = {}
        self._rejected: tuple[RejectedManifest, ...] = ()
        store = empirical_store or LocalEmpiricalResourceStore(self._data_dir / "empirical_resources.db")
        self._recorder = EmpiricalRecorder(store) if empirical_tracking else None
        self._instances = InstanceTable(scheduler or PermissiveScheduler(), self._recorder)

    # -- finding

    def discover_manifests(self) -> list[PluginMeta]:
        """Read the manifest folders anew and return the plugins found; what is wrong is in `rejected_manifests`."""
        found, rejected = find_manifests(self._folders)
        self._discovered = {meta.name: meta for meta in found}
        self._rejected = tuple(rejected)
        for bad in rejected:
            _logger.error("manifest %s is not used: %s", bad.path, bad.reason)
        return found

    @property
    def rejected_manifests(self) -> tuple[RejectedManifest, ...]:
        """The manifests the last discovery did not take, each with its reason."""
        return self._rejected

    def get_discovered_meta(self, name: str) -> PluginMeta | None:
        """Return what the last discovery found under a name."""
        return self._discovered.get(name)

    def get_instance(self, instance_id: str) -> PluginInstance:
        """Return an instance as it stands; a `PluginNotLoadedError` when there is none."""
        return self._instances.get(instance_id).view()

    def list_instances(self, plugin_name: str | None = None) -> list[PluginInstance]:
        """Return the loaded instances, of one plugin or of all."""
        views = [instance.view() for instance in self._instances.all()]
        return [view for view in views if plugin_name in (None, view.plugin_name)]

    # -- loading

    async def load_plugin_async(
        self,
        meta: PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        instance_id: str | None = None,
        new_instance: bool = False,
        max_concurrent_requests: int = 1,
        tenant_id: str = "",
    ) -> PluginInstance:
        """Start a worker and initialise the plugin in it; an id that is loaded already is returned as it is.

        Concurrent loads of one id give one worker. A `PluginConfigError` is found before anything is started; a
        `PluginLoadError` names plugin, phase and last log lines, and leaves no process (a `PluginConfinementError`: for
        want of a required layer); a `PluginNotLoadedError` tells that it was unloaded meanwhile. Cancelling the
        awaiting task does not stop the load.

        The id is ``instance_id``, or the plugin's name, or with ``new_instance`` the name and six random hex digits.
        The worker that is started is the one of ``tenant_id``; every other tenant's starts at its first call.
        """
        self._home.adopt()
        chosen = self._choose_id(meta, instance_id, new_instance=new_instance)
        if not NAME_PATTERN.fullmatch(chosen):
            raise ValueError(f"instance_id must be 1 to 64 letters, digits, - or _, not {chosen!r}")
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, not {max_concurrent_requests}")
        if chosen not in self._instances:
            await self._instances.load(self._settings(chosen, meta, config, max_concurrent_requests), tenant_id)
        return self.get_instance(chosen)

    def load_plugin(
        self,
        meta: PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        instance_id: str | None = None,
        new_instance: bool = False,
        max_concurrent_requests: int = 1,
    ) -> bool:
        """Load synchronously; a failure is logged and is False. A wrong ``instance_id`` is a ValueError."""
        try:
            self._home.run(
                lambda: self.load_plugin_async(
                    meta,
                    config,
                    instance_id=instance_id,
                    new_instance=new_instance,
                    max_concurrent_requests=max_concurrent_requests,
                )
            )
        except PluginError:
            _logger.exception("plugin %s could not be loaded", meta.name)
            return False
        return True

    async def load_plugins_concurrent(
        self, specs: Sequence[PluginLoadSpec], *, max_concurrency: int | None = None, fail_fast: bool = False
    ) -> dict[str, str | Exception]:
        """Load side by side; return the instance id or the error of each under its `result_keys`.

        With ``fail_fast`` nothing is begun after the first error. Two specs of one instance are a ValueError.
        """
        self._home.adopt()
        work = {key: partial(self._load_spec, spec) for key, spec in zip(result_keys(specs), specs, strict=True)}
        return await run_concurrently(work, max_concurrency=max_concurrency, fail_fast=fail_fast)

    async def unload_plugins_concurrent(
        self, instance_ids: Sequence[str], *, max_concurrency: int | None = None, fail_fast: bool = False
    ) -> dict[str, bool | Exception]:
        """Unload side by side; return under each id whether it was loaded, or the error."""
        self._home.adopt()
        work = {instance_id: partial(self.unload_plugin_async, instance_id) for instance_id in instance_ids}
        return await run_concurrently(work, max_concurrency=max_concurrency, fail_fast=fail_fast)

    async def unload_plugin_async(self, instance_id: str) -> bool:
        """Unload; False when nothing has this id. Calls still running lose their worker after the grace.

        A load in progress is given up. Cancelling the awaiting task does not stop the unloading.
        """
        self._home.adopt()
        return await self._instances.unload(instance_id)

    def unload_plugin(self, instance_id: str) -> bool:
        """Unload synchronously; False when nothing has this id."""
        return self._home.run(lambda: self.unload_plugin_async(instance_id))

    async def unload_all_async(self) -> None:
        """Unload everything; when this returns no process of any plugin is left."""
        self._home.adopt()
        await self._instances.unload_all()
        self._home.release()

    def unload_all(self) -> None:
        """Unload everything, synchronously."""
        self._home.run(self._instances.unload_all)
        self._home.release()

    # -- calling

    async def execute_call(
        self,
        instance_id: str,
        /,
        *args: Any,
        call: CallContext | None = None,
        before_start: Callable[[], Awaitable[bool]] | None = None,
        on_started: Callable[[], object] | None = None,
        on_progress: Callable[[float, str], object] | None = None,
        on_usage: Callable[[dict[str, float]], object] | None = None,
        on_log: Callable[[str], object] | None = None,
        **kwargs: Any,
    ) -> CallResult:
        """Call ``execute(*args, **kwargs)`` of an instance and return value, usage and log lines.

        Waits for a free slot, then for a live worker, then awaits ``before_start``, then sends; ``on_started`` is
        called at that moment. Every failure is a `PluginError`; its ``outcome_known`` is False when the call was sent
        and its effect cannot be known. Cancelling the awaiting task cancels the call.
        """
        self._home.adopt()
        instance = self._instances.get(instance_id)
        context = call or CallContext(call_id=uuid.uuid4().hex)
        args, kwargs = await with_paths(args, kwargs)
        listeners = CallListeners(
            before_start=before_start,
            on_started=on_started,
            on_progress=on_progress,
            on_usage=on_usage,
            on_log=on_log,
        )
        return await instance.execute(args, kwargs, context, listeners)

    async def execute_plugin_async(
        self,
        instance_id: str,
        /,
        *args: Any,
        call: CallContext | None = None,
        on_progress: Callable[[float, str], object] | None = None,
        on_log: Callable[[str], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like `execute_call`, and return the value alone."""
        result = await self.execute_call(
            instance_id, *args, call=call, on_progress=on_progress, on_log=on_log, **kwargs
        )
        return result.value

    def execute_plugin(self, instance_id: str, /, *args: Any, call: CallContext | None = None, **kwargs: Any) -> Any:
        """Like `execute_plugin_async`, synchronously."""
        return self._home.run(lambda: self.execute_plugin_async(instance_id, *args, call=call, **kwargs))

    async def execute_plugin_stream(
        self,
        instance_id: str,
        /,
        *args: Any,
        call: CallContext | None = None,
        on_progress: Callable[[float, str], object] | None = None,
        on_log: Callable[[str], object] | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        """Call ``execute_stream(*args, **kwargs)`` of an instance and yield its chunks as they come.

        A slow reader slows the plugin down: it is never further ahead than 512 chunks or 256 KiB, whichever is less.
        Ending the iteration early ends the plugin's generator; errors are those of `execute_call`, raised after all
        chunks that came before them.
        """
        listeners = CallListeners(on_progress=on_progress, on_log=on_log)
        async with aclosing(self._batches(instance_id, args, kwargs, call, listeners)) as batches:
            async for batch in batches:
                for chunk in batch:
                    yield chunk

    def execute_plugin_stream_sync(
        self, instance_id: str, /, *args: Any, call: CallContext | None = None, **kwargs: Any
    ) -> Generator[Any, None, None]:
        """Like `execute_plugin_stream`, synchronously."""
        batches = self._batches(instance_id, args, kwargs, call, CallListeners())

        async def next_batch() -> list[Any]:
            return await anext(batches, [])

        try:
            while batch := self._home.run(next_batch):
                yield from batch
        finally:
            self._home.run(batches.aclose)

    async def _batches(
        self,
        instance_id: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: CallContext | None,
        listeners: CallListeners,
    ) -> AsyncGenerator[list[Any], None]:
        self._home.adopt()
        instance = self._instances.get(instance_id)
        args, kwargs = await with_paths(args, kwargs)
        context = call or CallContext(call_id=uuid.uuid4().hex)
        async with aclosing(instance.stream(args, kwargs, context, listeners)) as batches:
            async for batch in batches:
                yield batch

    async def cancel_call(self, instance_id: str, call_id: str) -> CancelOutcome:
        """Ask a call to end; after the grace its worker is killed, and with it every other call in that worker."""
        self._home.adopt()
        return await self._instances.get(instance_id).cancel(call_id)

    # -- figures

    async def get_plugin_stats_async(self, instance_id: str) -> PluginStats:
        """Measure an instance now: its processes from outside, and what each worker says of itself.

        A `PluginNotLoadedError` when there is none. A worker that does not answer within a second, being deep in C
        code, is measured from outside alone.
        """
        self._home.adopt()
        workers = self._instances.get(instance_id).workers
        return PluginStats(instance_id=instance_id, workers=await worker_stats(workers))

    def get_plugin_stats(self, instance_id: str) -> PluginStats:
        """Like `get_plugin_stats_async`, synchronously."""
        return self._home.run(lambda: self.get_plugin_stats_async(instance_id))

    async def get_resource_snapshot(self, instance_id: str) -> ResourceSnapshot:
        """Measure an instance now, with what the registered monitor says of GPUs."""
        stats = await self.get_plugin_stats_async(instance_id)
        reading = await self._instances.allocator.read()
        return snapshot_of(stats, reading.processes, reading.status)

    def register_system_monitor(self, instance_id: str) -> None:
        """Take figures of GPUs and memory from a loaded plugin that has `get_system_status` and `list_processes`.

        A `PluginNotLoadedError` when there is none of this id. Once it is unloaded, figures are missing.
        """
        self._instances.get(instance_id)
        self._instances.allocator.register_monitor(instance_id, lambda verb: self._instances.get(instance_id).ask(verb))

    async def get_empirical_records(self, instance_id: str | None = None) -> list[EmpiricalResourceRecord]:
        """Return what the calls of one instance, or of all, took, those that just ended included.

        A `StoreError` when the store cannot be read. Without tracking there is nothing.
        """
        self._home.adopt()
        records = await self._recorder.records() if self._recorder else []
        return [record for record in records if instance_id in (None, record.instance_id)]

    # -- around

    async def __aenter__(self) -> PluginManager:
        self._home.adopt()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.unload_all_async()

    async def _load_spec(self, spec: PluginLoadSpec) -> str:
        loaded = await self.load_plugin_async(
            spec.meta,
            spec.config,
            instance_id=spec.instance_id,
            new_instance=spec.new_instance,
            max_concurrent_requests=spec.max_concurrent_requests,
        )
        return loaded.instance_id

    def _choose_id(self, meta: PluginMeta, instance_id: str | None, *, new_instance: bool) -> str:
        if instance_id is not None or not new_instance:
            return meta.name if instance_id is None else instance_id
        room = _MAX_ID - _NEW_ID_BYTES * 2 - 1
        while True:
            chosen = f"{meta.name[:room]}-{secrets.token_hex(_NEW_ID_BYTES)}"
            if chosen not in self._instances:
                return chosen

    def _settings(
        self, instance_id: str, meta: PluginMeta, config: Mapping[str, Any] | None, max_concurrent_requests: int
    ) -> InstanceSettings:
        return InstanceSettings(
            instance_id=instance_id,
            meta=meta,
            config=_effective_config(meta, config or {}),
            data_dir=self._data_dir / "data" / meta.name,
            log_path=self._data_dir / "logs" / f"{instance_id}.log",
            worker_env=lambda: meta.manifest.install.env_vars,
            max_concurrent_requests=max_concurrent_requests,
            max_workers=self._max_tenant_workers,
            grace_seconds=self._grace_seconds,
            load_timeout=self._load_timeout,
            revive=self._revive,
            isolation=meta.manifest.isolation_profile(self._isolation),
            required_layers=(*self._require, *meta.manifest.required_layers),
        )


def _effective_config(meta: PluginMeta, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema's defaults with the given values over them; unknown keys are a `PluginConfigError`."""
    properties = meta.config_schema.get("properties")
    if not isinstance(properties, dict):
        return dict(config)
    unknown = sorted(set(config) - set(properties))
    if unknown:
        known = ", ".join(sorted(properties)) or "none"
        raise PluginConfigError(
            f"plugin {meta.name!r} has no setting {', '.join(unknown)}; it has: {known}", fields_invalid=unknown
        )
    defaults = {
        name: schema["default"]
        for name, schema in properties.items()
        if isinstance(schema, dict) and "default" in schema  # true and false are schemas too
    }
    return {**defaults, **config}
