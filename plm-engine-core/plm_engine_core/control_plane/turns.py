"""Turns: which rows one pass of a sweeper works on, where more is due than it can do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest
from uuid import UUID


class Turns:
    """Each tenant has its turn, and what failed comes after all else, the one that failed longest ago first.

    So among what is due neither a tenant with very many rows nor damaged ones keep the others waiting for ever.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._failed: dict[UUID, None] = {}

    def choose(self, due: Iterable[tuple[UUID, UUID]]) -> Sequence[tuple[UUID, UUID]]:
        """At most a batch of what is due, each by tenant and id; a tenant's own rows stay in the given order."""
        tenants: dict[UUID, UUID] = {}
        fresh: dict[UUID, list[UUID]] = defaultdict(list)
        for tenant_id, row_id in due:
            tenants[row_id] = tenant_id
            if row_id not in self._failed:
                fresh[tenant_id].append(row_id)
        failed = [row_id for row_id in self._failed if row_id in tenants]
        turns = (row_id for turn in zip_longest(*fresh.values()) for row_id in turn if row_id is not None)
        chosen = list(islice(chain(turns, failed), self._batch))
        self._failed = dict.fromkeys(failed)
        for row_id in chosen:
            self._failed.pop(row_id, None)
        return [(tenants[row_id], row_id) for row_id in chosen]

    def failed(self, row_id: UUID) -> None:
        """A chosen row could not be worked on; while it is due it comes again, last."""
        self._failed[row_id] = None
