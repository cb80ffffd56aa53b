"""A host with two copies of a template: it tells who is there and waits to be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from plugin_substrate import PluginManager, PluginMeta, load_manifest


async def main(manifest: str, data_dir: str) -> None:
    manager = PluginManager(data_dir=Path(data_dir))
    meta = PluginMeta(manifest=load_manifest(Path(manifest)))
    instances = [await manager.load_plugin_async(meta, instance_id=name) for name in ("one", "stopped")]
    where = await manager.execute_plugin_async("one", action="preloaded.where")
    os.kill(instances[1].pid or 0, signal.SIGSTOP)
    pids = [*(instance.pid for instance in instances), instances[0].supervisor_pid, where["imported_by"]]
    print(json.dumps(pids), flush=True)  # noqa: T201 - the test hears it
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
