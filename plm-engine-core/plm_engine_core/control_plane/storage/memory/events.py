"""Event streams, and the checkpoints over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.events.archive import Piece
from plm_engine_core.control_plane.events.chain import Link
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head
from plm_engine_core.control_plane.events.event import Event, link_of
from plm_engine_core.control_plane.events.feed import BEGINNING, FeedCursor, FeedPage
from plm_engine_core.control_plane.events.pruning import PrunedBatch
from plm_engine_core.control_plane.events.standing import Standing, ticket_standing
from plm_engine_core.control_plane.events.verify import StreamHead
from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.storage.memory.values import storable_text
from plm_engine_core.control_plane.storage.rows import budget_standing, event_row, run_standing, ticket_row

Make = Callable[[Checkpoint | None, Sequence[Head], Sequence[Head], datetime], Checkpoint]


class MemoryEvents:
    """Events in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def read(self, tenant_id: UUID, stream: str, *, after: int = 0, limit: int = 500) -> Sequence[Event]:
        """Events of one stream in order, from sequence `after` + 1."""
        async with self._books.turn() as books:
            return _events(books, tenant_id, storable_text(stream), max(after, 0), limit)

    async def feed(self, tenant_id: UUID, *, after: FeedCursor = BEGINNING, limit: int = 500) -> FeedPage:
        """Events of all streams after a cursor; nothing is ever held back, for what is visible here is complete."""
        after = after.of(tenant_id)
        async with self._books.turn() as books:
            if after.position > books.transactions:
                raise InvalidRequest(
                    "this cursor was given by another database; leave it out to begin anew", field="cursor"
                )
            streams = [row["stream"] for row in books.event_streams.rows(tenant_id)]
            rows = [row for name in streams for row in books.events.rows((tenant_id, name)) if _feed(row) > _at(after)]
            page = sorted(rows, key=_feed)[:limit]
            last = page[-1] if page else None
            if last is not None:
                after = FeedCursor(last["feed_position"], last["stream"], last["seq"], tenant=str(tenant_id))
            cursor = replace(after, pruned=0)  # nothing ever is
            return FeedPage(events=[_event(row) for row in page], cursor=cursor)

    async def misplaced(self, tenant_id: UUID, *, stream: str | None = None, after: int = 0) -> Mapping[str, int]:  # noqa: ARG002  # looks at all
        """By stream, the first event whose place in the feed is not where its stream has it."""
        found: dict[str, int] = {}
        async with self._books.turn() as books:
            for head in books.event_streams.rows(tenant_id):
                before = 0
                for event in sorted(books.events.rows((tenant_id, head["stream"])), key=lambda row: row["seq"]):
                    place = event["feed_position"]
                    moved = event["seq"] == head["last_seq"] and place != head["last_position"]
                    if place < before or place > head["last_position"] or moved:
                        found.setdefault(head["stream"], event["seq"])
                    before = place
        return {name: seq for name, seq in found.items() if stream in (None, name)}

    async def fold(self, tenant_id: UUID, apply: Callable[[Event], None]) -> Standing:
        """Hand every event to `apply`, in the order of its stream, and answer what the tables said at that instant."""
        async with self._books.turn() as books:
            for head in _heads(books, tenant_id):
                for event in _events(books, tenant_id, head.stream, 0, None):
                    apply(event)
            return Standing(
                runs={row["run_id"]: run_standing(row) for row in books.run_states.rows(tenant_id)},
                tickets={row["id"]: ticket_standing(ticket_row(row)) for row in books.approval_tickets.rows(tenant_id)},
                budgets=dict(map(budget_standing, books.budgets.rows(tenant_id))),
            )

    async def heads(self, tenant_id: UUID) -> Sequence[StreamHead]:
        """Every stream of the tenant with its head."""
        async with self._books.turn() as books:
            heads = _heads(books, tenant_id)
            return [
                StreamHead(
                    stream=head.stream,
                    last_seq=head.seq,
                    last_hash=head.hash,
                    stored_seq=len(books.events.rows((tenant_id, head.stream))),
                )
                for head in heads
            ]


