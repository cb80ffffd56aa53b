"""Bookings made beside each other, sent over one connection and waiting for the disk together.

Each is a transaction of its own, so one that fails undoes no other. Those that come while others are on their way are
sent in one message, as the next round: a procedure makes them one after another, each without waiting for the disk, so
that its rows are free for the next, and then waits for them all. So a client that is paused keeps no row from anybody,
and nobody is answered before what was booked is on disk. A booking that is alone waits for its own commit. While the
server is at one round the next is on its way, in libpq's pipeline mode, so that neither side waits for the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psycopg
from psycopg.errors import (
    DuplicatePreparedStatement,
    InsufficientPrivilege,
    InvalidSqlStatementName,
    UndefinedFunction,
)
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGresult

from plm_engine_core.control_plane.storage.postgres import calls
from plm_engine_core.control_plane.storage.postgres.calls import PATIENCE_SECONDS, failure_of
from plm_engine_core.control_plane.storage.postgres.gateway import LONGEST_ANSWER_SECONDS, Session

MOST_TOGETHER = 16
ENOUGH = 4
"""So many go without waiting for who else may come: else client and server would take turns, and each stand idle."""

NOTHING_RAN = (InvalidSqlStatementName, DuplicatePreparedStatement)
"""Failures after which a message may be sent again: its statement was not prepared, or is already."""
NOT_STARTED = (*NOTHING_RAN, UndefinedFunction, InsufficientPrivilege)
"""Failures of a round that has made nothing."""

_MOST_ROUNDS = 2  # on their way
_LARGE = 1_000_000  # bytes; what is so large goes alone

Answer = asyncio.Future[bytes | None]
"""A JSON text; a string is the code of the error with which a booking of a round failed, and left nothing."""


@dataclass(frozen=True, slots=True)
class Booking:
    """One that waits to be sent, and who waits for its answer."""

    document: bytes
    answer: Answer
    alone: bool


class Lane:
    """One connection, used by nobody else meanwhile, and the bookings that go over it. Belongs to one event loop.

    A booking that waits for somebody's lock fails with LockNotAvailable before it holds up others for long, and may be
    made again in a lane that is `exclusive`. While the connection is `wanted` elsewhere, no more bookings are taken.
    `on_end` is called once: when nothing is on its way any more, the connection being as it was, or when it is lost.
    """

    def __init__(
        self,
        connection: Session,
        prepared: set[bytes],
        *,
        on_end: Callable[[Lane], object],
        wanted: Callable[[], bool],
        exclusive: bool = False,
    ) -> None:
        self.connection = connection
        self._pgconn = connection.pgconn
        self._prepared = prepared
        self._on_end = on_end
        self._wanted = wanted
        self._exclusive = self._leaving = exclusive
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Booking] = deque()
        self._rounds: deque[list[Booking]] = deque()  # on their way
        self._result: PGresult | None = None  # of the round that is being answered
        self._progress = self._loop.time()
        self._scheduled = False
        self._writing = False
        self._ended = False
        self._pgconn.enter_pipeline_mode()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._on_readable)
        self._watch = self._loop.call_later(PATIENCE_SECONDS, self._look)

    @property
    def accepts(self) -> bool:
        """Whether another booking would be served soon."""
        if self._ended or self._leaving or len(self._queue) >= MOST_TOGETHER:
            return False
        return not self._rounds or self._loop.time() - self._progress < PATIENCE_SECONDS

    def send(self, document: bytes, *, alone: bool = False) -> Answer:
        """What is answered to a booking; fails with a `psycopg.Error`, or TimeoutError where nothing is."""
        answer: Answer = self._loop.create_future()
        self._queue.append(Booking(document, answer, alone=alone or len(document) > _LARGE))
        if len(self._queue) >= ENOUGH:
            self._next_round()
        else:
            self._schedule()
        return answer

    def forget(self) -> None:
        """Prepare everything anew: the connection has dropped it."""
        self._prepared.clear()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_round)  # whoever was just answered, or is about to ask, can join it

    def _next_round(self) -> None:
        self._scheduled = False
        if self._ended or len(self._rounds) >= _MOST_ROUNDS:
            return
        bookings = self._taken()
        if not self._rounds:
            self._progress = self._loop.time()
        if bookings:
            self._put(bookings)
            if self._queue:
                self._schedule()
        elif not self._rounds:
            self._end()

    def _taken(self) -> list[Booking]:
        """Those of the queue that make the next round."""
        bookings: list[Booking] = []
        while self._queue and len(bookings) < MOST_TOGETHER and not (bookings and self._queue[0].alone):
            booking = self._queue.popleft()
            if booking.answer.done():  # nobody waits for it any more
                continue
            bookings.append(booking)
            if booking.alone:
                break
        return bookings

    def _put(self, bookings: list[Booking]) -> None:
        if len(bookings) > 1:
            message = calls.together([each.document for each in bookings])
        else:
            message = calls.alone(bookings[0].document, patiently=self._exclusive)
        statement = message.statement
        self._rounds.append(bookings)
        try:
            if statement.name not in self._prepared:
                self._pgconn.send_prepare(statement.name, statement.text)
                self._prepared.add(statement.name)
            self._pgconn.send_query_prepared(statement.name, message.values)
            self._pgconn.pipeline_sync()
        except psycopg.OperationalError as error:
            self._lose(error)
        else:
            self._write()

    def _write(self) -> None:
        try:
            more = bool(self._pgconn.flush())
        except psycopg.OperationalError as error:
            self._lose(error)
            return
        if more and not self._writing:
            self._loop.add_writer(self._socket, self._write)
        elif self._writing and not more:
            self._loop.remove_writer(self._socket)
        self._writing = more

    def _on_readable(self) -> None:
        try:
            self._pgconn.consume_input()
            self._take_results()
        except psycopg.OperationalError as error:
            self._lose(error)
            return
        if self._writing:
            self._write()
        if self._pgconn.status != ConnStatus.OK:
            self._lose(psycopg.OperationalError("the connection was lost"))

    def _take_results(self) -> None:
        while self._rounds and not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:
                if self._pgconn.status != ConnStatus.OK:
                    return
            elif result.status == ExecStatus.PIPELINE_SYNC:
                assert self._result is not None  # noqa: S101 - a message is answered before its end
                _deliver(self._rounds.popleft(), self._result)
                self._result = None
                self._progress = self._loop.time()
                self._schedule()
            elif self._result is None or self._result.status != ExecStatus.FATAL_ERROR:
                self._result = result

    def _look(self) -> None:
        """See whether the server is getting on, and whether others get a connection."""
        self._leaving = self._leaving or self._wanted()
        self._watch = self._loop.call_later(PATIENCE_SECONDS, self._look)
        if self._rounds and self._loop.time() - self._progress >= LONGEST_ANSWER_SECONDS:
            self._lose(TimeoutError())

    def _lose(self, error: Exception) -> None:
        if self._ended:
            return
        unanswered = [*(each for bookings in self._rounds for each in bookings), *self._queue]
        self._rounds.clear()
        self._queue.clear()
        self._unwatch()
        self._pgconn.finish()
        self._end()
        for booking in unanswered:
            if not booking.answer.done():
                booking.answer.set_exception(error)

    def _unwatch(self) -> None:
        """Hear no more of the socket; first of all, for a closed one cannot be taken out of the loop."""
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._writing = False

    def _end(self) -> None:
        self._ended = True
        self._watch.cancel()
        self._unwatch()
        with suppress(psycopg.OperationalError):  # it is lost, as whoever takes it in will see
            self._pgconn.exit_pipeline_mode()
        self._on_end(self)


def _deliver(bookings: list[Booking], result: PGresult) -> None:
    """Answer those who wait."""
    answers: Sequence[bytes | None] = ()
    failure = failure_of(result)
    if failure is None:
        try:
            answers = calls.answers_of(result, len(bookings))
        except psycopg.OperationalError as error:
            failure = error
    elif len(bookings) > 1 and not isinstance(failure, NOT_STARTED):
        # What fails a booking is answered by the procedure: this came between them, and some have been made.
        failure = psycopg.OperationalError(f"bookings may have been made, or not: {failure}")
    for number, booking in enumerate(bookings):
        if booking.answer.done():  # nobody waits for it any more
            continue
        if failure is not None:
            booking.answer.set_exception(failure)
        else:
            booking.answer.set_result(answers[number])
