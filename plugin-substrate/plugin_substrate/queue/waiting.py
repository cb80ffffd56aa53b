"""Which waiting job is next: fair between owners, by priority and age within one, as far as slots and resources go.

Of two owners the one with fewer jobs running goes first, then the one that has had less time so far. Within an owner
the lower *rank* goes first: the time of submission less a bonus per level of priority. As that bonus is time, a job
that waits gains on all that come later, and none waits for ever. A job that has found too little of a resource for
longer than ``patience`` seconds has it reserved: others that would take of it wait, so that a large job is not passed
by small ones for ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from plugin_substrate.errors import ResourceShortfall
from plugin_substrate.queue.job import BlockReason
from plugin_substrate.queue.resources import Demand, Ledger

LaneKey = tuple[str, str]  #: instance, and the tenant when it has a worker of its own
Rank = tuple[float, int]  #: the lower goes first; the order of submission decides between equals


@dataclass(order=True)
class _Entry:
    rank: Rank
    job_id: str = field(compare=False)
    lane: Lane = field(compare=False)
    owner: str = field(compare=False)
    waits: bool = field(default=True, compare=False)


@dataclass(eq=False)
class Lane:
    """The jobs of one worker: those that wait, by owner, and those that hold a slot."""

    key: LaneKey
    demand: Demand
    heaps: dict[str, list[_Entry]] = field(default_factory=dict)
    holding: set[str] = field(default_factory=set)
    short_since: float | None = None
    shortage: ResourceShortfall | None = None


@dataclass
class _Share:
    """What an owner has had: ``served`` is in seconds, and starts where the owner served least stands."""

    served: float
    running: int = 0
    waiting: int = 0


class WaitingJobs:
    """The jobs that wait, and who holds slots and resources. Knows no clock and no loop; ``slots`` is asked each time.

    Submitting and choosing cost the logarithm of the number of jobs, and grow with the number of owners of a worker and
    of workers that take resources, not with the jobs that wait.
    """

    def __init__(self, ledger: Ledger, slots: Callable[[str], int], *, patience: float) -> None:
        self.ledger = ledger
        self._slots = slots
        self._patience = patience
        self._lanes: dict[LaneKey, Lane] = {}
        self._contended: dict[LaneKey, Lane] = {}  # those that take resources
        self._entries: dict[str, _Entry] = {}
        self._started: dict[str, _Entry] = {}
        self._shares: dict[str, _Share] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def add(self, job_id: str, key: LaneKey, owner: str, rank: Rank, demand: Demand) -> None:
        """Have a job wait."""
        lane = self._lanes.setdefault(key, Lane(key, demand))
        lane.demand = demand
        if demand:
            self._contended[key] = lane
        self._push(_Entry(rank, job_id, lane, owner))
        self._share(owner).waiting += 1

    def remove(self, job_id: str) -> bool:
        """Have it wait no longer; False when it did not."""
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return False
        entry.waits = False
        self._shares[entry.owner].waiting -= 1
        self._clean(entry)
        return True

    def reorder(self, job_id: str, rank: Rank) -> None:
        """Give a waiting job another rank."""
        old = self._entries[job_id]
        old.waits = False
        self._push(_Entry(rank, job_id, old.lane, old.owner))

    def start_next(self, key: LaneKey, now: float) -> Iterator[str]:
        """Yield the jobs that start now that something has changed in one lane; each holds its slot from here on."""
        lane = self._lanes.get(key)
        if lane is None or lane.demand:  # what its last job held is for others now
            yield from self.start_any(now, contended=True)
            return
        while (entry := self._head(lane)) is not None and len(lane.holding) < self._slots(key[0]):
            yield self._begin(entry)

    def start_any(self, now: float, *, contended: bool = False) -> Iterator[str]:
        """Yield the jobs that start now, of all lanes or of those alone that take resources."""
        if not contended:
            for key in [key for key, lane in self._lanes.items() if not lane.demand]:
                yield from self.start_next(key, now)
        while (entry := self._first_that_fits(now)) is not None:
            yield self._begin(entry)

    def end(self, job_id: str, seconds: float) -> LaneKey:
        """Take slot and resources of a started job back; return its lane."""
        entry = self._started.pop(job_id)
        entry.lane.holding.discard(job_id)
        self.ledger.give_back(job_id)
        share = self._shares[entry.owner]
        share.running -= 1
        share.served += seconds
        self._clean(entry)
        return entry.lane.key

    def why(self, job_id: str) -> BlockReason:
        """Say what a waiting job waits for. Looks at every job of its worker."""
        mine = self._entries[job_id]
        lane = mine.lane
        others = (entry for heap in lane.heaps.values() for entry in heap if entry.waits)
        ahead = sum(1 for entry in others if self._goes_before(entry, mine))
        return self.reason(job_id, ahead)

    def reason(self, job_id: str, ahead: int = 0) -> BlockReason:
        """Say what a waiting job waits for, in constant time."""
        lane = self._entries[job_id].lane
        behind = f"; {ahead} jobs go first" if ahead else ""
        slots = self._slots(lane.key[0])
        holders = tuple(sorted(lane.holding))
        short = lane.shortage or (self.ledger.missing(lane.key, lane.demand) if lane.demand else None)
        if len(lane.holding) < slots and short is not None:
            holders = self.ledger.holders(short.resource)
            text = (
                f"{lane.key[0]!r} needs {short.needed:g} of {short.resource}, and {short.available:g} are free"
                + (f"; held by {', '.join(holders)}" if holders else "")
                + behind
            )
            return BlockReason(
                resource=short.resource,
                needed=short.needed,
                available=short.available,
                holders=holders,
                jobs_ahead=ahead,
                text=text,
            )
        return BlockReason(
            resource="slots",
            needed=1.0,
            available=float(max(0, slots - len(lane.holding))),
            holders=holders,
            jobs_ahead=ahead,
            text=f"all {slots} slots of {lane.key[0]!r} are held by {', '.join(holders)}{behind}",
        )

    def heads(self) -> Iterator[str]:
        """Yield, of each lane that takes resources, the job that would start next."""
        for lane in self._contended.values():
            if (entry := self._head(lane)) is not None:
                yield entry.job_id

    # -- who is next

    def _first_that_fits(self, now: float) -> _Entry | None:
        """The best of the heads whose lane has a slot and whose resources are there and reserved for nobody else."""
        heads = [
            entry
            for lane in self._contended.values()
            if len(lane.holding) < self._slots(lane.key[0]) and (entry := self._head(lane))
        ]
        reserved: dict[str, _Entry] = {}
        # Who has waited too long is asked first, so that what is reserved is reserved before it is given away.
        heads.sort(key=lambda entry: (not self._impatient(entry.lane, now), self._order(entry)))
        for entry in heads:
            lane = entry.lane
            short = self.ledger.missing(lane.key, lane.demand)
            needs = self.ledger.needs(lane.key, lane.demand)
            taken = next((name for name in needs if name in reserved), None)
            if short is None and taken is None:
                return entry
            if short is not None:
                lane.shortage = short
                lane.short_since = now if lane.short_since is None else lane.short_since
                if self._impatient(lane, now):
                    reserved.setdefault(short.resource, entry)
            elif taken is not None:
                lane.shortage = ResourceShortfall(taken, needs[taken], 0.0)
        return None

    def _impatient(self, lane: Lane, now: float) -> bool:
        return lane.short_since is not None and now - lane.short_since >= self._patience

    def _head(self, lane: Lane) -> _Entry | None:
        """The job of a lane that is next, without looking at slots and resources."""
        best = None
        for owner in list(lane.heaps):
            heap = lane.heaps[owner]
            while heap and not heap[0].waits:
                heapq.heappop(heap)
            if not heap:
                del lane.heaps[owner]
            elif best is None or self._order(heap[0]) < self._order(best):
                best = heap[0]
        return best

    def _order(self, entry: _Entry) -> tuple[int, float, Rank]:
        share = self._shares[entry.owner]
        return share.running, share.served, entry.rank

    def _goes_before(self, one: _Entry, other: _Entry) -> bool:
        """Whether one is before the other now; between owners only who has had less is looked at."""
        return one.rank < other.rank if one.owner == other.owner else self._order(one) < self._order(other)

    def _begin(self, entry: _Entry) -> str:
        lane = entry.lane
        heapq.heappop(lane.heaps[entry.owner])
        del self._entries[entry.job_id]
        entry.waits = False
        lane.holding.add(entry.job_id)
        lane.short_since, lane.shortage = None, None
        self.ledger.take(lane.key, entry.job_id, lane.demand)
        share = self._shares[entry.owner]
        share.waiting -= 1
        share.running += 1
        self._started[entry.job_id] = entry
        return entry.job_id

    def _push(self, entry: _Entry) -> None:
        self._entries[entry.job_id] = entry
        heapq.heappush(entry.lane.heaps.setdefault(entry.owner, []), entry)

    def _share(self, owner: str) -> _Share:
        """An owner's share; a new one is not given what it did not ask for while it was away."""
        share = self._shares.get(owner)
        if share is None:
            least = min((other.served for other in self._shares.values()), default=0.0)
            share = self._shares[owner] = _Share(served=least)
        return share

    def _clean(self, entry: _Entry) -> None:
        """Forget a lane and an owner that have no jobs any more."""
        share = self._shares[entry.owner]
        if not share.waiting and not share.running:
            del self._shares[entry.owner]
        lane = entry.lane
        if not lane.holding and self._lanes.get(lane.key) is lane and self._head(lane) is None:
            del self._lanes[lane.key]
            self._contended.pop(lane.key, None)
