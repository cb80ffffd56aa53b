"""The verifier: finds the first event of a stream that is not what was appended."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass

from plm_engine_core.control_plane.events.event import Event, event_hash


@dataclass(frozen=True, kw_only=True)
class StreamHead:
    """The last sequence and hash of a stream as its head row has them, and the last event stored at that instant."""

    stream: str
    last_seq: int
    last_hash: bytes
    stored_seq: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result for one stream.

    Without an export outside the database a good chain is "consistent": whoever can rewrite the whole database
    could have rewritten the whole chain.
    """

    stream: str
    events: int
    first_bad_seq: int | None = None
    problem: str = ""

    @property
    def consistent(self) -> bool:
        """Whether every link holds and the head matches."""
        return self.first_bad_seq is None


async def verify_stream(head: StreamHead, events: AsyncIterable[Event]) -> Verification:
    """Walk a stream in order up to its head, and check every link and the head.

    What is appended after the head was read is left to the next time.
    """
    previous = b""
    expected = 1
    async for event in events:
        if event.seq > head.last_seq:
            break
        problem = _problem(event, expected, previous)
        if problem:
            return Verification(stream=head.stream, events=expected - 1, first_bad_seq=expected, problem=problem)
        previous = event.hash
        expected += 1
    count = expected - 1
    if count == head.last_seq == head.stored_seq and previous == head.last_hash:
        return Verification(stream=head.stream, events=count)
    if count == head.stored_seq == head.last_seq:
        return Verification(
            stream=head.stream, events=count, first_bad_seq=max(count, 1), problem="the head has another hash"
        )
    return Verification(
        stream=head.stream,
        events=count,
        first_bad_seq=count + 1,
        problem=f"the stream ends at {max(count, head.stored_seq)}, its head says {head.last_seq}",
    )


def _problem(event: Event, expected: int, previous: bytes) -> str:
    if event.seq != expected:
        return f"event {expected} is missing; the next one is {event.seq}"
    if event.prev_hash != previous:
        return "it does not continue the event before it"
    if event_hash(event) != event.hash:
        return "its content does not match its hash"
    return ""
