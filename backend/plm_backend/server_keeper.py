"""An embedded server that dies is started again by the process that uses it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from plm_shared.embedded_postgres import EmbeddedPostgres, PostgresUnavailable

logger = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 10.0


async def keep_running(server: EmbeddedPostgres) -> None:
    """Start the server again whenever it has died, until cancelled; as long as that fails, with growing pauses."""
    pause = _LOOK_EVERY_SECONDS
    while True:
        await asyncio.sleep(pause)
        if server.alive:
            pause = _LOOK_EVERY_SECONDS
            continue
        logger.warning("the embedded database has died; it is started again")
        try:
            await _whole(asyncio.to_thread(server.start))
        except (PostgresUnavailable, OSError) as error:
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            logger.error("the embedded database could not be started again: %s", error)  # noqa: TRY400  # its sentence says it all
        else:
            logger.warning("the embedded database runs again")


async def _whole(starting: Coroutine[Any, Any, None]) -> None:
    """Await a start to its end even when cancelled: its thread would otherwise go on beside the stop that follows."""
    task = asyncio.create_task(starting)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
