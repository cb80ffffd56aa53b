"""Work that is done over and over beside all else, whatever becomes of one pass, and tenant by tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from logging import Logger
from typing import TYPE_CHECKING
from uuid import UUID

from plm_shared.cancellation import kept_cancel

from plm_engine_core.control_plane.errors import StorageUnavailable

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import Storage


async def sweep_until_cancelled(
    sweep: Callable[[], Awaitable[int]], *, every_seconds: float, name: str, logger: Logger
) -> None:
    """Make a pass every so often; one that fails is logged as `name`, and the next one tries again.

    One cancel ends it, even one that is lost within a pass: a task group would pass no second one on.
    """
    while True:
        try:
            with kept_cancel():
                await sweep()
        except StorageUnavailable as error:
            logger.warning("%s has to wait: %s", name, error)
        except Exception:
            logger.exception("%s failed; the next one tries again", name)
        await asyncio.sleep(every_seconds)


@dataclass(frozen=True, kw_only=True)
class ExpiredBatch:
    """What one batch took; `more` says that the tenant may have more that is due."""

    records: int
    more: bool


InTenant = Callable[[UUID], AbstractAsyncContextManager[object]]
"""Acts in one tenant for the length of a block, as the one whose pass it is."""


async def remove_in_batches(
    storage: Storage,
    remove: Callable[[UUID], Awaitable[ExpiredBatch]],
    in_tenant: InTenant,
    *,
    name: str,
    logger: Logger,
) -> int:
    """Remove of every tenant what is due, each a batch in its turn, and answer how much that was.

    What fails of one tenant is logged as `name`, and left to the next pass.
    """
    removed = 0
    due = list(await storage.checkpoints.tenants())
    while due:
        again = []
        for tenant_id in due:
            try:
                async with in_tenant(tenant_id):
                    batch = await remove(tenant_id)
            except StorageUnavailable:
                raise
            except Exception:  # a function of another release, or a damaged row
                logger.exception("%s of tenant %s stay until the next pass", name, tenant_id)
                continue
            removed += batch.records
            if batch.more:
                again.append(tenant_id)
        due = again
    return removed
