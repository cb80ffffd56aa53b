"""The worker's end of a stream: chunks go out in batches, and never more of them than the host has granted.

Credit is counted in bytes. A chunk costs what it is long, and at least `LEAST_CHARGE`, so that one number bounds both
how many chunks and how many bytes are on their way; a chunk that is longer than all the credit goes alone. The thread
that runs the generator waits while there is none: that is what slows the plugin down. Another thread sends, so that a
chunk leaves at once when the generator pauses, and many leave in one frame when it does not.

Frames: ``{"type": "chunks", "id": ..., "counts": [...]}`` with the segments of each chunk in turn, ``counts`` of them;
back comes ``{"type": "credit", "id": ..., "bytes": n}`` for what was consumed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from plugin_substrate.errors import WireValueError
from plugin_substrate.interface import ActiveCall
from plugin_substrate.worker.frames import MAX_FRAME_BYTES, MAX_SEGMENTS
from plugin_substrate.worker.parked import Segment
from plugin_substrate.worker.values import pack_value

#: How far a plugin may be ahead of who reads its stream.
WINDOW_BYTES = 256 << 10
LEAST_CHARGE = 512
#: The most that one chunk may hold.
MAX_CHUNK_BYTES = MAX_FRAME_BYTES // 2
#: The most chunks, and the most segments of them all, in one frame.
MAX_BATCH = 1024

Send = Callable[[dict[str, Any], list[bytes]], None]


def charge_of(segments: Sequence[Segment]) -> int:
    """Return what a chunk costs."""
    return max(LEAST_CHARGE, sum(map(len, segments)))


class ChunkStream:
    """The chunks of one call. `put` runs in the plugin's thread, `flush` in the sender's, `grant` in the reader's."""

    def __init__(self, call: ActiveCall, send: Send, notify: Callable[[ChunkStream], object]) -> None:
        self._call = call
        self._send = send
        self._notify = notify
        self._changed = threading.Condition()
        self._in_order = threading.Lock()  # held from taking a batch until it is sent
        self._number = 0
        self._unpaid = 0
        self._counts: list[int] = []
        self._segments: list[bytes] = []
        call.add_callback(self._wake)

    def put(self, chunk: Any) -> bool:
        """Take a chunk as soon as there is credit for it; False when the call is cancelled instead.

        One that cannot cross is a `WireValueError` that names its place, like ``chunk[3].weight``.
        """
        path = f"chunk[{self._number}]"
        segments = pack_value(chunk, path)
        charge = charge_of(segments)
        if charge > MAX_CHUNK_BYTES or len(segments) > MAX_SEGMENTS:
            reason = f"{charge} bytes in {len(segments)} segments are over the limit of a chunk"
            raise WireValueError(f"{path}: {reason} ({MAX_CHUNK_BYTES} and {MAX_SEGMENTS})", path=path)
        with self._changed:
            self._changed.wait_for(lambda: self._call.cancelled or self._has_room(charge, len(segments)))
            if self._call.cancelled:
                return False
            self._number += 1
            self._unpaid += charge
            self._counts.append(len(segments))
            self._segments += segments
            is_first = len(self._counts) == 1
        if is_first:
            self._notify(self)
        return True

    def grant(self, amount: int) -> None:
        """Hear that the host has consumed chunks worth ``amount``."""
        with self._changed:
            self._unpaid -= amount
            self._changed.notify_all()

    def flush(self) -> None:
        """Send what is there."""
        with self._in_order:
            with self._changed:
                counts, segments = self._counts, self._segments
                self._counts, self._segments = [], []
                self._changed.notify_all()
            if counts:
                self._send({"type": "chunks", "id": self._call.context.call_id, "counts": counts}, segments)

    def _has_room(self, charge: int, segments: int) -> bool:
        fits = self._unpaid == 0 or self._unpaid + charge <= WINDOW_BYTES
        return fits and (not self._counts or len(self._segments) + segments <= MAX_BATCH)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class StreamSender:
    """The thread that sends batches, started with the first stream."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[ChunkStream] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._started = False

    def notify(self, stream: ChunkStream) -> None:
        """Have a stream flushed soon."""
        with self._start:
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="stream-sender", daemon=True).start()
        self._waiting.put(stream)

    def _run(self) -> None:
        while True:
            self._waiting.get().flush()