class MemoryCheckpoints:
    """Checkpoints, and the events they cover."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def tenants(self) -> Sequence[UUID]:
        """Every tenant there is."""
        async with self._books.turn() as books:
            return sorted(row["id"] for row in books.tenants.rows(None))

    async def take(self, tenant_id: UUID, make: Make) -> Checkpoint | None:
        """Store what `make` makes of the newest checkpoint, all heads, those that changed, and the time."""
        async with self._books.turn() as books:
            heads = _heads(books, tenant_id)
            known = _covered_heads(books, tenant_id)
            changed = [head for head in heads if head.stream not in known or known[head.stream].seq != head.seq]
            if not changed:
                return None
            checkpoint = make(_newest(books, tenant_id), heads, changed, books.now())
            books.event_checkpoints.put(tenant_id, checkpoint.number, {"checkpoint": checkpoint})
            return checkpoint

    async def read(self, tenant_id: UUID, *, after: int = 0, limit: int = 100) -> Sequence[Checkpoint]:
        """Checkpoints in order, from number `after` + 1."""
        async with self._books.turn() as books:
            found = [checkpoint for checkpoint in _checkpoints(books, tenant_id) if checkpoint.number > after][:limit]
            return [replace(each, heads=tuple(sorted(each.heads, key=_name))) for each in found]

    async def newest(self, tenant_id: UUID) -> Checkpoint | None:
        """The newest checkpoint, without its heads."""
        async with self._books.turn() as books:
            return _newest(books, tenant_id)

    async def heads(self, tenant_id: UUID, *, number: int) -> Sequence[Head]:
        """Every head as the checkpoint `number` covers it."""
        async with self._books.turn() as books:
            return sorted(_covered_heads(books, tenant_id, number).values(), key=_name)

    async def archived(self, tenant_id: UUID) -> int:
        """The newest checkpoint that a recorded piece holds; 0 before the first."""
        async with self._books.turn() as books:
            return max((row["number"] for row in books.event_exports.rows(tenant_id)), default=0)

    async def record_piece(self, tenant_id: UUID, piece: Piece) -> None:
        """Record a stored piece of the archive."""
        async with self._books.turn() as books:
            if books.event_checkpoints.get(tenant_id, piece.number) is None:
                raise NotFound("tenant", "of this request")
            if books.event_exports.get(tenant_id, piece.number) is None:
                books.event_exports.put(tenant_id, piece.number, asdict(piece))

    async def pruned(self, tenant_id: UUID) -> int:  # noqa: ARG002  # nothing ever is
        """The newest checkpoint of which events were pruned: none, for nothing is ever dropped here."""
        return 0

    async def prune(self, tenant_id: UUID, *, actor: str, limit: int) -> PrunedBatch:  # noqa: ARG002  # as above
        """Prune nothing: there is no owner here who could have set a retention."""
        return PrunedBatch(checkpoint=None)

    def covered(self, tenant_id: UUID, number: int) -> Iterator[Link]:
        """The events that checkpoint `number` covers and the one before it does not, by stream and sequence."""
        with self._books.transaction() as books:
            before = _covered_heads(books, tenant_id, number - 1)
            row = books.event_checkpoints.get(tenant_id, number)
            links = [
                link_of(event)
                for head in sorted(row["checkpoint"].heads if row else (), key=_name)
                for event in _since(books, tenant_id, head.stream, before)
                if event.seq <= head.seq
            ]
        return iter(links)

    def links(self, tenant_id: UUID, *, streams: Collection[str] | None = None, after: int = 0) -> Iterator[Link]:
        """Every event, of these streams or of all, that checkpoint `after` does not cover, by stream and sequence."""
        with self._books.transaction() as books:
            before = _covered_heads(books, tenant_id, after)
            links = [
                link_of(event)
                for head in _heads(books, tenant_id)
                if streams is None or head.stream in streams
                for event in _since(books, tenant_id, head.stream, before)
            ]
        return iter(links)


def _heads(books: Books, tenant_id: UUID) -> list[Head]:
    rows = books.event_streams.rows(tenant_id)
    return sorted((Head(row["stream"], row["last_seq"], row["last_hash"]) for row in rows), key=_name)


def _checkpoints(books: Books, tenant_id: UUID) -> list[Checkpoint]:
    return [row["checkpoint"] for row in books.event_checkpoints.rows(tenant_id)]


def _newest(books: Books, tenant_id: UUID) -> Checkpoint | None:
    taken = _checkpoints(books, tenant_id)
    return replace(taken[-1], heads=()) if taken else None


def _covered_heads(books: Books, tenant_id: UUID, number: int | None = None) -> dict[str, Head]:
    """How far each stream was covered by the checkpoints up to `number`, or by all."""
    covered: dict[str, Head] = {}
    for checkpoint in _checkpoints(books, tenant_id):
        if number is None or checkpoint.number <= number:
            covered |= {head.stream: head for head in checkpoint.heads}
    return covered


def _since(books: Books, tenant_id: UUID, stream: str, covered: dict[str, Head]) -> list[Event]:
    known = covered.get(stream)
    return _events(books, tenant_id, stream, known.seq if known else 0, None)


def _events(books: Books, tenant_id: UUID, stream: str, after: int, limit: int | None) -> list[Event]:
    rows = books.events.rows((tenant_id, stream))[after:]
    return [_event(row) for row in (rows if limit is None else rows[:limit])]


def _event(row: Row) -> Event:
    return event_row({name: value for name, value in row.items() if name != "feed_position"})


def _feed(row: Row) -> tuple[int, bytes, int]:
    return row["feed_position"], row["stream"].encode(), row["seq"]


def _at(cursor: FeedCursor) -> tuple[int, bytes, int]:
    return cursor.position, cursor.stream.encode(), cursor.seq


def _name(head: Head) -> bytes:
    return head.stream.encode()
