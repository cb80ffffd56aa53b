"""The verifier: finds the first event of a stream that is not what was appended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events.chain import Chain, Link
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head, root_problem
from plm_engine_core.control_plane.events.export import Exported
from plm_engine_core.control_plane.events.signing import PublicKeys

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import CheckpointStore, Storage

_Value = TypeVar("_Value")

CHECKPOINTS = "checkpoints"
"""Stands for the chain of checkpoints among the results for streams; no stream has this name."""


@dataclass(frozen=True, kw_only=True)
class Stub:
    """What stays behind of the beginning of a stream that was pruned: its last sequence and hash.

    `covered` says whether the checkpoint that it names says the same.
    """

    seq: int
    hash: bytes
    checkpoint: int
    covered: bool


@dataclass(frozen=True, kw_only=True)
class StreamHead:
    """The last sequence and hash of a stream as its head row has them, and the last event stored at that instant.

    `stored_seq` is that of the stub where no event is stored after it.
    """

    stream: str
    last_seq: int
    last_hash: bytes
    stored_seq: int
    stub: Stub | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result for one stream. `events` are those that were checked and are good.

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


def verify_streams(
    tenant_id: UUID,
    heads: Iterable[StreamHead],
    links: Iterable[Link],
    *,
    since: Mapping[str, Head] | None = None,
    exported: Mapping[str, Head] | None = None,
) -> list[Verification]:
    """Walk the streams of a tenant in order up to their heads, and check every link and every head.

    `links` are ordered by stream and sequence. A stream whose beginning was pruned is checked from its stub on; an
    export then says whether the stub is what was there. With `since`, each stream is only checked from there on, and
    what comes before is taken as good. With `exported`, streams must also agree with those heads. No stream of either
    may be missing. What is appended after the heads were read is left to the next time; events of a stream that has no
    head are bad, so whoever reads links later than heads looks whether it has one by then.
    """
    walks = {
        head.stream: _Walk(tenant_id, head, since=(since or {}).get(head.stream), exported=(exported or {}))
        for head in heads
    }
    known = {**(since or {}), **(exported or {})}
    headless: dict[str, Verification] = {}
    for name, following in groupby(links, key=itemgetter(0)):
        walk = walks.get(name)
        if walk is not None:
            walk.along(following)
        elif name not in known:
            headless[name] = _headless(name, next(following)[1])
    missing = [_removed(head) for stream, head in known.items() if stream not in walks]
    return [walk.result() for walk in walks.values()] + missing + list(headless.values())


class _Walk:
    """One stream under examination."""

    def __init__(self, tenant_id: UUID, head: StreamHead, *, since: Head | None, exported: Mapping[str, Head]) -> None:
        self._head = head
        self._exported = exported.get(head.stream)
        self._bad: Verification | None = None
        seq, digest = (since.seq, since.hash) if since else (0, b"")
        if head.stub is not None and head.stub.seq > seq:
            seq, digest = head.stub.seq, head.stub.hash
        self._start = seq
        self._chain = Chain(tenant_id, head.stream, seq=seq, hash=digest)
        if head.stub is not None:
            self._check_stub(head.stub)

    def _check_stub(self, stub: Stub) -> None:
        copy = self._exported
        if not stub.covered:
            self._fail(stub.seq, f"everything up to here was pruned, which checkpoint {stub.checkpoint} does not cover")
        elif copy is not None and copy.seq < stub.seq:
            self._fail(stub.seq, f"everything up to here was pruned, and the export ends at {copy.seq}")
        elif copy is not None and copy.seq == stub.seq and copy.hash != stub.hash:
            self._fail(stub.seq, "everything up to here was pruned, and it was not what was exported")

    def along(self, links: Iterable[Link]) -> None:
        start, last, problem_of = self._start, self._head.last_seq, self._chain.problem
        copy = self._exported
        for link in links:
            if self._bad is not None or not start < link[1] <= last:
                continue
            problem = problem_of(link)
            if problem:
                self._fail(self._chain.seq + 1, problem)
            elif copy is not None and link[1] == copy.seq and link[3] != copy.hash:
                self._fail(link[1], "the stream was rewritten up to here since it was exported")

    def result(self) -> Verification:
        if self._bad is not None:
            return self._bad
        head, count = self._head, self._chain.seq
        if self._exported is not None and self._exported.seq > max(head.last_seq, count):
            return self._broken(count + 1, f"the stream ends at {count}, its export at {self._exported.seq}")
        if count == head.last_seq == head.stored_seq:
            if self._chain.hash == head.last_hash:
                return Verification(stream=head.stream, events=count - self._start)
            return self._broken(max(count, 1), "the head has another hash")
        return self._broken(
            count + 1, f"the stream ends at {max(count, head.stored_seq)}, its head says {head.last_seq}"
        )

    def _fail(self, seq: int, problem: str) -> None:
        self._bad = self._broken(seq, problem)

    def _broken(self, seq: int, problem: str) -> Verification:
        good = Verification(stream=self._head.stream, events=self._chain.seq - self._start)
        return replace(good, first_bad_seq=seq, problem=problem)


def _removed(head: Head) -> Verification:
    return Verification(
        stream=head.stream, events=0, first_bad_seq=1, problem=f"the stream is gone; {head.seq} events were signed"
    )


def _headless(stream: str, seq: int) -> Verification:
    return Verification(stream=stream, events=0, first_bad_seq=seq, problem="the stream has events and no head")


async def verify_tenant(
    storage: Storage,
    tenant_id: UUID,
    *,
    stream: str | None = None,
    exported: Exported | None = None,
    trusted: PublicKeys | None = None,
) -> list[Verification]:
    """Check the streams of a tenant, or one of them, from the first event to the head; see `verify_streams`.

    With an export, its newest checkpoint must also be stored as it was exported; where it is not, the first result is
    of the stream that `CHECKPOINTS` names. With `trusted` keys, only what the newest checkpoint does not cover is
    walked.

    Raises:
        InvalidRequest: the newest checkpoint is not signed with a trusted key, or not what was signed.
    """
    since, number = await _signed_heads(storage.checkpoints, tenant_id, trusted) if trusted else ({}, 0)
    copied = exported.heads if exported is not None else {}
    walked, misplaced = await asyncio.gather(
        _walked(storage, tenant_id, stream, since=since, exported=copied, after=number),
        storage.events.misplaced(tenant_id, stream=stream, after=number),
    )
    results = [_placed(each, misplaced) for each in walked]
    changed = await _changed_checkpoint(storage.checkpoints, tenant_id, exported.newest) if exported else None
    return [changed, *results] if changed is not None else results


async def _walked(
    storage: Storage,
    tenant_id: UUID,
    stream: str | None,
    *,
    since: Mapping[str, Head],
    exported: Mapping[str, Head],
    after: int,
) -> Iterable[Verification]:
    """The results of `verify_streams` over the streams of a tenant, or over one, whatever is pruned meanwhile.

    Of a stream whose stub is another after the walk than before it, what is missing was pruned in between: only such
    streams are walked again, from their stubs, so that it ends however long pruning goes on.
    """
    results: dict[str, Verification] = {}
    names = None if stream is None else {stream}
    while True:
        heads = _only(names, {head.stream: head for head in await storage.events.heads(tenant_id)})
        links = storage.checkpoints.links(tenant_id, streams=names, after=after)
        known = {"since": _only(names, since), "exported": _only(names, exported)}
        found = await asyncio.to_thread(verify_streams, tenant_id, heads.values(), links, **known)
        bad = {each.stream for each in found if not each.consistent}
        stubs = {head.stream: head.stub for head in await storage.events.heads(tenant_id)} if bad else {}
        begun = bad & stubs.keys() - heads.keys() - since.keys() - exported.keys()
        results.update({each.stream: each for each in found if each.stream not in begun})
        names = {name for name in bad & heads.keys() if stubs.get(name) != heads[name].stub}
        if not names:
            return results.values()


def _only(names: Collection[str] | None, values: Mapping[str, _Value]) -> Mapping[str, _Value]:
    return values if names is None else {name: value for name, value in values.items() if name in names}


def _placed(result: Verification, misplaced: Mapping[str, int]) -> Verification:
    seq = misplaced.get(result.stream)
    if seq is None or not result.consistent:
        return result
    return replace(result, first_bad_seq=seq, problem="its place in the feed is not where its stream has it")


async def _changed_checkpoint(store: CheckpointStore, tenant_id: UUID, copy: Checkpoint | None) -> Verification | None:
    if copy is None:
        return None
    found = await store.read(tenant_id, after=copy.number - 1, limit=1)
    if list(found) == [copy]:
        return None
    problem = "it was changed since it was exported" if found and found[0].number == copy.number else "it is gone"
    return Verification(stream=CHECKPOINTS, events=0, first_bad_seq=copy.number, problem=problem)


async def _signed_heads(store: CheckpointStore, tenant_id: UUID, trusted: PublicKeys) -> tuple[Mapping[str, Head], int]:
    newest = await store.newest(tenant_id)
    if newest is None:
        return {}, 0
    heads = {head.stream: head for head in await store.heads(tenant_id, number=newest.number)}
    problem = root_problem(newest, heads) or trusted.problem(newest.key_id, newest.signature, newest.signed())
    if problem:
        raise InvalidRequest(f"checkpoint {newest.number} is not to be trusted: {problem}", field="checkpoint")
    return heads, newest.number
