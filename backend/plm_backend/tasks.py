"""The end of background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def end(tasks: Iterable[asyncio.Task[Any]], *, again_seconds: float) -> None:
    """Cancel tasks, and again every so often until they have ended.

    One cancel can get lost, in a library that is just giving up on the database. `again_seconds` must be longer than
    their tidying up takes, which a second cancel would break off.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again_seconds)
