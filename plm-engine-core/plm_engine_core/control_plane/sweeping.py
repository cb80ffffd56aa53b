"""Work that is done over and over beside all else, whatever becomes of one pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from logging import Logger

from plm_shared.cancellation import kept_cancel

from plm_engine_core.control_plane.errors import StorageUnavailable


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
