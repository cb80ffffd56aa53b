"""A host with three workers, two of them in work that never ends: it tells who is there and waits to be killed."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import signal
import struct
import sys
from pathlib import Path

from plugin_substrate import IsolationProfile, PluginManager, PluginMeta, control_group, lifecycle, load_manifest
from plugin_substrate.testing.leftovers import seen_from_here
from plugin_substrate.worker import kernel

UNSHARE = {"x86_64": 272, "aarch64": 97}
SETNS = {"x86_64": 308, "aarch64": 268}


def fork_a_survivor() -> None:
    """Leave a process behind that holds a copy of every descriptor, until the test closes our standard input."""
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)


def forbid(call: dict[str, int]) -> None:
    """Have the kernel refuse a system call here and below, as many containers do."""
    load, equal, answer = 0x20, 0x15, 0x06
    rules = [(load, 0, 0, 0), (equal, 0, 1, call[platform.machine()]), (answer, 0, 0, 0x00050001)]
    program = b"".join(struct.pack("=HBBI", *rule) for rule in [*rules, (answer, 0, 0, 0x7FFF0000)])
    held = ctypes.create_string_buffer(program, len(program))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, struct.pack("@HP", len(program) // 8, ctypes.addressof(held)))


async def main(manifest: str, data_dir: str, complication: str) -> None:
    if "no namespaces" in complication:
        forbid(UNSHARE)
    if "no entering" in complication:
        forbid(SETNS)
    if "no groups" in complication:
        control_group.parent_folder = lambda: None
    if "no sweep" in complication:
        lifecycle.sweep_supervisor = lambda _: 0
    manager = PluginManager(data_dir=Path(data_dir), isolation=IsolationProfile(processes=8))
    meta = PluginMeta(manifest=load_manifest(Path(manifest)))
    instances = [await manager.load_plugin_async(meta, instance_id=name) for name in ("busy", "sleeping", "stopped")]
    inner = await manager.execute_plugin_async(
        "stopped", action="probe.bare_daemon" if "bare" in complication else "probe.daemon"
    )
    orphan = seen_from_here(inner, os.getpid())
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
    print(json.dumps({"pids": pids, "layers": instances[0].layers}), flush=True)  # noqa: T201 - the test hears it
    await asyncio.gather(*calls)


asyncio.run(main(*sys.argv[1:]))
