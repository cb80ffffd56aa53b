"""What stands beside every call: the resources it is granted, and the record of what it took."""

from __future__ import annotations

import time

from plugin_substrate.allocation import ResourceAllocator
from plugin_substrate.gpu_watch import GpuWatch
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.recorder import EmpiricalRecorder, Payer
from plugin_substrate.tenant_worker import TenantWorker

_MB = 1 << 20


class CallBooks:
    """One host's books. Everything but waiting for resources is quick, and none of it writes. Of one event loop."""

    def __init__(self, allocator: ResourceAllocator, recorder: EmpiricalRecorder | None) -> None:
        self.allocator = allocator
        self.recorder = recorder
        self._gpus = GpuWatch(allocator.read)

    def has_to_admit(self, meta: PluginMeta) -> bool:
        """Whether a call may be sent only when `admit` has returned."""
        return self.allocator.needed(meta)

    async def admit(self, meta: PluginMeta, worker: TenantWorker, call: PendingCall) -> None:
        """Return when the call has what it needs; a `PluginResourceError` when that cannot be had."""
        await self.allocator.allocate(meta, worker, call)

    def sent(self, meta: PluginMeta, worker: TenantWorker, call: PendingCall) -> None:
        """Note that a call left the host."""
        call.sent_at = time.monotonic()
        self.allocator.started(meta.name)
        if meta.resources.requires_gpu and self.allocator.has_monitor:
            self._gpus.begin(call, worker)

    def ended(self, payer: Payer, meta: PluginMeta, call: PendingCall) -> None:
        """Note the end of a call that was admitted, sent or not. A streaming call is no sample."""
        self.allocator.release(call)
        if call.sent_at is None:
            return
        self.allocator.finished(meta.name)
        gpu = self._gpus.end(call) if meta.resources.requires_gpu else None
        if self.recorder is None or isinstance(call, PendingStream):
            return
        cpu, peak = call.spent
        seconds = time.monotonic() - call.sent_at
        self.recorder.add(
            payer,
            success=call.error is None,
            seconds=seconds,
            cpu_percent=None if cpu is None or seconds <= 0 else 100 * cpu / seconds,
            memory_mb_peak=None if peak is None else peak / _MB,
            gpu_memory_mb_peak=gpu,
            usage=call.usage,
        )

    async def close(self) -> None:
        """Write what is not written yet."""
        self._gpus.stop()
        if self.recorder is not None:
            await self.recorder.close()
