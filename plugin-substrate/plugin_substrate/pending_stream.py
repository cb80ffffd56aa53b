"""A stream from the moment it has a slot until its end: chunks as they come, and credit for those that were taken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from plugin_substrate.errors import ProtocolError, WireValueError
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.worker.parked import Segment
from plugin_substrate.worker.streams import WINDOW_BYTES, charge_of
from plugin_substrate.worker.values import unpack_value

#: Half of the credit is with the reader while the plugin works for the other half.
_BATCH_BYTES = WINDOW_BYTES // 2


class PendingStream(PendingCall):
    """A streaming call, as the host sees it. What is held here is bounded by the credit that was granted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.late = False
        self._chunks: deque[tuple[Segment, ...]] = deque()
        self._number = 0
        self._unpaid = 0
        self._taken = 0
        self._arrived = asyncio.Event()
        self._grant: Callable[[int], object] = lambda _: None
        self._refuse: Callable[[Exception], object] = lambda _: None
        self.when_done(self._arrived.set)

    def opened(self, *, grant: Callable[[int], object], refuse: Callable[[Exception], object]) -> None:
        """Hear how to give the worker more credit, and how to end one that breaks the protocol."""
        self._grant = grant
        self._refuse = refuse

    def receive(self, counts: Sequence[int], segments: Sequence[Segment]) -> None:
        """Keep chunks of ``counts`` segments each; more than there was credit for are a `ProtocolError`."""
        start = 0
        for count in counts:
            chunk = tuple(segments[start : start + count])
            start += count
            charge = charge_of(chunk)
            if self._unpaid and self._unpaid + charge > WINDOW_BYTES:
                raise ProtocolError("more chunks of a stream than there was credit for")
            self._unpaid += charge
            self._chunks.append(chunk)
        self._arrived.set()

    async def next_batch(self) -> list[Any]:
        """Return the next chunks, an empty list after the last; asking for more is what pays for those before.

        What ended the stream too early is raised once everything that came before it was taken.
        """
        self._pay()
        while not self._chunks:
            if self.done:
                self.result()
                return []
            self._arrived.clear()
            await self._arrived.wait()
        batch = self._take()
        try:
            if self._taken > WINDOW_BYTES:
                return await asyncio.to_thread(self._decode, batch)
            return self._decode(batch)
        except ProtocolError as error:
            self._refuse(error)
            await self.wait()
            self._chunks.clear()
            return await self.next_batch()

    def _pay(self) -> None:
        if self._taken and not self.done:
            self._unpaid -= self._taken
            self._grant(self._taken)
        self._taken = 0

    def _take(self) -> list[tuple[Segment, ...]]:
        batch = []
        while self._chunks and self._taken < _BATCH_BYTES:
            batch.append(self._chunks.popleft())
            self._taken += charge_of(batch[-1])
        return batch

    def _decode(self, batch: list[tuple[Segment, ...]]) -> list[Any]:
        first, self._number = self._number, self._number + len(batch)
        try:
            return [unpack_value(chunk, f"chunk[{number}]") for number, chunk in enumerate(batch, first)]
        except WireValueError as error:
            error.outcome_known = False
            raise
