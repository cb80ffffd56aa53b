"""A host with a queue on disk: it does what it is told on standard input, one JSON object a line, and may be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugin_substrate import (
    JobQueue,
    LocalJobStore,
    PluginDisabledError,
    PluginManager,
    PluginMeta,
    SequenceStep,
    load_manifest,
)

CHUNK = 50


class Host:
    def __init__(self, manager: PluginManager, queue: JobQueue) -> None:
        self.manager = manager
        self.queue = queue
        self.floods: set[asyncio.Task[None]] = set()

    async def submit(self, instance: str, kwargs: Mapping[str, Any], priority: int = 0) -> str:
        try:
            return await self.queue.submit(instance, priority=priority, **kwargs)
        except PluginDisabledError:
            return ""

    async def sequence(self, instance: str, all_kwargs: list[dict[str, Any]], fail_fast: bool) -> str:
        steps = [SequenceStep(plugin_instance_id=instance, kwargs=kwargs) for kwargs in all_kwargs]
        return await self.queue.submit_sequence(steps, fail_fast=fail_fast)

    async def wait_for_sequence(self, sequence_id: str) -> list[Any]:
        sequence = await self.queue.wait_for_sequence(sequence_id, 60)
        return [sequence.status, [result.success for result in sequence.results]]

    async def cancel(self, job_id: str) -> bool:
        return await self.queue.cancel(job_id)

    async def reorder(self, job_id: str, priority: int) -> bool:
        return await self.queue.reorder(job_id, priority)

    async def status(self, job_id: str) -> str:
        return self.queue.get_job(job_id).status.value

    async def show(self, job_id: str) -> dict[str, Any]:
        job = self.queue.get_job(job_id)
        error = job.error.error_type if job.error else None
        return {
            "status": job.status.value,
            "progress": job.progress,
            "result": job.result,
            "error": error,
            "retries": job.retry_count,
        }

    async def wait(self, job_id: str) -> str:
        return (await self.queue.wait_for_job(job_id, 60)).status.value

    async def wait_until_at_work(self, job_id: str) -> None:
        """Return when the plugin has told that it did its work, in this attempt."""
        async with asyncio.timeout(60):
            follower = self.queue.all_events()
            while self.queue.get_job(job_id).progress != 0.25 or self.queue.get_job(job_id).status != "running":
                await anext(follower)

    async def events(self, job_id: str) -> list[str]:
        return [f"{event.number} {event.type}" async for event in self.queue.events(job_id)]

    async def kill_worker(self, instance: str) -> None:
        """Return when the manager knows that it is dead: a call that meets it before fails, as it should."""
        pid = self.manager.get_instance(instance).pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            while self.manager.get_instance(instance).pid == pid:  # noqa: ASYNC110 - deaths make no event here
                await asyncio.sleep(0.001)

    async def switch(self, instance: str, enabled: bool) -> None:
        verb = self.manager.enable_plugin_async if enabled else self.manager.disable_plugin_async
        await verb(instance)

    async def evict(self, instance: str) -> None:
        await self.manager.make_room(instance)

    async def flood(self, instance: str, count: int) -> None:
        """Submit many jobs, and tell of each chunk once it is kept; returns at once."""

        async def submit() -> None:
            for start in range(0, count, CHUNK):
                chunk = range(start, min(count, start + CHUNK))
                some = [self.queue.submit(instance, action="job.keyed_effect") for _ in chunk]
                tell({"kept": await asyncio.gather(*some)})

        task = asyncio.get_running_loop().create_task(submit())
        self.floods.add(task)

    async def drain(self) -> None:
        await asyncio.gather(*self.floods)
        while waiting := [*self.queue.get_running(), *self.queue.get_pending()]:
            for job in waiting:
                await self.queue.wait_for_job(job.id, 3600)


def tell(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def main(folder: Path) -> None:
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with PluginManager(data_dir=folder / "data", grace_seconds=0.3) as manager:
        for manifest in sorted(folder.glob("*.json")):  # noqa: ASYNC240 - nothing else runs yet
            await manager.load_plugin_async(PluginMeta(manifest=load_manifest(manifest)))
        store = LocalJobStore(folder / "jobs.db")
        queue = JobQueue(manager, store=store, max_history=10**6, ageing_seconds=1e6)
        await queue.start()
        host = Host(manager, queue)
        tell({"answer": "ready"})
        while line := await lines.readline():
            told = json.loads(line)
            tell({"answer": await getattr(host, told.pop("verb"))(**told)})
        await queue.close(0.0)


asyncio.run(main(Path(sys.argv[1])))
