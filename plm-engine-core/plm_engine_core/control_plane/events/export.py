"""The export: events and signed checkpoints as lines of JSON, to be kept where the database's masters cannot reach.

A file starts with ``{"format": "plm-events", "version": 1, "tenant_id": ..., "after": n}``. For each checkpoint from
number n + 1 on follow the events that it newly covers, each a list ``[stream, seq, prev_hash, hash, kind, actor,
micros, payload]``, and then the checkpoint as an object with the heads that changed. Hashes are hexadecimal. A file
that goes on where another ended is checked together with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Protocol
from uuid import UUID

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events.chain import Chain, Link, framed, framed_names, unframed
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head, checkpoint_problem
from plm_engine_core.control_plane.events.signing import PublicKeys

FORMAT = "plm-events"
VERSION = 1
MAX_LINE_BYTES = 64 << 20
"""Longer than any event or checkpoint that is exported; a file with a longer line is none of ours."""

_NOBODY = UUID(int=0)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_decoder = json.JSONDecoder()


class ExportSource(Protocol):
    """Where an export reads from."""

    async def pruned(self, tenant_id: UUID) -> int:
        """The newest checkpoint of which events were pruned; 0 where none were."""
        ...

    async def read(self, tenant_id: UUID, *, after: int = 0, limit: int = 100) -> Iterable[Checkpoint]:
        """Checkpoints in order, from number `after` + 1."""
        ...

    def covered(self, tenant_id: UUID, number: int) -> Iterable[Link]:
        """The events that a checkpoint newly covers; it blocks while it reads."""
        ...


async def export(
    source: ExportSource, tenant_id: UUID, file: BinaryIO, *, after: int = 0, limit_bytes: int | None = None
) -> int:
    """Write the export from checkpoint `after` + 1 to the newest one, and answer the number of the newest.

    With a limit it ends earlier, with the checkpoint that reached it.

    Raises:
        InvalidRequest: events that it would hold were pruned.
    """
    await _refuse_pruned(source, tenant_id, after + 1)
    begin = file.tell()
    file.write(_line({"format": FORMAT, "version": VERSION, "tenant_id": str(tenant_id), "after": after}))
    while checkpoints := list(await source.read(tenant_id, after=after)):
        for checkpoint in checkpoints:
            events = source.covered(tenant_id, checkpoint.number)
            await asyncio.to_thread(file.writelines, (_line(_link_to_json(link)) for link in events))
            await _refuse_pruned(source, tenant_id, checkpoint.number)  # while they were read
            file.write(_line(_checkpoint_to_json(checkpoint)))
            after = checkpoint.number
            if limit_bytes is not None and file.tell() - begin > limit_bytes:
                return after
    return after


async def _refuse_pruned(source: ExportSource, tenant_id: UUID, number: int) -> None:
    pruned = await source.pruned(tenant_id)
    if number <= pruned:
        raise InvalidRequest(
            f"events up to checkpoint {pruned} were exported and pruned; go on after {pruned}, with the earlier "
            "exports at hand",
            field="after",
        )


@dataclass(kw_only=True)
class Exported:
    """What was read of one tenant's exports so far: how far each stream goes, and the newest checkpoint."""

    tenant_id: UUID | None = None
    newest: Checkpoint | None = None
    heads: dict[str, Head] = field(default_factory=dict)
    events: int = 0
    problem: str = ""

    @property
    def unforged(self) -> bool:
        """Whether every line is what was signed."""
        return not self.problem and self.newest is not None


def read_exports(files: Iterable[Iterable[bytes]], keys: PublicKeys) -> Exported:
    """Check exports of one tenant, in order, without a database; stops at the first thing that is wrong.

    `problem` then names the event or checkpoint. What a file holds after its last checkpoint is not signed, and so is
    wrong too.
    """
    reader = ExportReader(keys)
    for number, lines in enumerate(files, 1):
        if not reader.add(lines, name=f"file {number}"):
            break
    return reader.found


