"""A process that prunes: run by `test_event_pruning.py`, which kills it.

python pruner.py DSN TENANT LIMIT    prunes at most LIMIT events at once; says `batch` each time, goes on when told
"""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

from conftest import TableDelivery
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


async def main(dsn: str, tenant: str, limit: str) -> None:
    async with open_pool(dsn, max_size=1) as pool:
        checkpoints = PostgresStorage(pool, TableDelivery()).checkpoints
        while (await checkpoints.prune(UUID(tenant), actor="system:pruner", limit=int(limit))).more:
            say("batch")
            await asyncio.to_thread(sys.stdin.readline)
    say("done")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
