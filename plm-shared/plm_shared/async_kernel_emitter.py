"""The batching emitter for coroutines: the same core, and never a blocked loop."""

from __future__ import annotations

import asyncio
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from plm_shared.batching_emitter import BatchingKernelEmitter
from plm_shared.group_commit import Acknowledgement, QueueFull
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import LedgerArgs

__all__ = ["AsyncKernelEmitter"]


class AsyncKernelEmitter:
    """``BatchingKernelEmitter`` with awaitable methods; takes the same arguments and raises the same errors.

    A cancelled call leaves its event queued: it will be written.
    """

    def __init__(self, tenant_id: str | uuid.UUID, **options: Any) -> None:
        self._core = BatchingKernelEmitter(tenant_id, **options)
        self._open_waiting_room()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, args: LedgerArgs, *, run_id: str | uuid.UUID | None = None) -> Acknowledgement:
        """Check and queue one event, waiting for room; the handle's ``result`` blocks, ``acknowledged`` does not."""
        try:
            return self._core.submit(args, run_id=run_id, wait=False)
        except QueueFull:
            if self._process != os.getpid():
                self._open_waiting_room()  # a fork copies the pool without its thread
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._patient, partial(self._core.submit, args, run_id=run_id))

    async def acknowledged(self, handle: Acknowledgement) -> None:
        """Wait for the event; raises what ``Acknowledgement.result`` raises."""
        loop = asyncio.get_running_loop()
        settled = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop that waited is closed; nobody is left to tell
                loop.call_soon_threadsafe(settled.set)

        handle.add_done_callback(wake)
        await settled.wait()
        handle.result(0)

    async def emit_telemetry(self, args: EmitTelemetryArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record an event."""
        await self.acknowledged(await self.submit(args, run_id=run_id))

    async def emit_governance(self, args: EmitGovernanceArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a decision."""
        await self.acknowledged(await self.submit(args, run_id=run_id))

    async def record_llm_call(self, args: EmitLlmCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a model call and its cost."""
        await self.acknowledged(await self.submit(args, run_id=run_id))

    async def record_connector_call(
        self, args: EmitConnectorCallArgs, *, run_id: str | uuid.UUID | None = None
    ) -> None:
        """Record a connector call and its cost."""
        await self.acknowledged(await self.submit(args, run_id=run_id))

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - the same face as the sync one
        """As ``BatchingKernelEmitter.flush``."""
        return await asyncio.to_thread(self._core.flush, timeout)

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - see flush
        """As ``BatchingKernelEmitter.drain``."""
        return await asyncio.to_thread(self._core.drain, timeout)

    async def close(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - see flush
        """As ``BatchingKernelEmitter.close``."""
        settled = await asyncio.to_thread(self._core.close, timeout)
        self._patient.shutdown(wait=False)
        return settled

    def _open_waiting_room(self) -> None:
        """Waiting for room happens there, in order, so that it takes no thread of the loop's own pool."""
        self._process = os.getpid()
        self._patient = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plm-ledger-room")