class _WrongError(Exception):  # control flow inside this module, never seen outside
    pass


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long for an export only its beginning, which is refused as such."""
    return iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")


class ExportReader:
    """Checks one export after the other; `found` is what was read so far."""

    def __init__(self, keys: PublicKeys) -> None:
        self._keys = keys
        self._chains: dict[str, Chain] = {}
        self._uncovered: set[str] = set()
        self._tenant_id = _NOBODY
        self.found = Exported()

    def add(self, lines: Iterable[bytes], *, name: str) -> bool:
        """Check one more export; whether it is what was signed, else `found.problem` begins with its name."""
        try:
            self._read(lines)
        except _WrongError as wrong:
            self.found.problem = f"{name}: {wrong}"
        return not self.found.problem

    def _read(self, lines: Iterable[bytes]) -> None:
        numbered, before = enumerate(_bounded(lines), 1), self.found.newest
        try:
            self._begin(_parsed(next(numbered)[1]))
            for number, line in numbered:
                value = _parsed(line)
                if type(value) is list:
                    self._event(number, value)
                else:
                    self._checkpoint(number, value)
        except StopIteration:
            raise _WrongError("it is empty") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise _WrongError(f"it is damaged: {type(error).__name__}: {error}") from None
        if self._uncovered:
            raise _WrongError(f"events of {min(self._uncovered)} are covered by no checkpoint")
        if self.found.newest is before:
            raise _WrongError("it holds no checkpoint, which every export ends with")

    def _begin(self, first: Mapping[str, Any]) -> None:
        if (first["format"], first["version"]) != (FORMAT, VERSION):
            raise _WrongError(f"it is no {FORMAT} export of version {VERSION}")
        tenant_id = UUID(first["tenant_id"])
        if self.found.tenant_id not in (None, tenant_id):
            raise _WrongError(f"it is of tenant {tenant_id}, the file before it of {self.found.tenant_id}")
        self.found.tenant_id = self._tenant_id = tenant_id
        have = self.found.newest.number if self.found.newest else 0
        if first["after"] != have:
            raise _WrongError(f"it starts after checkpoint {first['after']}; what was read before ends at {have}")

    def _event(self, number: int, value: list[Any]) -> None:
        stream, seq, prev_hash, claimed, kind, actor, micros, payload = value
        link = (
            stream,
            seq,
            bytes.fromhex(prev_hash),
            bytes.fromhex(claimed),
            framed_names(kind, actor),
            micros,
            framed(payload),
        )
        chain = self._chains.get(stream)
        if chain is None:
            chain = self._chains[stream] = Chain(self._tenant_id, stream)
        problem = chain.problem(link)
        if problem:
            raise _WrongError(f"line {number}: {stream}, event {chain.seq + 1}: {problem}")
        self._uncovered.add(stream)
        self.found.events += 1

    def _checkpoint(self, number: int, value: Mapping[str, Any]) -> None:
        checkpoint = _checkpoint_from_json(self._tenant_id, value)
        place = f"line {number}: checkpoint {checkpoint.number}"
        for head in checkpoint.heads:
            chain = self._chains.get(head.stream)
            if chain is None or (chain.seq, chain.hash) != (head.seq, head.hash):
                raise _WrongError(f"{place}: it covers {head.stream} up to event {head.seq}, which is not what is here")
        if self._uncovered != {head.stream for head in checkpoint.heads}:
            raise _WrongError(f"{place}: it does not cover the events before it")
        heads = {**self.found.heads, **{head.stream: head for head in checkpoint.heads}}
        problem = checkpoint_problem(checkpoint, self.found.newest, heads, self._keys)
        if problem:
            raise _WrongError(f"{place}: {problem}")
        self.found.heads = heads
        self.found.newest = checkpoint
        self._uncovered.clear()


def checkpoint_of_line(tenant_id: UUID, line: bytes) -> Checkpoint | None:
    """The checkpoint that a line of an export holds; None when it holds something else. Nothing is verified."""
    try:
        return _checkpoint_from_json(tenant_id, json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _bounded(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if len(line) > MAX_LINE_BYTES:
            raise _WrongError("a line is longer than any of an export")
        yield line


def _parsed(line: bytes) -> Any:
    """The value that a line begins with and only blanks follow; `json.loads` would first guess an encoding."""
    text = line.decode()
    value, end = _decoder.raw_decode(text)
    return value if text[end:] == "\n" else _decoder.decode(text)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _link_to_json(link: Link) -> list[Any]:
    stream, seq, prev_hash, claimed, kind_and_actor, micros, payload = link
    kind, actor, text = unframed(kind_and_actor + payload)
    return [stream, seq, prev_hash.hex(), claimed.hex(), kind, actor, micros, text]


def _checkpoint_to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.number,
        "micros": (checkpoint.taken_at - _EPOCH) // _MICROSECOND,
        "streams": checkpoint.streams,
        "root": checkpoint.root.hex(),
        "previous": checkpoint.previous.hex(),
        "key_id": checkpoint.key_id,
        "signature": checkpoint.signature.hex(),
        "heads": [[head.stream, head.seq, head.hash.hex()] for head in checkpoint.heads],
    }


def _checkpoint_from_json(tenant_id: UUID, value: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        tenant_id=tenant_id,
        number=int(value["checkpoint"]),
        taken_at=_EPOCH + int(value["micros"]) * _MICROSECOND,
        streams=int(value["streams"]),
        root=bytes.fromhex(value["root"]),
        previous=bytes.fromhex(value["previous"]),
        key_id=str(value["key_id"]),
        signature=bytes.fromhex(value["signature"]),
        heads=tuple(Head(stream, seq, bytes.fromhex(digest)) for stream, seq, digest in value["heads"]),
    )
