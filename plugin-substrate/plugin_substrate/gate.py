"""Lets calls through, and shuts while something is changed that no call may see half-done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Counts who is inside. Belongs to one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._changing = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether nobody who comes now has to wait."""
        return self._open.is_set()

    async def enter(self) -> None:
        """Go in, waiting while it is shut; whoever went in must `leave` once."""
        while not self._open.is_set():
            await self._open.wait()
        self.enter_at_once()

    def enter_at_once(self) -> None:
        """Go in where it `is_open`; as `enter`."""
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """Go out."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """Keep out who comes, wait until all who are inside have left, and then hold it shut for the block."""
        async with self._changing:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()
