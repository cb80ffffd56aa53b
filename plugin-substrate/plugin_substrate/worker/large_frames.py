"""A frame too large for the decoder's buffer: each large segment is received into the memory that it stays in.

Copying 16 MiB once more would cost little; fresh memory for the copy costs three times as much as all else that is done
with the bytes, as the system clears it page by page and the allocator gives it back after each frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

_GROWTH = 4
_LEAST_BYTES = 64 << 10
_MOST_MORE = 8 << 20  # is cleared in one go, on the host's event loop


class GrowingBytes:
    """Bytes that arrive one portion after the other; their memory grows with them, at most fourfold at a time."""

    def __init__(self, size: int) -> None:
        """``size`` is how many will arrive, as announced: it takes no memory yet."""
        self._size = size
        self._arrived = 0
        self._allotted = 0
        self._memory = io.BytesIO()

    @property
    def missing(self) -> int:
        """How many bytes are still to come."""
        return self._size - self._arrived

    def room(self, most: int) -> memoryview:
        """Return where the next bytes go, at most so many; release it before anything else is called."""
        if self._allotted == self._arrived:
            self._grow()
        return self._memory.getbuffer()[self._arrived : min(self._arrived + most, self._allotted)]

    def received(self, count: int) -> None:
        """Keep the first ``count`` bytes of the room."""
        self._arrived += count

    def value(self) -> bytes:
        """Return the bytes, once none is missing: the memory that they were received in, and no copy."""
        return self._memory.getvalue()

    def _grow(self) -> None:
        more = min(max((_GROWTH - 1) * self._arrived, _LEAST_BYTES), _MOST_MORE, self.missing)
        self._allotted += more
        self._memory.seek(self._allotted - 1)
        self._memory.write(b"\0")


class LargeFrame:
    """The header of a frame, and its segments as far as they have arrived."""

    def __init__(self, header: dict[str, Any], lengths: Sequence[int], arrived: int) -> None:
        """``arrived`` is how many bytes came before the segments, of which there is at least one that is not empty."""
        self.header = header
        self.segments: list[bytes] = []
        self.arrived = arrived
        self._lengths = lengths
        self._segment = GrowingBytes(lengths[0])
        self._go_on()

    @property
    def missing(self) -> int:
        """How many bytes of the segment under way are still to come; 0 when the frame is complete."""
        return self._segment.missing

    def room(self, most: int) -> memoryview:
        """Return where the next bytes of the segment under way go; then release it, and tell `received` how many."""
        return self._segment.room(most)

    def received(self, count: int) -> None:
        """Keep the first ``count`` bytes of the room."""
        self.arrived += count
        self._segment.received(count)
        self._go_on()

    def take(self, data: memoryview) -> int:
        """Copy what belongs to this frame from the beginning of ``data``; returns how much that was."""
        taken = 0
        while self.missing and taken < len(data):
            with self.room(len(data) - taken) as room:
                count = len(room)
                room[:] = data[taken : taken + count]
            self.received(count)
            taken += count
        return taken

    def _go_on(self) -> None:
        while not self.missing and len(self.segments) < len(self._lengths):
            self.segments.append(self._segment.value())
            if len(self.segments) < len(self._lengths):
                self._segment = GrowingBytes(self._lengths[len(self.segments)])
