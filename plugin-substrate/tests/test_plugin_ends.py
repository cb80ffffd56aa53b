"""However a worker ends, and whatever it is doing, its descendants of every kind end with it."""

from __future__ import annotations

import ast
import asyncio
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import plugin_substrate
import pytest
from plugin_substrate import CallContext, PluginError, PluginManager, PluginMeta, WorkerDiedError
from plugin_substrate.lifecycle import WorkerProcess

MetaFactory = Callable[..., PluginMeta]

DESCENDANTS = 3
BOUND_SECONDS = 30  # a busy machine's; the benchmark says what it really takes


def living(token: str) -> list[int]:
    """The processes with a word on their command line, as the host sees them; zombies have none any more."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if token in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.fixture
async def token() -> AsyncIterator[str]:
    """How long the descendants sleep: long, and a number that no other process has."""
    number = f"1000.{secrets.randbelow(10**9):09}"
    yield number
    for pid in living(number):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def family(manager: PluginManager, probe_meta: MetaFactory) -> PluginManager:
    await manager.load_plugin_async(probe_meta("Family", "family", "family", granted={"processes": 16}))
    return manager


async def all_gone(token: str) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while found := living(token):
        assert time.monotonic() < deadline, f"{len(found)} of {DESCENDANTS} are still there"
        await asyncio.sleep(0.005)


async def begun(manager: PluginManager, token: str, afterwards: str) -> asyncio.Task[object]:
    """Start a call and return when its descendants are there."""
    there = asyncio.Event()
    task = asyncio.create_task(
        manager.execute_plugin_async(
            "family",
            token,
            afterwards=afterwards,
            call=CallContext("the call"),
            on_progress=lambda *_: there.set(),
        )
    )
    async with asyncio.timeout(30):
        await there.wait()
        while len(living(token)) < DESCENDANTS:  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.005)
    return task


async def kill(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").pid or 0, signal.SIGKILL)


async def stop_and_kill(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").pid or 0, signal.SIGSTOP)
    await kill(manager)


async def unload(manager: PluginManager) -> None:
    assert await manager.unload_plugin_async("family")


async def stop_and_unload(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").pid or 0, signal.SIGSTOP)
    await unload(manager)


async def stop_the_supervisor_and_unload(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").supervisor_pid or 0, signal.SIGSTOP)
    await unload(manager)


async def reload(manager: PluginManager) -> None:
    await manager.reload_plugin_async("family")


async def stop_and_reload(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").pid or 0, signal.SIGSTOP)
    await reload(manager)


async def kill_the_supervisor(manager: PluginManager) -> None:
    os.kill(manager.get_instance("family").supervisor_pid or 0, signal.SIGKILL)


async def cancel(manager: PluginManager) -> None:
    assert await manager.cancel_call("family", "the call") == "forced"


ENDS = [
    kill, stop_and_kill, kill_the_supervisor, unload, stop_and_unload, stop_the_supervisor_and_unload,
    reload, stop_and_reload, cancel,
]  # fmt: skip


@pytest.mark.parametrize("afterwards", ["hold the interpreter", "compute", "sleep"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_descendants_end_with_their_worker_however_it_ends(
    family: PluginManager, token: str, end: Callable[[PluginManager], AsyncIterator[None]], afterwards: str
) -> None:
    task = await begun(family, token, afterwards)
    await end(family)  # type: ignore[misc]
    await all_gone(token)
    with pytest.raises(PluginError):
        await task


async def test_a_stopped_supervisor_is_woken_to_reap_and_to_sweep(family: PluginManager, token: str) -> None:
    task = await begun(family, token, "sleep")
    os.kill(family.get_instance("family").supervisor_pid or 0, signal.SIGSTOP)
    await kill(family)
    with pytest.raises(WorkerDiedError) as caught:
        await task
    assert caught.value.signal_name == "SIGKILL", "only the supervisor can have told"
    await all_gone(token)


async def test_descendants_of_a_finished_call_end_with_their_worker(family: PluginManager, token: str) -> None:
    await family.execute_plugin_async("family", token)
    assert len(living(token)) == DESCENDANTS, "they are permitted to outlive the call, not the worker"
    await unload(family)
    await all_gone(token)


# -- numbers that passed to another process


async def test_a_process_that_took_over_a_dead_workers_number_is_never_signalled() -> None:
    """What the host holds of a worker is a pidfd; the number beside it is only shown."""
    dead = subprocess.Popen(["true"])  # noqa: ASYNC220 - nothing else runs on this loop
    descriptor = os.pidfd_open(dead.pid)
    assert select.select([descriptor], [], [], BOUND_SECONDS)[0]
    dead.wait()
    bystander = subprocess.Popen(["sleep", "1000"])  # noqa: ASYNC220
    here, there = socket.socketpair()
    try:
        worker = WorkerProcess(
            connection=here,
            log_descriptor=-1,
            pid=bystander.pid,
            pidfd=descriptor,
            exit=asyncio.get_running_loop().create_future(),
        )
        assert worker.ended
        worker.kill()
        worker.close()
        worker.kill()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        here.close()
        there.close()


def test_no_code_signals_a_number_but_that_of_its_own_child() -> None:
    """A number may have passed to another process unless it is that of a child that is not reaped yet."""
    allowed = {("worker/supervisor.py", "_kill")}
    package = Path(plugin_substrate.__file__).parent
    for file in {*package.rglob("*.py")} - {*(package / "testing" / "probes").rglob("*.py")}:
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
            place = (str(file.relative_to(package)), function.name)
            assert not calls & {"os.kill", "os.killpg"} or place in allowed, place
