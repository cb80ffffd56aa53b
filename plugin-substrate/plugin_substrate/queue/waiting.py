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
from operator import itemgetter

from plugin_substrate.errors import ResourceShortfall
from plugin_substrate.queue.job import BlockReason
from plugin_substrate.queue.resources import Demand, Ledger

LaneKey = tuple[str, str]  #: instance, and the tenant when it has a worker of its own
Rank = tuple[float, int]  #: the lower goes first; the order of submission decides between equals

# Where a job waits: its rank, itself, its lane and its owner. The same tuple stands in a heap, void there when the job
# waits no longer, or elsewhere. A long queue is many of them; plain as they are, the collector looks into none.
_Place = tuple[float, int, str, LaneKey, str]


@dataclass(eq=False)
class Lane:
    """The jobs of one worker: those that wait, by owner, and those that hold a slot."""

    key: LaneKey
    demand: Demand
    heaps: dict[str, list[_Place]] = field(default_factory=dict)
    void: int = 0  # how many places in the heaps are void; never too few
    holding: set[str] = field(default_factory=set)
    short_since: float | None = None
    shortage: ResourceShortfall | None = None
    reason: BlockReason | None = None  # what was said last; all that wait for the same share one object


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
        self._places: dict[str, _Place] = {}
        self._started: dict[str, tuple[LaneKey, str]] = {}  # lane and owner
        self._shares: dict[str, _Share] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._places

    def add(self, job_id: str, key: LaneKey, owner: str, rank: Rank, demand: Demand) -> None:
        """Have a job wait."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key, demand)
        lane.demand = demand
        if demand:
            self._contended[key] = lane
        self._push((*rank, job_id, lane.key, owner))  # the lane's own key, which all of its jobs share
        self._share(owner).waiting += 1

    def remove(self, job_id: str) -> bool:
        """Have it wait no longer; False when it did not."""
        place = self._places.pop(job_id, None)
        if place is None:
            return False
        *_, key, owner = place
        self._shares[owner].waiting -= 1
        self._void_place(self._lanes[key])
        self._clean(key, owner)
        return True

    def reorder(self, job_id: str, rank: Rank) -> None:
        """Give a waiting job another rank."""
        *_, key, owner = self._places[job_id]
        self._push((*rank, job_id, key, owner))
        self._void_place(self._lanes[key])

    def lane_of(self, job_id: str) -> LaneKey:
        """Return the lane in which a job waits."""
        return self._places[job_id][3]

    def would_start(self, job_id: str, now: float) -> bool:
        """Whether a waiting job is the first that `start_next` of its lane would yield."""
        lane = self._lanes[self.lane_of(job_id)]
        if lane.demand:
            return self._first_that_fits(now) == job_id
        return len(lane.holding) < self._slots(lane.key[0]) and self._head(lane) == job_id

    def start_next(self, key: LaneKey, now: float) -> Iterator[str]:
        """Yield the jobs that start now that something has changed in one lane; each holds its slot from here on."""
        lane = self._lanes.get(key)
        if lane is None or lane.demand:  # what its last job held is for others now
            yield from self.start_any(now, contended=True)
            return
        while (job_id := self._head(lane)) is not None and len(lane.holding) < self._slots(key[0]):
            yield self._begin(job_id)

    def start_any(self, now: float, *, contended: bool = False) -> Iterator[str]:
        """Yield the jobs that start now, of all lanes or of those alone that take resources."""
        if not contended:
            for key in [key for key, lane in self._lanes.items() if not lane.demand]:
                yield from self.start_next(key, now)
        while (job_id := self._first_that_fits(now)) is not None:
            yield self._begin(job_id)

    def end(self, job_id: str, seconds: float) -> LaneKey:
        """Take slot and resources of a started job back; return its lane."""
        key, owner = self._started.pop(job_id)
        self._lanes[key].holding.discard(job_id)
        self.ledger.give_back(job_id)
        share = self._shares[owner]
        share.running -= 1
        share.served += seconds
        self._clean(key, owner)
        return key

    def why(self, job_id: str) -> BlockReason:
        """Say what a waiting job waits for. Looks at every job of its worker."""
        place = self._places[job_id]
        *_, key, owner = place
        lane, order = self._lanes[key], self._order(job_id)
        ahead = 0
        for other_owner, heap in lane.heaps.items():
            others = filter(self._is_valid, heap)
            if other_owner == owner:
                ahead += sum(1 for other in others if other < place)
            else:  # between owners only who has had less is looked at
                ahead += sum(1 for other in others if self._order(other[2]) < order)
        return self._reason(lane, ahead)

    def reason(self, job_id: str) -> BlockReason:
        """Say what a waiting job waits for, in constant time."""
        lane = self._lanes[self.lane_of(job_id)]
        reason = self._reason(lane, 0)
        if reason != lane.reason:
            lane.reason = reason
        return lane.reason or reason

    def _reason(self, lane: Lane, ahead: int) -> BlockReason:
        behind = f"; {ahead} {'job goes' if ahead == 1 else 'jobs go'} first" if ahead else ""
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
            text=f"{_slots_of(slots, lane.key[0])} held by {', '.join(holders)}{behind}",
        )

    def heads(self) -> Iterator[str]:
        """Yield, of each lane that takes resources, the job that would start next."""
        for lane in self._contended.values():
            if (job_id := self._head(lane)) is not None:
                yield job_id

    # -- who is next

    def _first_that_fits(self, now: float) -> str | None:
        """The best of the heads whose lane has a slot and whose resources are there and reserved for nobody else."""
        heads = [
            (not self._impatient(lane, now), self._order(job_id), job_id, lane)
            for lane in self._contended.values()
            if len(lane.holding) < self._slots(lane.key[0]) and (job_id := self._head(lane)) is not None
        ]
        reserved: set[str] = set()
        # Who has waited too long is asked first, so that what is reserved is reserved before it is given away.
        for _, _, job_id, lane in sorted(heads, key=itemgetter(0, 1)):
            short = self.ledger.missing(lane.key, lane.demand)
            needs = self.ledger.needs(lane.key, lane.demand)
            taken = next((name for name in needs if name in reserved), None)
            if short is None and taken is None:
                return job_id
            if short is not None:
                lane.shortage = short
                lane.short_since = now if lane.short_since is None else lane.short_since
                if self._impatient(lane, now):
                    reserved.add(short.resource)
            elif taken is not None:
                lane.shortage = ResourceShortfall(taken, needs[taken], 0.0)
        return None

    def _impatient(self, lane: Lane, now: float) -> bool:
        return lane.short_since is not None and now - lane.short_since >= self._patience

    def _head(self, lane: Lane) -> str | None:
        """The job of a lane that is next, without looking at slots and resources."""
        best = None
        for owner in list(lane.heaps):
            heap = lane.heaps[owner]
            while heap and not self._is_valid(heap[0]):
                heapq.heappop(heap)
            if not heap:
                del lane.heaps[owner]
                continue
            job_id = heap[0][2]
            if best is None or self._order(job_id) < self._order(best):
                best = job_id
        return best

    def _order(self, job_id: str) -> tuple[int, float, Rank]:
        rank, order, _, _, owner = self._places[job_id]
        share = self._shares[owner]
        return share.running, share.served, (rank, order)

    def _is_valid(self, place: _Place) -> bool:
        """Whether a place in a heap is still where its job waits."""
        return self._places.get(place[2]) is place

    def _begin(self, job_id: str) -> str:
        *_, key, owner = self._places.pop(job_id)  # with which its place in the heap is void
        lane = self._lanes[key]
        lane.holding.add(job_id)
        lane.short_since, lane.shortage = None, None
        self.ledger.take(key, job_id, lane.demand)
        share = self._shares[owner]
        share.waiting -= 1
        share.running += 1
        self._started[job_id] = key, owner
        return job_id

    def _push(self, place: _Place) -> None:
        *_, job_id, key, owner = place
        self._places[job_id] = place
        heapq.heappush(self._lanes[key].heaps.setdefault(owner, []), place)

    def _void_place(self, lane: Lane) -> None:
        """Note that a place is void, and remove the void when they are the half: they may never come to the top."""
        lane.void += 1
        if lane.void * 2 > sum(map(len, lane.heaps.values())):
            for heap in lane.heaps.values():
                heap[:] = filter(self._is_valid, heap)
                heapq.heapify(heap)
            lane.void = 0

    def _share(self, owner: str) -> _Share:
        """An owner's share; a new one is not given what it did not ask for while it was away."""
        share = self._shares.get(owner)
        if share is None:
            least = min((other.served for other in self._shares.values()), default=0.0)
            share = self._shares[owner] = _Share(served=least)
        return share

    def _clean(self, key: LaneKey, owner: str) -> None:
        """Forget a lane and an owner that have no jobs any more."""
        share = self._shares[owner]
        if not share.waiting and not share.running:
            del self._shares[owner]
        lane = self._lanes[key]
        if not lane.holding and self._head(lane) is None:
            del self._lanes[key]
            self._contended.pop(key, None)


def _slots_of(slots: int, instance_id: str) -> str:
    return f"the only slot of {instance_id!r} is" if slots == 1 else f"all {slots} slots of {instance_id!r} are"
