"""A run as it was: its state, its tickets and its budgets at a moment, folded from the events alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from plm_engine_core.control_plane.errors import Conflict, EventsPruned, InvalidRequest
from plm_engine_core.control_plane.events.event import TENANT_STREAM, Event, run_stream
from plm_engine_core.control_plane.events.projections import Projections
from plm_engine_core.control_plane.events.standing import BudgetKey, BudgetStanding, RunStanding, TicketStanding
from plm_engine_core.control_plane.vocabulary import BudgetScope, EventKind

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import Storage

_PAGE = 1_000


@dataclass(frozen=True, kw_only=True)
class RunAsOf:
    """What the events said of a run at `at`, when `seq` was the last one of its stream.

    `budgets` are the run's own. Limits are not told by events, and a wider budget is shared with other runs.
    """

    run_id: UUID
    seq: int
    at: datetime
    run: RunStanding
    tickets: Mapping[UUID, TicketStanding]
    budgets: Mapping[BudgetKey, BudgetStanding]


async def as_of(storage: Storage, tenant_id: UUID, run_id: UUID, moment: datetime | int) -> RunAsOf:
    """A run as it was at a time, or right after the event of this sequence in its stream, from the events alone.

    What was corrected of its budgets counts by its time. It reads the whole stream of the run and of its tenant. Of a
    moment that is hardly over, what is being committed may still be missing; asked again later, it is there.

    Raises:
        InvalidRequest: the moment is no time with a zone and no sequence from 1 up, lies before the run or in the
            future, or the stream ends before it.
        NotFound: no such run in this tenant.
        EventsPruned: events of before that moment are no longer in the database.
        Conflict: `clock_set_back`: the stream was at this time more than once; `events_unreadable`: an event is not one
            that this release could have written.
    """
    _check(moment)
    if isinstance(moment, datetime) and moment > await storage.runs.now():
        raise InvalidRequest(f"{moment.isoformat()} lies in the future, of which no event tells", field="moment")
    await storage.runs.get(tenant_id, run_id)
    stream = run_stream(run_id)
    whole, pruned = await _read(storage, tenant_id, stream)
    if pruned or not whole:
        raise EventsPruned(stream=stream, before=whole[0].seq if whole else None)
    told = _until_time(whole, moment) if isinstance(moment, datetime) else _until_place(whole, moment)
    at = moment if isinstance(moment, datetime) else told[-1].occurred_at
    folded = Projections()
    for event in (*told, *await _corrections(storage, tenant_id, stream, at)):
        folded.apply(event)
    problem = next((f"{where}: {why}" for where, why in folded.unreadable.items()), None)
    if problem is None and run_id not in folded.runs:
        problem = f"the first event of {stream} does not tell how the run began"
    if problem is not None:
        raise Conflict(f"{problem}; `plm-cli events verify` says what was changed", reason="events_unreadable")
    return RunAsOf(
        run_id=run_id,
        seq=told[-1].seq,
        at=at,
        run=folded.runs[run_id],
        tickets=folded.tickets,
        budgets={
            key: budget
            for key, budget in folded.budgets.items()
            if (key.scope, key.scope_id) == (BudgetScope.RUN, run_id)
        },
    )


def _check(moment: object) -> None:
    if isinstance(moment, datetime):
        if moment.utcoffset() is None:
            raise InvalidRequest(f"the moment {moment.isoformat()} needs a time zone", field="moment")
    elif type(moment) is not int or moment < 1:
        raise InvalidRequest(
            f"the moment must be a time with its zone, or the sequence of an event from 1 up, not {moment!r:.80}",
            field="moment",
        )


def _until_time(events: Sequence[Event], moment: datetime) -> Sequence[Event]:
    """The events up to a time at which the stream has been once only; a clock that was set back may come twice."""
    later = [number for number, event in enumerate(events) if event.occurred_at > moment]
    told = events[: later[0]] if later else events
    if later and any(event.occurred_at <= moment for event in events[later[0] :]):
        raise Conflict(
            f"the clock was set back, and {moment.isoformat()} was more than once in {events[0].stream}; name the "
            "sequence of an event",
            reason="clock_set_back",
        )
    if not told:
        raise InvalidRequest(
            f"the run began at {events[0].occurred_at.isoformat()}, after {moment.isoformat()}", field="moment"
        )
    return told


def _until_place(events: Sequence[Event], seq: int) -> Sequence[Event]:
    if seq > events[-1].seq:
        raise InvalidRequest(f"{events[0].stream} ends with event {events[-1].seq}, before {seq}", field="moment")
    return [event for event in events if event.seq <= seq]


async def _corrections(storage: Storage, tenant_id: UUID, run: str, at: datetime) -> Sequence[Event]:
    """What of the tenant's stream changed budgets until then; refuses where such may be gone that is of this run."""
    events, pruned = await _read(storage, tenant_id, TENANT_STREAM, kind=EventKind.BUDGET_CORRECTED)
    if pruned and await _began_before_the_rest(storage, tenant_id, run):
        raise EventsPruned(stream=TENANT_STREAM, before=pruned)
    return [event for event in events if event.occurred_at <= at]


async def _began_before_the_rest(storage: Storage, tenant_id: UUID, run: str) -> bool:
    """Whether a run was there when the checkpoint was taken up to which the tenant's own stream is gone.

    Asked of the checkpoint and not of a clock: what it does not cover began after all that went.
    """
    heads = await storage.events.heads(tenant_id)
    stub = next((head.stub for head in heads if head.stream == TENANT_STREAM), None)
    if stub is None:  # gone without a trace, which the verifier tells of
        return True
    covered = await storage.checkpoints.heads(tenant_id, number=stub.checkpoint)
    return any(head.stream == run for head in covered)


async def _read(storage: Storage, tenant_id: UUID, stream: str, *, kind: str | None = None) -> tuple[list[Event], int]:
    """The events of a stream, of one kind or all, and the first sequence that is left where its beginning is gone."""
    events: list[Event] = []
    after = 0
    while page := await storage.events.read(tenant_id, stream, after=after, limit=_PAGE):
        events += [event for event in page if kind in (None, event.kind)]
        after = page[-1].seq
    # Pruning takes the beginning first: looked at last, so that none slips in between two pages.
    first = await storage.events.read(tenant_id, stream, limit=1)
    left = first[0].seq if first else after + 1
    return events, left if left > 1 else 0
