"""One plugin's worker in a pass: confined to its copy of the tree, asked a few times at most, then dead."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.call_message import encode_call
from plugin_substrate.errors import PluginError, PluginTimeoutError
from plugin_substrate.interface import CallContext
from plugin_substrate.lifecycle import Supervisor
from plugin_substrate.passes.records import PluginRecord
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker_folder import worker_environment

__all__ = ["PassWorker", "WorkerTerms"]

_MODULE, _CLASS = "plugin_substrate.worker.file_pass", "FilePassPlugin"
_LEAST_MEMORY_BYTES = 64 << 20  # below this no interpreter starts
_OPEN_FILES = 256


@dataclass(frozen=True, kw_only=True)
class WorkerTerms:
    """What one worker gets. ``seconds`` bounds all its working time together, ``tree`` is where it works.

    One that may only ``look`` works in its scratch folder instead, and cannot write to the tree.
    """

    tree: Path
    scratch: Path
    seconds: float
    cpu_seconds: int
    memory_bytes: int
    file_bytes: int
    disk_bytes: int
    look: bool
    environment: Mapping[str, str]
    on_line: Callable[[str], object]

    def profile(self, record: PluginRecord) -> IsolationProfile:
        """Return how it is confined: it writes to its tree and its scratch folder, and starts no process."""
        return IsolationProfile(
            network=record.network,
            read_paths=(str(record.package_path.resolve()), str(self.tree)),
            write_paths=(str(self.scratch),),
            memory_bytes=max(self.memory_bytes, _LEAST_MEMORY_BYTES),
            cpu_seconds=self.cpu_seconds,
            open_files=_OPEN_FILES,
            file_bytes=self.file_bytes,
            disk_bytes=self.disk_bytes,
        )


class PassWorker:
    """A worker and the time that is left to it. Belongs to the event loop it was made on."""

    def __init__(self, supervisor: Supervisor, record: PluginRecord, terms: WorkerTerms) -> None:
        self._supervisor = supervisor
        self._record = record
        self._terms = terms
        self._left = terms.seconds
        self._proxy: RemotePluginProxy | None = None
        self.peak_bytes = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        """What confines it, as far as it has said so."""
        return self._proxy.layers if self._proxy else ()

    @property
    def worked_seconds(self) -> float:
        """How long it has worked; waiting for answers does not count."""
        return self._terms.seconds - self._left

    async def start(self) -> None:
        """Start the process and have the plugin imported; every failure is a `PluginError`."""
        record = self._record
        config = {
            "folder": str(record.package_path.resolve()),
            "module": record.module_name,
            "name": record.name,
            "version": record.version,
            "supported_extensions": sorted(record.supported_extensions),
            "api_version": record.api_version,
        }
        await self._in_time(self._start(config))

    async def ask(self, action: str, **request: Any) -> Any:
        """Have the plugin do something and return its answer; every failure is a `PluginError`."""
        return await self._in_time(self._call({"action": action, **request}))

    async def end(self) -> None:
        """Kill it and wait until it is dead."""
        if self._proxy is not None:
            await self._proxy.kill()

    async def _start(self, config: dict[str, Any]) -> None:
        terms = self._terms
        environment = worker_environment(sys.executable, terms.scratch, terms.environment, keeps_data=False)
        (terms.scratch / "tmp").mkdir(parents=True, exist_ok=True)
        folder = terms.scratch if terms.look else terms.tree
        process = await self._supervisor.spawn(env=environment, cwd=folder, isolation=terms.profile(self._record))
        self._proxy = RemotePluginProxy(process, lambda _, line: terms.on_line(line))
        await self._proxy.load(_MODULE, _CLASS, config, 1)

    async def _call(self, request: dict[str, Any]) -> Any:
        if self._proxy is None:
            raise PluginError("the worker was not started")
        call = PendingCall(CallContext(call_id=uuid.uuid4().hex))
        self._proxy.send_call(call, encode_call(call.context, (), request))
        try:
            return await call.outcome()
        finally:
            self.peak_bytes = max(self.peak_bytes, call.spent.peak_bytes or 0)

    async def _in_time(self, work: Any) -> Any:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._left):
                return await work
        except TimeoutError as error:
            raise PluginTimeoutError("timeout") from error
        except OSError as error:
            raise PluginError(f"spawn_failed: {error}") from error
        finally:
            self._left = max(0.0, self._left - (loop.time() - started))
