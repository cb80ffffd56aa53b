"""Pruning: what a tenant's retention no longer asks for leaves the database, batch by batch.

Each batch is one transaction, and between two of them nothing waits. After each of them the rest verifies and rebuilds,
so a pruning may end anywhere, and the next one goes on from there. The batch that a pruning begins with is told of at
once, by an event in the tenant's stream; what the others take, however many they are, by one more when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import CheckpointStore

BATCH_EVENTS = 5_000
"""At most so many events go in one transaction, and fewer where they would take longer than about a second."""


@dataclass(frozen=True, kw_only=True)
class PrunedBatch:
    """What one batch took: `events` that went, and the new stubs of so many `streams`.

    `checkpoint` is the one up to which the pruning goes, None where none is old enough and archived. `more` says that
    this was not the last batch.
    """

    checkpoint: int | None
    streams: int = 0
    events: int = 0
    more: bool = False


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What one pruning took."""

    checkpoint: int | None
    streams: int
    events: int


async def prune_events(
    store: CheckpointStore, tenant_id: UUID, *, actor: str, batch_events: int = BATCH_EVENTS
) -> Pruned:
    """Prune all that a tenant's retention no longer asks for, at most `batch_events` in one transaction.

    Cancel it, or end the process, at any point: the next pruning goes on with what is left. Two at once share the work.

    Raises:
        StorageUnavailable: the database is away, or somebody else prunes or signs just now; what went is gone.
    """
    streams = events = 0
    while True:
        batch = await store.prune(tenant_id, actor=actor, limit=batch_events)
        streams += batch.streams
        events += batch.events
        if not batch.more:
            return Pruned(checkpoint=batch.checkpoint, streams=streams, events=events)
