"""Does what somebody outside the host asked for, and answers: each request once, also across a death of the host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plugin_substrate.errors import PluginError, PluginInputError
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.store import Answered, Asked, JobStore

if TYPE_CHECKING:
    from plugin_substrate.queue.job_queue import JobQueue

_logger = logging.getLogger(__name__)


class Desk:
    """The host's side of `JobDesk`. What is submitted is written together with its answer."""

    def __init__(self, queue: JobQueue, store: JobStore) -> None:
        self._queue = queue
        self._store = store
        self._busy: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Begin to listen, and do what was asked while nobody did."""
        self._store.watch(self.look)
        self.look()

    def look(self) -> None:
        """Take up what was asked and is not in hand."""
        try:
            asked = self._store.asked()
        except PluginError:
            _logger.exception("what was asked of the queue cannot be read")
            return
        for request in asked:
            if request.id not in self._busy:
                task = asyncio.get_running_loop().create_task(self._serve(request))
                self._busy[request.id] = task

    async def close(self) -> None:
        """Let go of what is in hand; the next host takes it up."""
        for task in self._busy.values():
            task.cancel()
        if self._busy:
            await asyncio.wait(self._busy.values())

    async def _serve(self, asked: Asked) -> None:
        try:
            try:
                answer = await self._carry_out(asked)
            except (PluginError, LookupError, TypeError, ValueError) as error:
                answer = {"error": str(error), "error_type": type(error).__name__}
            if answer is not None and (kept := self._store.write([Answered(asked.id, answer)])) is not None:
                await asyncio.shield(kept)
        except PluginError:
            _logger.exception("request %s could not be answered", asked.id)
        finally:
            del self._busy[asked.id]

    async def _carry_out(self, asked: Asked) -> Mapping[str, Any] | None:
        """Return the answer; None where it was written with what was done."""
        arguments = dict(asked.arguments)
        match asked.verb:
            case "submit":
                await self._queue.submit_asked(_request(arguments), asked.id)
                return None
            case "retry":
                await self._queue.submit_asked(self._queue.again(str(arguments["job_id"])), asked.id)
                return None
            case "cancel":
                return {"cancelled": await self._queue.cancel(str(arguments["job_id"]))}
            case "why":
                job = self._queue.get_job(str(arguments["job_id"]))
                reason = job.block_reason
                return {
                    "status": job.status.value,
                    "reason": reason.payload() if reason else None,
                }
            case other:
                raise PluginInputError(f"this host does not know the verb {other!r:.80}")


def _request(arguments: Mapping[str, Any]) -> JobRequest:
    return JobRequest(
        plugin_instance_id=str(arguments["plugin_instance_id"]),
        kwargs=dict(arguments.get("kwargs", {})),
        priority=int(arguments.get("priority", 0)),
        owner=str(arguments.get("owner", "")),
        deadline_seconds=arguments.get("deadline_seconds"),
    )
