"""The ledger's writer for many events: group-committed, back-pressuring, durable as asked.

``ack``     an event is acknowledged after the commit that contains it.
``spool``   an event is acknowledged after a flushed append to a local file; the database gets it soon, and after a
            crash from a later start on the same folder, exactly once.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import psycopg

from plm_shared.addresses import driver_dsn
from plm_shared.group_commit import Acknowledgement, EmitterClosed, GroupCommit, QueueFull
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import LedgerArgs, LedgerRecord, ledger_record, utc_today, uuid_text
from plm_shared.ledger_writer import LedgerWriter
from plm_shared.spool import Spool

__all__ = ["Acknowledgement", "BatchingKernelEmitter", "EmitterClosed", "QueueFull"]

_log = logging.getLogger(__name__)
_HEAVIEST: Final = 4 * 1024 * 1024  # characters per batch: what one statement carries
_AGAIN: Final = 1.0  # seconds between attempts to drain into a database that refuses
_LAST_STATEMENT: Final = 1.0  # seconds that closing waits for the thread once the writer is closed
_MAX_SPOOL: Final = 256 * 1024 * 1024


class BatchingKernelEmitter:
    """Writes the ledger of one tenant in groups; a ``KernelEmitter``, for any number of threads.

    ``submit`` checks an event, queues it and answers a handle; the four methods wait for it. A full queue makes
    either wait: nothing is dropped. An event that the database refuses is refused alone. Events of one thread are
    committed in their order. While the database is away events wait; after ``patience`` seconds of it, those that
    wait for an acknowledgement get the database's error, and may be emitted again. Close it, or use it as a context
    manager: an event whose acknowledgement nobody waited for may end with the process.

    After a fork the child has an empty queue, a connection and a spool segment of its own.

    Args:
        tenant_id: Whose ledger.
        dsn: The application's address; by default ``PG_DSN``.
        durability: What an acknowledgement means.
        spool: The folder for ``durability="spool"``; several processes may share it.
        most: Events per commit.
        capacity: Events that may wait.
        max_spool_bytes: When the spool holds as much, callers wait until the database has caught up.
        patience: Seconds.
        clock: The day that prices are kept by.

    Raises:
        ValueError: ``tenant_id`` is no UUID, or the options do not fit together.
        RuntimeError: there is no address.
    """

    def __init__(
        self,
        tenant_id: str | uuid.UUID,
        *,
        dsn: str | None = None,
        durability: Literal["ack", "spool"] = "ack",
        spool: Path | str | None = None,
        most: int = 250,
        capacity: int = 8192,
        max_spool_bytes: int = _MAX_SPOOL,
        patience: float = 30.0,
        clock: Callable[[], date] = utc_today,
    ) -> None:
        if durability not in ("ack", "spool") or (durability == "spool") != (spool is not None):
            raise ValueError(f"durability is 'ack', or 'spool' with a folder; not {durability!r} with spool={spool!r}")
        self._tenant = uuid_text(tenant_id)
        # A spool is patient by itself, attempt by attempt, so that closing never waits for a database that is away.
        self._writer = LedgerWriter(self._tenant, _address(dsn), patience=patience if spool is None else 0)
        self._clock = clock
        self._most = most
        self._drain = None if spool is None else _Drain(Path(spool) / self._tenant, self._writer, most, max_spool_bytes)
        self._group = GroupCommit(
            self._writer.write if self._drain is None else self._drain.append,
            most=most,
            heaviest=_HEAVIEST,
            capacity=capacity,
            name="plm-ledger-commit",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, args: LedgerArgs, *, run_id: str | uuid.UUID | None = None, wait: bool = True) -> Acknowledgement:
        """Check and queue one event of any of the four kinds.

        Raises:
            KeyMismatch, JsonRefused, ValueError: the event is bad; nothing was queued.
            EmitterClosed: ``close`` was called.
            QueueFull: ``wait`` is false and there is no room.
        """
        record = ledger_record(args, tenant_id=self._tenant, run_id=run_id, clock=self._clock)
        return self._group.submit(record, wait=wait)

    def emit_telemetry(self, args: EmitTelemetryArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record an event, and wait until it is durable."""
        self.submit(args, run_id=run_id).result()

    def emit_governance(self, args: EmitGovernanceArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a decision, and wait until it is durable."""
        self.submit(args, run_id=run_id).result()

    def record_llm_call(self, args: EmitLlmCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a model call and its cost, and wait until it is durable."""
        self.submit(args, run_id=run_id).result()

    def record_connector_call(self, args: EmitConnectorCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a connector call and its cost, and wait until it is durable."""
        self.submit(args, run_id=run_id).result()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted so far is acknowledged or refused; whether it was, within ``timeout``."""
        return self._group.flush(timeout)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until the database has everything acknowledged so far; whether it had, within ``timeout``."""
        return self._drain is None or self._drain.wait_until_empty(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Take no more events and wait for those taken; whether all were acknowledged or refused, within ``timeout``.

        A spool is drained as long as ``timeout`` allows and the database answers; the rest stays for a later start.
        """
        settled = self._group.close(timeout)
        if settled:
            if self._drain is not None:
                self._drain.finish(timeout)
            self._writer.close()
            if self._drain is not None:
                self._drain.release()
        return settled


class _Drain:
    """Moves the spool into the database, in a thread of its own that starts at once when an earlier run left events."""

    def __init__(self, folder: Path, writer: LedgerWriter, most: int, max_bytes: int) -> None:
        self._folder = folder
        self._writer = writer
        self._most = most
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._open()
        if self._spool.bytes_waiting:
            self._start()

    def append(self, records: Sequence[LedgerRecord]) -> Sequence[Exception | None]:
        if self._process != os.getpid():
            self._inherited = self._spool  # kept: its files and their locks are the parent's to close
            self._lock = threading.Lock()
            self._open()
        self._start()
        self._spool.append(records)
        return ()

    def wait_until_empty(self, timeout: float | None) -> bool:
        return self._process != os.getpid() or self._spool.wait_until_empty(timeout)

    def finish(self, timeout: float | None) -> None:
        """Let the thread drain what it can in time."""
        if self._process == os.getpid():
            self._spool.end()
            self._closing.set()
            if self._thread is not None:
                self._thread.join(timeout)

    def release(self) -> None:
        """Give the files up, so that a later start finds what is left; the writer is closed by now."""
        if self._process == os.getpid():
            if self._thread is not None:
                self._thread.join(_LAST_STATEMENT)
                if self._thread.is_alive():
                    return  # a statement hangs; the end of the process gives the files up
            self._spool.release()

    def _open(self) -> None:
        self._process = os.getpid()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._spool = Spool(self._folder, max_bytes=self._max_bytes)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="plm-ledger-drain", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                self._drain()
            except OSError:
                _log.exception("the spool %s cannot be read or written; it is tried again", self._folder)
            else:
                return
            if self._closing.wait(_AGAIN):
                return

    def _drain(self) -> None:
        """Until the spool is empty and ended, or closed while the database does not answer."""
        while (part := self._spool.take(self._most, _HEAVIEST)) is not None:
            outcomes = self._write(part.records)
            if outcomes is None:
                return
            for record, refusal in zip(part.records, outcomes, strict=True):
                if refusal is not None:
                    self._spool.reject(record, refusal)
            self._spool.done(part)

    def _write(self, records: Sequence[LedgerRecord]) -> Sequence[Exception | None] | None:
        """Until the database takes them; None when closed while it does not."""
        while True:
            try:
                return self._writer.write(records)
            except psycopg.Error:
                if self._closing.wait(_AGAIN):
                    return None


def _address(dsn: str | None) -> str:
    address = dsn or os.environ.get("PG_DSN")
    if not address:
        raise RuntimeError("PG_DSN is not set; set it to postgresql+psycopg://user:password@host:5432/database")
    return driver_dsn(address)
