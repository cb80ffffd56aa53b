"""What a job costs: jobs a second, submit to start, jobs side by side, and a long queue; in memory and on disk.

Everything is real: confined workers of a plugin that does nothing, the SQLite store with every commit synced, and
PostgreSQL with fsync on under Procrastinate, which is the baseline, measured in the same run with a task that does
nothing. BENCH_JOBS scales it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import procrastinate
import psycopg
from figures import Figure, command_line, percentile, report
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plugin_substrate import JobEventType, JobQueue, LocalJobStore, PluginManager, PluginMeta
from plugin_substrate.manifest import CodeSection, InstallSection, ManifestV2

HERE = Path(__file__).resolve().parent
JOBS = int(os.environ.get("BENCH_JOBS", "4000"))
PENDING = 25 * JOBS
ROUNDS = 10
CLIENTS = 32
INSTANCES = 4
SLOTS = 4


def make_meta(folder: Path) -> PluginMeta:
    """An environment with the plugin that the benchmark of workers uses."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    source = HERE / "plugins" / "worker_bench" / "worker_bench_plugin.py"
    (site_packages / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return PluginMeta(
        manifest=ManifestV2(
            install=InstallSection(python_path=str(folder / "bin/python")),
            code=CodeSection(
                name="worker-bench",
                version="1.0",
                description="Does nothing.",
                module="worker_bench_plugin",
                class_name="WorkerBench",
                interface="plugin_substrate.interface.PluginInterface",
            ),
        )
    )


@asynccontextmanager
async def queue_over(meta: PluginMeta, folder: Path, *, durable: bool, slots: int = SLOTS) -> AsyncIterator[JobQueue]:
    """Four instances and a queue that is not started."""
    async with PluginManager(data_dir=folder / "data", empirical_tracking=False) as manager:
        for number in range(INSTANCES):
            await manager.load_plugin_async(meta, instance_id=f"i{number}", max_concurrent_requests=slots)
        store = LocalJobStore(folder / f"{uuid.uuid4().hex}.db") if durable else None
        queue = JobQueue(manager, store=store, max_history=1000)
        try:
            yield queue
        finally:
            await queue.close(0.0)


async def submit_many(queue: JobQueue, count: int) -> list[str]:
    """Submit from several clients at once, each waiting for its job to be kept."""
    ids: list[str] = []

    async def client(first: int) -> None:
        for number in range(first, count, CLIENTS):
            ids.append(await queue.submit(f"i{number % INSTANCES}"))  # noqa: PERF401 - one after another

    await asyncio.gather(*(client(first) for first in range(CLIENTS)))
    return ids


async def until_done(queue: JobQueue) -> None:
    while waiting := (queue.get_running() or queue.get_pending()):
        await queue.wait_for_job(waiting[-1].id)


async def end_to_end(queue: JobQueue) -> float:
    """Jobs a second from the first submit to the last end."""
    await queue.start()
    await submit_many(queue, JOBS // 10)
    await until_done(queue)
    started = time.perf_counter()
    await submit_many(queue, JOBS)
    await until_done(queue)
    return JOBS / (time.perf_counter() - started)


async def submit_to_start(queue: JobQueue) -> list[float]:
    """Seconds until the event that a job runs has arrived, one job at a time."""
    samples = []
    for _ in range(max(50, JOBS // 10)):
        started = time.perf_counter()
        job_id = await queue.submit("i0")
        async for event in queue.events(job_id):
            if event.type is JobEventType.STATE_TRANSITION and event.payload["to"] == "running":
                samples += [time.perf_counter() - started]
    return samples


async def eight_on_four(meta: PluginMeta, folder: Path, *, durable: bool) -> float:
    """Seconds for eight jobs of half a second on four instances: one at least is the ideal."""
    async with queue_over(meta, folder, durable=durable, slots=1) as queue:
        await queue.start()
        started = time.perf_counter()
        ids = [
            await queue.submit(f"i{number % INSTANCES}", action="sleep", value=0.5) for number in range(2 * INSTANCES)
        ]
        for job_id in ids:
            await queue.wait_for_job(job_id)
        return time.perf_counter() - started


async def end_some(queue: JobQueue, count: int) -> None:
    """Start the queue until so many jobs have ended."""
    events = queue.all_events()
    await queue.start()
    async for event in events:
        count -= event.payload.get("to") == "completed"
        if count <= 0:
            break
    await queue.stop()


async def serve_rounds(turns: Connection, meta: PluginMeta, folder: Path, *, durable: bool, pending: int) -> None:
    """Have so many jobs wait, then at each turn submit and end as many as the benchmark is of, and tell the seconds."""
    async with queue_over(meta, folder, durable=durable) as queue:
        await submit_many(queue, JOBS // 10)
        await end_some(queue, JOBS // 10)
        await submit_many(queue, pending)
        turns.send({})
        while await asyncio.to_thread(turns.recv):
            spent = {}
            for verb, work in (("submit", submit_many), ("dispatch", end_some)):
                started = time.perf_counter()
                await work(queue, JOBS)
                spent[verb] = time.perf_counter() - started
            turns.send(spent)


def serve_in_a_process(turns: Connection, meta: PluginMeta, folder: Path, durable: bool, pending: int) -> None:
    asyncio.run(serve_rounds(turns, meta, folder, durable=durable, pending=pending))


def rates_by_length(meta: PluginMeta, folder: Path, *, durable: bool) -> dict[str, float]:
    """Rates with an empty queue and with a long one: of submitting, and of starting and ending what waits.

    Each queue has a process of its own, with a collector of garbage of its own, and they take turns, so that both find
    the same machine. What counts is the time of all turns together, collections of garbage included.
    """
    spawn = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    processes = []
    for length, pending in (("empty", 0), ("long", PENDING)):
        sides[length], theirs = spawn.Pipe()
        arguments = (theirs, meta, folder, durable, pending)
        processes.append(spawn.Process(target=serve_in_a_process, args=arguments, daemon=True))
        processes[-1].start()
        sides[length].recv()
    spent: Counter[str] = Counter()
    for number in range(ROUNDS):
        for length in sorted(sides, reverse=bool(number % 2)):
            sides[length].send(True)
            spent.update({f"{verb}, {length}": seconds for verb, seconds in sides[length].recv().items()})
    for side, process in zip(sides.values(), processes, strict=True):
        side.send(False)
        process.join()
    return {name: ROUNDS * JOBS / seconds for name, seconds in spent.items()}


async def procrastinate_rate(folder: Path) -> tuple[float, float]:
    """Jobs a second end to end, and the median of submit to start in seconds, of Procrastinate on PostgreSQL."""
    with EmbeddedPostgres(folder / "postgres") as server:
        urls = provision(server.admin_dsn, "bench")
        with psycopg.connect(urls.owner, autocommit=True) as connection:
            connection.execute("CREATE SCHEMA IF NOT EXISTS bench_queue")
        connector = procrastinate.PsycopgConnector(
            conninfo=urls.owner, kwargs={"options": "-c search_path=bench_queue"}, min_size=2, max_size=CLIENTS
        )
        app = procrastinate.App(connector=connector)
        arrivals: asyncio.Queue[float] = asyncio.Queue()

        @app.task(name="noop")
        async def noop() -> None:
            arrivals.put_nowait(time.perf_counter())

        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            worker = asyncio.create_task(
                app.run_worker_async(concurrency=INSTANCES * SLOTS, wait=True, install_signal_handlers=False)
            )
            await noop.defer_async()
            await arrivals.get()
            latencies = []
            for _ in range(max(50, JOBS // 20)):
                started = time.perf_counter()
                await noop.defer_async()
                latencies.append(await arrivals.get() - started)
            count = JOBS // 4
            started = time.perf_counter()

            async def client(first: int) -> None:
                for _ in range(first, count, CLIENTS):
                    await noop.defer_async()

            await asyncio.gather(*(client(first) for first in range(CLIENTS)))
            for _ in range(count):
                await arrivals.get()
            rate = count / (time.perf_counter() - started)
            worker.cancel()
            await asyncio.wait({worker})
    return rate, percentile(latencies, 0.5)


async def main(folder: Path) -> dict[str, Figure]:
    meta = make_meta(folder / "environment")
    their_rate, their_latency = await procrastinate_rate(folder)
    figures: dict[str, Figure] = {}
    for name, durable, target in (("in memory", False, 1000.0), ("SQLite", True, 800.0)):
        async with queue_over(meta, folder, durable=durable) as queue:
            rate = await end_to_end(queue)
            starts = await submit_to_start(queue)
        figures[f"jobs a second, {name}"] = Figure(
            value=rate, unit="/s", better="higher", target=target, baseline=their_rate
        )
        for label, fraction, limit in (("p50", 0.5, 5.0), ("p99", 0.99, None)):
            figures[f"submit to start, {name}, {label}"] = Figure(
                value=percentile(starts, fraction) * 1e3,
                unit="ms",
                better="lower",
                target=limit,
                baseline=their_latency * 1e3 if label == "p50" else None,
            )
        rates = await asyncio.to_thread(rates_by_length, meta, folder, durable=durable)
        for verb in ("submit", "dispatch"):
            figures[f"{verb} with {PENDING} pending, {name}"] = Figure(
                value=rates[f"{verb}, long"],
                unit="/s",
                better="higher",
                target=0.8 * rates[f"{verb}, empty"],
                baseline=rates[f"{verb}, empty"],
            )
        figures[f"eight jobs of 0.5 s on four instances, {name}"] = Figure(
            value=await eight_on_four(meta, folder, durable=durable), unit="s", better="lower", target=1.1
        )
    return figures


if __name__ == "__main__":
    asked = command_line(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="plm-bench-") as name:
        place = Path(name)
        place.chmod(0o711)  # the database's account must pass through it when this runs as root
        report("the job queue", asyncio.run(main(place)), as_json=asked.as_json)
