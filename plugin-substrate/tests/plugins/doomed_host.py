"""A host with three workers, two of them in work that never ends: it tells who is there and waits to be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from plugin_substrate import IsolationProfile, PluginManager, PluginMeta, load_manifest


def fork_a_survivor() -> None:
    """Leave a process behind that holds a copy of every descriptor, until the test closes our standard input."""
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)


async def main(manifest: str, data_dir: str, complication: str) -> None:
    manager = PluginManager(data_dir=Path(data_dir), isolation=IsolationProfile(processes=8))
    meta = PluginMeta(manifest=load_manifest(Path(manifest)))
    instances = [await manager.load_plugin_async(meta, instance_id=name) for name in ("busy", "sleeping", "stopped")]
    orphan = await manager.execute_plugin_async("stopped", action="probe.daemon")
    calls = []
    for name, action in (("busy", "probe.busy"), ("sleeping", "probe.stubborn")):
        running = asyncio.Event()
        call = manager.execute_plugin_async(name, action=action, on_progress=lambda *_, e=running: e.set())
        calls.append(asyncio.create_task(call))
        await running.wait()
    os.kill(instances[2].pid, signal.SIGSTOP)
    if complication == "stopped supervisor":
        os.kill(instances[0].supervisor_pid, signal.SIGSTOP)
    elif complication == "forked host":
        fork_a_survivor()
    pids = [*(instance.pid for instance in instances), instances[0].supervisor_pid, orphan]
    print(json.dumps(pids), flush=True)  # noqa: T201 - this is how the test hears it
    await asyncio.gather(*calls)


asyncio.run(main(*sys.argv[1:]))
