"""Many threads hand in items, one thread commits them in groups.

Items join the open batch; the committing thread takes whatever is there as soon as it is free, so a lone caller never
waits for company and a crowd shares one commit. A full queue makes the caller wait: nothing is ever dropped.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from plm_shared.ledger import LedgerRecord

__all__ = ["Acknowledgement", "Batch", "EmitterClosed", "GroupCommit", "QueueFull"]

_log = logging.getLogger(__name__)


class EmitterClosed(RuntimeError):
    """Nothing more is taken; or the process forked and this event is the parent's to write."""


class QueueFull(RuntimeError):
    """There is no room now; only raised to callers that asked not to wait."""


class Batch:
    """Items that are committed together, and what became of them."""

    __slots__ = ("_done", "callbacks", "failure", "items", "lock", "outcomes", "weight")

    def __init__(self) -> None:
        self.items: list[LedgerRecord] = []
        self.weight = 0
        self.outcomes: Sequence[Exception | None] = ()
        self.failure: Exception | None = None
        self.lock = threading.Lock()
        self.callbacks: list[Callable[[], None]] = []
        self._done = threading.Event()

    def settle(self, outcomes: Sequence[Exception | None] = (), failure: Exception | None = None) -> None:
        """Tell everybody who waits: one outcome per item, or one failure for all."""
        self.outcomes, self.failure = outcomes, failure
        with self.lock:
            self._done.set()
            callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001 - a stranger's callback must not stop the commits
                _log.exception("a callback of an acknowledged batch failed")

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the batch was settled within ``timeout`` seconds."""
        return self._done.wait(timeout)

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call back once settled, in the committing thread; at once when it is already."""
        with self.lock:
            if not self._done.is_set():
                self.callbacks.append(callback)
                return
        callback()

    def abandon_after_fork(self) -> None:
        """In a child: whatever state the locks were copied in, let those who hold a handle know."""
        self.lock, self._done = threading.Lock(), threading.Event()
        self.callbacks = []
        self.settle(failure=EmitterClosed("this event was handed in before the process forked; its parent writes it"))


class Acknowledgement:
    """The promise that an event is durable, as far as the emitter's ``durability`` says."""

    __slots__ = ("_batch", "_place")

    def __init__(self, batch: Batch, place: int) -> None:
        self._batch = batch
        self._place = place

    @property
    def done(self) -> bool:
        """Whether ``result`` would answer at once."""
        return self._batch.wait(0)

    def result(self, timeout: float | None = None) -> None:
        """Wait until the event is durable.

        Raises:
            TimeoutError: it is not yet; the event stays queued and this handle stays good.
            LedgerRefused: this event was refused, alone; the rest of its batch was not.
            psycopg.Error, OSError: the database or disk failed for longer than the emitter waits; emit again.
        """
        if not self._batch.wait(timeout):
            raise TimeoutError(f"the event was not acknowledged within {timeout} seconds; it is still queued")
        outcome = self._batch.failure or (self._batch.outcomes[self._place] if self._batch.outcomes else None)
        if outcome is not None:
            raise outcome

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call back when ``result`` would answer, in the committing thread: be quick, and never raise."""
        self._batch.when_settled(callback)


class GroupCommit:
    """Collects items into batches and has one thread commit them.

    ``commit`` gets a batch's items and answers one outcome per item; what it raises becomes the failure of the batch.
    The thread starts with the first item, also again after a fork; items
    that the parent still held are the parent's, and their handles in the child say so.
    """

    _lock: threading.Lock
    _arrived: threading.Condition
    _room: threading.Condition
    _open: Batch
    _full: deque[Batch]
    _at_work: Batch | None
    _queued: int
    _weight: int
    _idle: bool
    _thread: threading.Thread | None

    def __init__(
        self,
        commit: Callable[[Sequence[LedgerRecord]], Sequence[Exception | None]],
        *,
        most: int,
        heaviest: int,
        capacity: int,
        name: str,
    ) -> None:
        if not 0 < most <= capacity:
            raise ValueError(f"a batch must hold at least 1 and at most capacity={capacity} events, not {most}")
        self._commit = commit
        self._most = most
        self._heaviest = heaviest
        self._capacity = capacity
        self._name = name
        self._closed = False
        self._reset()
        _forkable.add(self)

    def submit(self, item: LedgerRecord, *, wait: bool = True) -> Acknowledgement:
        """Queue an item; waits for room, or raises ``QueueFull`` when told not to wait.

        Raises:
            EmitterClosed: ``close`` was called.
        """
        weight = len(item.text)
        with self._lock:
            while not self._has_room(weight):
                if not wait:
                    raise QueueFull(f"{self._queued} events wait to be committed; try again")
                self._room.wait()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            batch = self._open
            batch.items.append(item)
            batch.weight += weight
            self._queued += 1
            self._weight += weight
            handle = Acknowledgement(batch, len(batch.items) - 1)
            if len(batch.items) >= self._most or batch.weight >= self._heaviest:
                self._full.append(batch)
                self._open = Batch()
            if self._idle:
                self._idle = False
                self._arrived.notify()
        return handle

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything handed in so far is settled; whether that was within ``timeout`` seconds."""
        with self._lock:
            last = self._open if self._open.items else (self._full[-1] if self._full else self._at_work)
        return last is None or last.wait(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, and wait until all is settled; what is not by then goes on in the background."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._arrived.notify_all()
            self._room.notify_all()
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _has_room(self, weight: int) -> bool:
        if self._closed:
            raise EmitterClosed("the emitter is closed; make a new one")
        heavy = self._queued > 0 and self._weight + weight > self._heaviest * 4
        return self._queued < self._capacity and not heavy

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            try:
                outcomes = self._commit(batch.items)
            except Exception as failure:  # noqa: BLE001 - whatever it is, those who wait for it must hear it
                batch.settle(failure=failure)
            else:
                batch.settle(outcomes)
            with self._lock:
                self._at_work = None
                self._queued -= len(batch.items)
                self._weight -= batch.weight
                self._room.notify_all()

    def _take(self) -> Batch | None:
        with self._lock:
            while not self._full and not self._open.items:
                if self._closed:
                    return None
                self._idle = True
                self._arrived.wait()
            self._idle = False
            if self._full:
                batch = self._full.popleft()
            else:
                batch, self._open = self._open, Batch()
            self._at_work = batch
            return batch

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._open = Batch()
        self._full = deque()
        self._at_work = None
        self._queued = self._weight = 0
        self._idle = False
        self._thread = None

    def _after_fork(self) -> None:
        abandoned = [*self._full, self._open, *([self._at_work] if self._at_work else [])]
        self._reset()
        for batch in abandoned:
            batch.abandon_after_fork()


_forkable: weakref.WeakSet[GroupCommit] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for each in list(_forkable):
        each._after_fork()  # noqa: SLF001 - the module's own class


os.register_at_fork(after_in_child=_after_fork_in_child)
