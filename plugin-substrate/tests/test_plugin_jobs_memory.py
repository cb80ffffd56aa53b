"""However many jobs there were, a host takes no more memory, and its file of jobs no more room."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_substrate import JobQueue, LocalJobStore, PluginManager, PluginMeta

SOAK = float(os.environ.get("SOAK", "0.05"))
JOBS = 1_000_000 if SOAK >= 1 else max(1000, int(40_000 * SOAK))
CLIENTS = 16

_PAGE = os.sysconf("SC_PAGE_SIZE")


async def run(queue: JobQueue, count: int) -> None:
    """Have many jobs done, each waited for, with a line, some progress and an owner each."""

    async def client(first: int) -> None:
        for number in range(first, count, CLIENTS):
            job_id = await queue.submit("jobber", action="job.steps", count=1, lines=1, owner=f"owner-{number % 1000}")
            await queue.wait_for_job(job_id)

    await asyncio.gather(*(client(first) for first in range(CLIENTS)))


def taken() -> tuple[int, float]:
    """Blocks of memory that this process has in use, and its resident memory in MB."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    return sys.getallocatedblocks(), resident / (1 << 20)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kept", ["in memory", "on disk"])
async def test_memory_and_file_stay_flat_over_a_million_jobs(
    kept: str, manager: PluginManager, probe_meta: Callable[..., PluginMeta], tmp_path: Path
) -> None:
    await manager.load_plugin_async(probe_meta("Jobber", "jobber", "jobber"), max_concurrent_requests=CLIENTS)
    file = tmp_path / "jobs.db"
    count = JOBS if kept == "in memory" else JOBS // 4
    async with JobQueue(manager, store=LocalJobStore(file) if kept == "on disk" else None) as queue:
        await run(queue, max(500, count // 20))
        blocks, megabytes = taken()
        await run(queue, count)
        blocks_after, megabytes_after = taken()
        print(f"{kept}: {count} jobs, {blocks} -> {blocks_after} blocks, {megabytes:.1f} -> {megabytes_after:.1f} MB")  # noqa: T201
        assert blocks_after - blocks < 2000 + count / 100
        assert megabytes_after - megabytes < 16
        assert queue.get_stats().total_completed == 100
        size = sum(each.stat().st_size for each in tmp_path.glob("jobs.db*"))  # noqa: ASYNC240 - nothing else runs
        assert size < 32 << 20
