"""Loads plugins, calls them and unloads them: the public verbs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any

from plugin_substrate.binding import PluginBinding
from plugin_substrate.call_message import CallArguments, new_call
from plugin_substrate.discovery import manifest_folders
from plugin_substrate.home_loop import HomeLoop
from plugin_substrate.instance import CallListeners, CancelOutcome
from plugin_substrate.instances import InstanceTable
from plugin_substrate.interface import CallContext
from plugin_substrate.managing.loading import LoadingVerbs
from plugin_substrate.managing.measuring import MeasuringVerbs
from plugin_substrate.managing.operating import OperatingVerbs
from plugin_substrate.metadata import CallResult, CallTerms, PluginMeta, RejectedManifest
from plugin_substrate.recorder import EmpiricalRecorder
from plugin_substrate.revival import Revival
from plugin_substrate.scheduling import GPU_MEMORY, SYSTEM_MEMORY, PermissiveScheduler, ResourceScheduler
from plugin_substrate.stores.config import LocalPluginConfigStore, PluginConfigStore
from plugin_substrate.stores.empirical import (
    EmpiricalResourceStore,
    LocalEmpiricalResourceStore,
)
from plugin_substrate.stores.secret import SecretStore, default_secret_store
from plugin_substrate.worker.isolation import IsolationProfile, parse_required_layers

__all__ = ["PluginBinding", "PluginManager"]


class PluginManager(LoadingVerbs, OperatingVerbs, MeasuringVerbs):
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
        config_store: PluginConfigStore | None = None,
        secret_store: SecretStore | None = None,
        drift_detection: bool = True,
        prefetch_stall_threshold_seconds: float = 60.0,
        models_dir: Path | None = None,
    ) -> None:
        """``isolation`` is what plugins get where nothing else is said; ``require`` names layers all must hold.

        ``max_tenant_workers`` bounds the workers of one instance, and ``revive`` says when dead ones are replaced. A
        ``scheduler`` decides which calls may have what their plugin needs; without one, all may. What calls took goes
        to ``empirical_store``, unless ``empirical_tracking`` is false. The stores are files below ``data_dir`` unless
        others are given. ``drift_detection`` asks each loaded plugin for its schema, to tell when it is no longer the
        manifest's. ``models_dir`` is a folder of models that every plugin may read, and finds in ``CJM_MODELS_DIR``.
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
        self._models_dir = models_dir.resolve() if models_dir is not None else None
        self._revive = revive
        self._config_store = config_store or LocalPluginConfigStore(self._data_dir / "plugin_configs.db")
        self._secret_store = secret_store or default_secret_store(self._data_dir)
        self._keeps_files = None in (config_store, secret_store) or (empirical_tracking and empirical_store is None)
        self._drift_detection = drift_detection
        self._prefetch_stall_seconds = prefetch_stall_threshold_seconds
        self._home = HomeLoop()
        self._discovered: dict[str, PluginMeta] = {}
        self._rejected: tuple[RejectedManifest, ...] = ()
        store = empirical_store or LocalEmpiricalResourceStore(self._data_dir / "empirical_resources.db")
        self._recorder = EmpiricalRecorder(store) if empirical_tracking else None
        self._instances = InstanceTable(scheduler or PermissiveScheduler(), self._recorder)

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
        listeners = CallListeners(
            before_start=before_start,
            on_started=on_started,
            on_progress=on_progress,
            on_usage=on_usage,
            on_log=on_log,
        )
        return await self._execute(instance_id, CallArguments(args, kwargs), call or new_call(), listeners)

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

    def execute_plugin(
        self,
        instance_id: str,
        /,
        *args: Any,
        call: CallContext | None = None,
        on_progress: Callable[[float, str], object] | None = None,
        on_log: Callable[[str], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like `execute_plugin_async`, synchronously; what listens is called in the thread of the event loop."""
        arguments, context = CallArguments(args, kwargs), call or new_call()
        listeners = CallListeners(on_progress=on_progress, on_log=on_log)

        async def execute() -> Any:
            return (await self._execute(instance_id, arguments, context, listeners)).value

        return self._home.run(execute, lambda: self._instances.get(instance_id).begin(arguments, context, listeners))

    async def _execute(
        self, instance_id: str, arguments: CallArguments, context: CallContext, listeners: CallListeners
    ) -> CallResult:
        self._home.adopt()
        instance = self._instances.get(instance_id)
        return await instance.execute(await arguments.with_paths(), context, listeners)

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
        turn = asyncio.Lock()  # what an interrupted reader waited for ends first: what runs cannot be closed
        loop: asyncio.AbstractEventLoop | None = None

        async def next_batch() -> list[Any]:
            nonlocal loop
            loop = asyncio.get_running_loop()
            async with turn:
                return await anext(batches, [])

        async def close() -> None:
            async with turn:
                await batches.aclose()

        try:
            while batch := self._home.run(next_batch):
                yield from batch
        finally:
            self._home.run_leftover(loop, close)

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
        arguments = await CallArguments(args, kwargs).with_paths()
        async with aclosing(instance.stream(arguments, call or new_call(), listeners)) as batches:
            async for batch in batches:
                yield batch

    async def cancel_call(
        self, instance_id: str, call_id: str, on_force: Callable[[], object] | None = None
    ) -> CancelOutcome:
        """Ask a call to end; after the grace its worker is killed, and with it every other call in that worker.

        ``on_force`` is called before it is killed.
        """
        self._home.adopt()
        return await self._instances.get(instance_id).cancel(call_id, on_force)

    def terms_of(self, instance_id: str) -> CallTerms:
        """Return on what terms an instance takes calls; a `PluginNotLoadedError` when there is none."""
        return self._instances.get(instance_id).terms()

    def slots_of(self, instance_id: str) -> int:
        """Return how many calls one worker of an instance takes at a time, as `get_instance` does, but at no cost."""
        return self._instances.get(instance_id).settings.max_concurrent_requests

    async def make_room(self, instance_id: str, resource: str = "", *, tenant_id: str = "") -> None:
        """End idle workers that hold memory, and the tenant's own worker of an instance if it is idle.

        The next call starts another. ``resource`` tells which memory, `GPU_MEMORY` or else the machine's. No running
        call is touched.
        """
        self._home.adopt()
        instance = self._instances.get(instance_id)
        wanted = resource if resource == GPU_MEMORY else SYSTEM_MEMORY
        await self._instances.allocator.make_room(wanted, instance.workers, instance.worker_of(tenant_id))

    # -- around

    def bind(self, name: str, default_config: Mapping[str, Any] | None = None) -> PluginBinding:
        """Return the verbs of one plugin's default instance; whether it is discovered or loaded is asked at each."""
        return PluginBinding(self, name, default_config)

    def get_plugin(self, instance_id: str) -> PluginBinding | None:
        """Return the verbs of an instance, None when there is none."""
        return PluginBinding(self, instance_id) if instance_id in self._instances else None

    async def __aenter__(self) -> PluginManager:
        self._home.adopt()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.unload_all_async()
