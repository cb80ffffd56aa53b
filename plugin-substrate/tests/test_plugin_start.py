"""What a supervisor and its workers import, and when: a first load waits for nothing that only others need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from plugin_substrate import PluginManager, PluginMeta

MetaFactory = Callable[..., PluginMeta]

#: Of the standard library, each takes a start some milliseconds, and no plugin needs them to be loaded.
SLOW = {"dataclasses", "datetime", "inspect", "pathlib"}


async def test_a_first_worker_waits_for_nothing_that_it_does_not_need_and_later_ones_find_it(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    meta = probe_meta("Sparse", "sparse", "sparse")
    await manager.load_plugin_async(meta)
    assert not SLOW.intersection(await manager.execute_plugin_async("sparse"))
    async with asyncio.timeout(60):
        while True:
            await manager.load_plugin_async(meta, instance_id="later")
            found = await manager.execute_plugin_async("later")
            await manager.unload_plugin_async("later")
            if SLOW.issubset(found):
                break
            await asyncio.sleep(0.05)
