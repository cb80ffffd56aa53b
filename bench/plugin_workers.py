"""What a plugin in a process of its own costs: loads, calls, echoes, streams, deaths, cancels and memory.

Everything is real: supervisor, confined worker, the manager's public methods, default settings, a plugin that does
nothing. Baselines are measured in the same run: the start of a bare interpreter, a fork that answers, the echo of a
forked process over a bare socket pair, and for preloaded imports the same load without preload. BENCH_ROUNDS scales it.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from figures import Figure, command_line, percentile, report
from plugin_substrate import PluginCancelledError, PluginError, PluginManager, PluginMeta, WorkerDiedError
from plugin_substrate.environments.install import compile_our_files
from plugin_substrate.interface import CallContext
from plugin_substrate.manifest import CodeSection, InstallSection, ManifestV2
from plugin_substrate.testing.leftovers import descendants

HERE = Path(__file__).resolve().parent
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "20"))
CALLS = 100 * ROUNDS
WORKERS = 5  # that serve so many calls each, one after another: where the system puts threads differs by worker
BURST = 512
IN_FLIGHT = 32
CHUNKS = 5000
GRACE_SECONDS = 0.5
MEGABYTE = 1 << 20


def make_environment(folder: Path) -> PluginMeta:
    """An environment with the plugin in it, as an installation leaves it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    for source in (HERE / "plugins" / "worker_bench").glob("*.py"):
        (site_packages / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([str(folder / "bin/python"), "-m", "compileall", "-q", str(site_packages)], check=True)
    compile_our_files(folder / "bin/python")
    return make_meta(str(folder / "bin/python"))


def make_meta(
    python: str, module: str = "worker_bench_plugin", *, preload: bool = False, processes: int = 0
) -> PluginMeta:
    """``processes`` is how many the operator grants; none is the default."""
    return PluginMeta(
        manifest=ManifestV2(
            install=InstallSection(python_path=python),
            code=CodeSection(
                name="worker-bench",
                version="1.0",
                description="Does nothing.",
                module=module,
                preload=preload,
                class_name="WorkerBench",
                interface="plugin_substrate.interface.PluginInterface",
            ),
            overrides={"isolation": {"processes": processes}} if processes else {},
        )
    )


@asynccontextmanager
async def loaded(meta: PluginMeta, folder: Path, **options: Any) -> AsyncIterator[PluginManager]:
    async with PluginManager(data_dir=folder, grace_seconds=GRACE_SECONDS) as manager:
        await manager.load_plugin_async(meta, instance_id="bench", **options)
        yield manager


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


# -- loads


async def first_loads(meta: PluginMeta, folder: Path) -> list[float]:
    samples = []
    for _ in range(ROUNDS):
        async with PluginManager(data_dir=folder) as manager:
            samples.append(await timed(partial(manager.load_plugin_async, meta)))
    return samples


async def further_loads(meta: PluginMeta, folder: Path) -> list[float]:
    samples = []
    async with loaded(meta, folder) as manager:
        for _ in range(ROUNDS):
            samples.append(await timed(lambda: manager.load_plugin_async(meta, instance_id="further")))
            await manager.unload_plugin_async("further")
    return samples


async def further_loads_of_slow_imports(meta: PluginMeta, folder: Path, *, preload: bool) -> list[float]:
    slow = make_meta(meta.manifest.install.python_path, "slow_bench_plugin", preload=preload)
    return await further_loads(slow, folder)


async def loads_at_once(meta: PluginMeta, folder: Path) -> list[float]:
    samples = []
    for _ in range(ROUNDS):
        async with PluginManager(data_dir=folder) as manager:

            async def all_four(manager: PluginManager = manager) -> None:
                loads = (manager.load_plugin_async(meta, instance_id=f"i{number}") for number in range(4))
                await asyncio.gather(*loads)

            samples.append(await timed(all_four))
    return samples


# -- calls


async def calls_one_by_one(meta: PluginMeta, folder: Path) -> list[float]:
    samples = []
    for _ in range(WORKERS):
        async with loaded(meta, folder) as manager:
            samples += [await timed(lambda: manager.execute_plugin_async("bench")) for _ in range(CALLS)]
    return samples


def sync_calls(meta: PluginMeta, folder: Path) -> list[float]:
    return [sample for _ in range(WORKERS) for sample in sync_calls_of_one(meta, folder)]


def sync_calls_of_one(meta: PluginMeta, folder: Path) -> list[float]:
    manager = PluginManager(data_dir=folder)
    assert manager.load_plugin(meta, instance_id="bench")
    samples = []
    for _ in range(CALLS):
        started = time.perf_counter()
        manager.execute_plugin("bench")
        samples.append(time.perf_counter() - started)
    manager.unload_all()
    return samples


@asynccontextmanager
async def watched_loop() -> AsyncIterator[list[float]]:
    """How long a round of the event loop took, every few milliseconds meanwhile."""
    delays = [0.0]

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            delays.append(time.perf_counter() - started - 0.001)

    watcher = asyncio.create_task(watch())
    yield delays
    watcher.cancel()


async def burst(manager: PluginManager) -> tuple[list[float], float]:
    """Calls a second, a sample per burst, and the longest the event loop was blocked meanwhile."""
    rates = []

    async def caller(count: int) -> None:
        for _ in range(count):
            await manager.execute_plugin_async("bench")

    async with watched_loop() as delays:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            await asyncio.gather(*(caller(BURST // IN_FLIGHT) for _ in range(IN_FLIGHT)))
            rates.append(BURST / (time.perf_counter() - started))
    return rates, max(delays)


async def echoes(manager: PluginManager, size: int) -> list[float]:
    value = os.urandom(size)
    return [await timed(lambda: manager.execute_plugin_async("bench", value=value)) for _ in range(ROUNDS)]


async def streams(manager: PluginManager) -> list[float]:
    rates = []
    for _ in range(ROUNDS):
        started, count = time.perf_counter(), 0
        async for _ in manager.execute_plugin_stream("bench", count=CHUNKS):
            count += 1
        rates.append(count / (time.perf_counter() - started))
    return rates


# -- ends


async def running(manager: PluginManager, action: str) -> asyncio.Task[Any]:
    """Start a call and return when the plugin is in it."""
    begun = asyncio.Event()
    call = manager.execute_plugin_async(
        "bench", action=action, call=CallContext("bench"), on_progress=lambda *_: begun.set()
    )
    task = asyncio.create_task(call)
    await begun.wait()
    return task


async def deaths(manager: PluginManager) -> tuple[list[float], list[float]]:
    """Seconds until the error of the call under which the worker was killed, and until the next call is answered."""
    noticed, usable = [], []
    for _ in range(ROUNDS):
        task = await running(manager, "polite")
        started = time.perf_counter()
        os.kill(manager.get_instance("bench").pid or 0, signal.SIGKILL)
        await asyncio.wait({task})
        assert isinstance(task.exception(), WorkerDiedError)
        noticed.append(time.perf_counter() - started)
        await manager.execute_plugin_async("bench")
        usable.append(time.perf_counter() - started)
    return noticed, usable


async def cancels(manager: PluginManager, action: str) -> tuple[list[float], float]:
    samples = []
    async with watched_loop() as delays:
        for _ in range(max(3, ROUNDS // 4)):
            task = await running(manager, action)
            samples.append(await timed(lambda: manager.cancel_call("bench", "bench")))
            await asyncio.wait({task})
            assert isinstance(task.exception(), PluginCancelledError)
    return samples, max(delays)


async def kill_worker(manager: PluginManager) -> None:
    os.kill(manager.get_instance("bench").pid or 0, signal.SIGKILL)


async def kill_supervisor(manager: PluginManager) -> None:
    os.kill(manager.get_instance("bench").supervisor_pid or 0, signal.SIGKILL)


async def unload(manager: PluginManager) -> None:
    assert await manager.unload_plugin_async("bench")


async def cancel(manager: PluginManager) -> None:
    assert await manager.cancel_call("bench", "bench") == "forced"


#: Ends of a worker that hears nothing, and how much of the time until then is the grace it is given.
ENDS = {
    "worker killed": (kill_worker, 0.0),
    "supervisor killed": (kill_supervisor, 0.0),
    "unloaded, beyond the grace": (unload, GRACE_SECONDS),
    "cancelled by force, beyond the grace": (cancel, GRACE_SECONDS),
}


async def ends_of_families(
    meta: PluginMeta, folder: Path, end: Callable[[PluginManager], Awaitable[None]], grace: float
) -> list[float]:
    """Seconds until a busy worker is gone and with it a child, one in a session of its own, and a daemon."""
    permitted = make_meta(meta.manifest.install.python_path, processes=16)
    samples = []
    for _ in range(max(3, ROUNDS // 4)):
        async with loaded(permitted, folder) as manager:
            task = await running(manager, "family")
            supervisor = manager.get_instance("bench").supervisor_pid
            below = {mark.pid for mark in descendants(os.getpid())} - {supervisor}
            waiting = {os.pidfd_open(pid) for pid in below}
            started = time.perf_counter()
            gone = asyncio.create_task(asyncio.to_thread(wait_for_the_end, waiting))
            await end(manager)
            await gone
            samples.append(time.perf_counter() - started - grace)
            assert len(below) >= 4
            await asyncio.wait({task})
            assert isinstance(task.exception(), PluginError)
    return samples


def wait_for_the_end(waiting: set[int]) -> None:
    """Return when all processes of these pidfds are dead; closes them."""
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        for descriptor, _ in poll.poll():
            poll.unregister(descriptor)
            waiting.discard(descriptor)
            os.close(descriptor)


def host_deaths(meta: PluginMeta, folder: Path, action: str = "busy") -> list[float]:
    """Seconds from SIGKILL to the host until its whole tree is gone: one worker busy, one stopped."""
    return [host_death(meta, folder, action) for _ in range(max(3, ROUNDS // 4))]


def host_death(meta: PluginMeta, folder: Path, action: str) -> float:
    command = [sys.executable, __file__, "--doomed-host", meta.manifest.install.python_path, str(folder), action]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        waiting = {os.pidfd_open(pid) for pid in json.loads(host.stdout.readline())}
        started = time.perf_counter()
        host.kill()
        wait_for_the_end(waiting)
        return time.perf_counter() - started


async def doomed_host(python: str, folder: str, action: str) -> None:
    meta = make_meta(python, processes=16 if action == "family" else 0)
    manager = PluginManager(data_dir=Path(folder))
    instances = [await manager.load_plugin_async(meta, instance_id=name) for name in ("bench", "stopped")]
    task = await running(manager, action)
    os.kill(instances[1].pid or 0, signal.SIGSTOP)
    print(json.dumps([mark.pid for mark in descendants(os.getpid())]), flush=True)
    await task


# -- memory


async def idle_memory(manager: PluginManager) -> float:
    """MB that supervisor and worker have for themselves alone, by their own word."""
    (worker,) = (await manager.get_plugin_stats_async("bench")).workers
    return (worker.memory_uss_mb or 0) + (worker.supervisor_uss_mb or 0)


# -- baselines


def interpreter_start() -> list[float]:
    samples = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
        samples.append(time.perf_counter() - started)
    return samples


def bare_fork() -> list[float]:
    samples = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        samples.append(time.perf_counter() - started)
    return samples


def bare_echo(size: int, rounds: int) -> list[float]:
    """A forked process that sends back what it gets, over a socket pair."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        while data := there.recv(MEGABYTE):
            there.sendall(data)
        os._exit(0)
    there.close()
    samples, payload, room = [], os.urandom(size), memoryview(bytearray(MEGABYTE))
    here.setblocking(False)
    for _ in range(rounds):
        started, sent, received = time.perf_counter(), 0, 0
        while received < size:
            readable, writable, _ = select.select([here], [here] if sent < size else [], [])
            if writable:
                sent += here.send(memoryview(payload)[sent : sent + MEGABYTE])
            if readable:
                received += here.recv_into(room)
        samples.append(time.perf_counter() - started)
    here.close()
    os.waitpid(pid, 0)
    return samples


def ms(samples: list[float], fraction: float, target: float, baseline: list[float] | None = None) -> Figure:
    return Figure(
        value=percentile(samples, fraction) * 1000,
        unit="ms",
        better="lower",
        target=target,
        baseline=None if baseline is None else percentile(baseline, fraction) * 1000,
    )


def rate(samples: list[float], target: float, baseline: float | None = None) -> Figure:
    return Figure(value=percentile(samples, 0.5), unit="1/s", better="higher", target=target, baseline=baseline)


async def measure(meta: PluginMeta, folder: Path) -> dict[str, Figure]:
    start, fork = interpreter_start(), bare_fork()
    small = bare_echo(64, CALLS)
    figures = {
        "load, first instance, p50": ms(await first_loads(meta, folder), 0.5, 60, start),
        "load, further instance, p50": ms(await further_loads(meta, folder), 0.5, 10, fork),
        "load, further instance, 300 ms of imports preloaded, p50": ms(
            await further_loads_of_slow_imports(meta, folder, preload=True),
            0.5,
            20,
            await further_loads_of_slow_imports(meta, folder, preload=False),
        ),
        "four loads at once, p50": ms(await loads_at_once(meta, folder), 0.5, 120),
    }
    calls = await calls_one_by_one(meta, folder)
    figures["async no-op call, p50"] = ms(calls, 0.5, 0.25, small)
    figures["async no-op call, p99"] = ms(calls, 0.99, 1, small)
    async with loaded(meta, folder) as manager:
        figures["idle memory of supervisor and worker (USS)"] = Figure(
            value=await idle_memory(manager), unit="MB", better="lower", target=12
        )
        for size, target in ((1, 2), (16, 30)):
            baseline = bare_echo(size * MEGABYTE, ROUNDS)
            figures[f"echo of {size} MiB, p50"] = ms(await echoes(manager, size * MEGABYTE), 0.5, target, baseline)
        async with watched_loop() as delays:
            await manager.execute_plugin_async("bench", value=bytes(128 * MEGABYTE))
        figures["echo of 128 MiB, event loop blocked, most"] = ms([max(delays)], 0.5, 50)
        figures["stream of 5000 chunks, p50"] = rate(await streams(manager), 50_000)
        noticed, usable = await deaths(manager)
        figures["killed worker noticed, p50"] = ms(noticed, 0.5, 5)
        figures["killed worker replaced and used, p50"] = ms(usable, 0.5, 20)
        cooperative, _ = await cancels(manager, "polite")
        figures["cooperative cancel, p50"] = ms(cooperative, 0.5, 20)
        forced, blocked = await cancels(manager, "deaf")
        figures["forced cancel, beyond the grace, p50"] = ms([took - GRACE_SECONDS for took in forced], 0.5, 100)
        figures["forced cancel, event loop blocked"] = ms([blocked], 0.5, 50)
    async with loaded(meta, folder, max_concurrent_requests=IN_FLIGHT) as manager:
        rates, delay = await burst(manager)
        figures[f"{BURST} no-ops, {IN_FLIGHT} in flight, p50"] = rate(rates, 12_000)
        figures[f"{BURST} no-ops, event loop blocked, most"] = ms([delay], 0.5, 50)
    for name, (end, grace) in ENDS.items():
        samples = await ends_of_families(meta, folder, end, grace)
        figures[f"{name}, all its descendants gone, most"] = ms(samples, 1, 2000)
    return figures


def main() -> dict[str, Figure]:
    with tempfile.TemporaryDirectory(prefix="plm-bench-") as root:
        folder = Path(root)
        meta = make_environment(folder / "environment")
        figures = asyncio.run(measure(meta, folder / "data"))
        calls = sync_calls(meta, folder / "data")
        figures["sync no-op call, p50"] = ms(calls, 0.5, 0.25)
        figures["sync no-op call, p99"] = ms(calls, 0.99, 1)
        figures["host killed, its tree gone, most"] = ms(host_deaths(meta, folder / "data"), 1, 250)
        families = host_deaths(meta, folder / "data", "family")
        figures["host killed, all descendants gone, most"] = ms(families, 1, 250)
    return figures


if __name__ == "__main__":
    if "--doomed-host" in sys.argv:
        asyncio.run(doomed_host(*sys.argv[2:]))
    else:
        asked = command_line(__doc__ or "").parse_args()
        report("plugin workers", main(), as_json=asked.as_json)
