"""Events on the local disk, waiting for the database: written once, flushed, replayed by whoever comes later.

A folder holds segments, each locked by the process that writes it. When that process is gone the lock is, and the next
start adopts the segment. A segment is deleted when everything in it is in the ledger; a crash before that replays it,
which the idempotency keys make harmless. A record is one line: CRC-32, the table's letter, the JSON object.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from plm_shared.ledger import LedgerRecord

__all__ = ["Spool", "SpoolPart"]

_log = logging.getLogger(__name__)
_LETTERS: Final = {"telemetry_events": b"T", "llm_calls": b"L", "connector_calls": b"C"}
_TABLES: Final = {letter: table for table, letter in _LETTERS.items()}
_SEGMENT: Final = 8 * 1024 * 1024


@dataclass(eq=False)
class _Segment:
    path: Path
    file: BinaryIO  # its own lock; closing it gives the segment up
    size: int = 0  # flushed to the disk
    read: int = 0  # known to the database
    full: bool = field(default=False)  # nothing more is written here

    @property
    def drained(self) -> bool:
        return self.read >= self.size


@dataclass(frozen=True, kw_only=True)
class SpoolPart:
    """Records read from the front of the spool, and how far that is."""

    records: Sequence[LedgerRecord]
    segment: _Segment
    end: int


class Spool:
    """One process's end of a spool folder: one thread appends, one takes from the front.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = max(1, min(_SEGMENT, max_bytes // 4))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ended = False
        self._segments = deque(_adopt(folder))
        self._bytes = sum(segment.size for segment in self._segments)

    @property
    def bytes_waiting(self) -> int:
        """What the segments hold on disk, drained segments not counted."""
        return self._bytes

    def append(self, records: Sequence[LedgerRecord]) -> None:
        """Write and flush; returns when the disk has it. Waits while the spool is at its limit.

        Raises:
            OSError: the disk refuses; nothing of these records is in the spool.
        """
        data = b"".join(_line(record) for record in records)
        segment = self._make_room(len(data))
        try:
            _write_at(segment.file.fileno(), data, segment.size)
            os.fdatasync(segment.file.fileno())
        except OSError:
            segment.full = True  # after a failed flush nobody knows what the disk holds: never write here again
            os.ftruncate(segment.file.fileno(), segment.size)
            raise
        with self._lock:
            segment.size += len(data)
            self._bytes += len(data)
            self._changed.notify_all()

    def take(self, most: int, heaviest: int) -> SpoolPart | None:
        """The next records from the front, waiting for some; None once ended and empty, or given up."""
        with self._lock:
            while (segment := self._front()) is None:
                if self._ended:
                    return None
                self._changed.wait()
            start, size = segment.read, segment.size
        records: list[LedgerRecord] = []
        with segment.path.open("rb") as file:
            file.seek(start)
            while len(records) < most and file.tell() < min(size, start + heaviest):
                line = file.readline(size - file.tell())
                record = _record(line)
                if record is None:
                    self._set_aside("damaged", line)
                else:
                    records.append(record)
            return SpoolPart(records=records, segment=segment, end=file.tell())

    def done(self, part: SpoolPart) -> None:
        """The database has it: forget it, and delete what is drained."""
        with self._lock:
            part.segment.read = part.end
            self._discard_drained()
            self._changed.notify_all()

    def reject(self, record: LedgerRecord, reason: Exception) -> None:
        """Keep a refused record, with the reason, in ``rejected.jsonl``."""
        entry = {"table": record.table, "refusal": type(reason).__name__, "reason": str(reason), "row": record.columns}
        self._set_aside("rejected.jsonl", json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def wait_until_empty(self, timeout: float | None = None) -> bool:
        """Whether everything appended reached the database within ``timeout`` seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: self._front() is None, timeout)

    def end(self) -> None:
        """No more is appended; ``take`` answers None when all is read."""
        with self._lock:
            self._ended = True
            self._changed.notify_all()

    def release(self) -> None:
        """Close every file: what is drained is deleted, the rest is left for a later start."""
        with self._lock:
            self._discard_drained(current_too=True)
            for segment in self._segments:
                segment.file.close()
            self._segments.clear()

    def _make_room(self, needed: int) -> _Segment:
        with self._lock:
            while self._bytes and self._bytes + needed > self._max_bytes:
                for segment in self._segments:
                    segment.full = True
                self._discard_drained()
                if not self._bytes or self._bytes + needed <= self._max_bytes:
                    break
                self._changed.wait()
            current = self._segments[-1] if self._segments else None
            if current is None or current.full or current.size >= self._segment_bytes:
                if current is not None:
                    current.full = True
                self._discard_drained()
                current = _new_segment(self._folder)
                self._segments.append(current)
            return current

    def _front(self) -> _Segment | None:
        return next((segment for segment in self._segments if not segment.drained), None)

    def _discard_drained(self, *, current_too: bool = False) -> None:
        for segment in [each for each in self._segments if each.drained and (each.full or current_too)]:
            self._segments.remove(segment)
            self._bytes -= segment.size
            segment.path.unlink()
            segment.file.close()

    def _set_aside(self, name: str, line: bytes) -> None:
        _log.warning("the spool %s set an event aside in %s", self._folder, name)
        with _private(self._folder / name, os.O_APPEND) as file:
            file.write(line)
            file.flush()
            os.fdatasync(file.fileno())


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Past any buffer: one would try again, when the file is closed, what the disk refused."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _private(path: Path, flags: int) -> BinaryIO:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    return os.fdopen(descriptor, "r+b" if not flags & os.O_APPEND else "ab")


def _new_segment(folder: Path) -> _Segment:
    path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex}.spool"
    unlocked = path.with_suffix(".new")  # under its final name it is locked from the first moment
    file = _private(unlocked, os.O_EXCL)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        unlocked.rename(path)
    except FileNotFoundError:  # another start came between making and locking it, and took it for an orphan
        file.close()
        return _new_segment(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _Segment(path, file)


def _adopt(folder: Path) -> Iterator[_Segment]:
    """The segments whose writer is gone, oldest first."""
    for path in sorted([*folder.glob("*.spool"), *folder.glob("*.new")]):
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue  # its owner drained it just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphaned = (
                path.exists() and path.suffix == ".spool" and os.path.samestat(path.stat(), os.fstat(file.fileno()))
            )
        except BlockingIOError:
            orphaned = False
        else:
            if path.suffix == ".new":
                path.unlink(missing_ok=True)
        if orphaned:
            yield _Segment(path, file, size=os.fstat(file.fileno()).st_size, full=True)
        else:
            file.close()


def _line(record: LedgerRecord) -> bytes:
    body = _LETTERS[record.table] + record.text.encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _record(line: bytes) -> LedgerRecord | None:
    """The record of a line, or None for one that a crash cut off or a disk damaged."""
    body = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(body) or body[:1] not in _TABLES:
        return None
    return LedgerRecord(_TABLES[body[:1]], body[1:].decode())
