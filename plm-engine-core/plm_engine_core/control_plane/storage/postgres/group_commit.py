"""Bookings made beside each other, sent over one connection and waiting for the disk together.

Each is a message and a transaction of its own, so a paused client keeps no row from anybody, and one that fails undoes
no other. Those that come while others are on their way are sent in one go, in libpq's pipeline mode, as the next round.
In a round each commits without waiting for the disk, so that its rows are free for the next, and a last message waits
for them all; nobody is answered before that. A booking that is alone waits for its own commit. While the server is at
one round the next is on its way, so that neither side waits for the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import psycopg
from psycopg.errors import DuplicatePreparedStatement, InvalidSqlStatementName, QueryCanceled
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGresult

from plm_engine_core.control_plane.storage.postgres.calls import FLUSH, Call, Prepared, failure_of
from plm_engine_core.control_plane.storage.postgres.cancelling import Cancelling
from plm_engine_core.control_plane.storage.postgres.gateway import LONGEST_ANSWER_SECONDS, Session
from plm_engine_core.control_plane.storage.postgres.rounds import Answer, Round

MOST_TOGETHER = 16
ENOUGH = 4
"""So many go without waiting for who else may come: else client and server would take turns, and each stand idle."""
PATIENCE_SECONDS = 0.25
"""A booking that runs for so long is taken to wait for somebody's lock, and kept from holding others up."""

NOTHING_RAN = (QueryCanceled, InvalidSqlStatementName, DuplicatePreparedStatement)
"""Failures after which a statement may be sent again: cancelled, not prepared, or prepared already."""

_MOST_ROUNDS = 2  # on their way
_MOST_FLUSHES = 5

Message = tuple[Prepared, Sequence[bytes]]

_FLUSHING: Message = (FLUSH, ())


class Lane:
    """One connection, used by nobody else meanwhile, and the bookings that go over it. Belongs to one event loop.

    A booking that holds others up is cancelled, which leaves nothing of it: it fails with QueryCanceled, and may be
    made again in a lane that is `exclusive`. One that waits long and for nobody is cancelled too. While the connection
    is `wanted` elsewhere, no more bookings are taken. `on_end` is called once: when nothing is on its way any more, the
    connection being as it was, or when the connection is lost.
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
        self.cancelling = Cancelling(connection, timeout=PATIENCE_SECONDS)
        self._pgconn = connection.pgconn
        self._prepared = prepared
        self._on_end = on_end
        self._wanted = wanted
        self._leaving = exclusive
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Call, Answer]] = deque()
        self._rounds: deque[Round] = deque()  # on their way
        self._result: PGresult | None = None  # of the message that is being answered
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
        if not self._rounds:
            return True
        # Behind one who was cancelled there may be more of the kind.
        return not self._rounds[0].disturbed and self._loop.time() - self._progress < PATIENCE_SECONDS

    def send(self, call: Call) -> Answer:
        """What the server will answer; or a `psycopg.Error`, or a TimeoutError where it answers nothing."""
        answer: Answer = self._loop.create_future()
        self._queue.append((call, answer))
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
        calls: list[Call] = []
        answers: list[Answer] = []
        while self._queue and len(calls) < MOST_TOGETHER:
            call, answer = self._queue.popleft()
            if not answer.done():  # else nobody waits for it any more
                calls.append(call)
                answers.append(answer)
        if not self._rounds:
            self._progress = self._loop.time()
        if len(calls) > 1:
            self._put(Round(answers), *[(call.unawaited, call.values) for call in calls], _FLUSHING)
        elif calls:
            self._put(Round(answers), (calls[0].durable, calls[0].values))
        elif not self._rounds:
            self._end()

    def _put(self, round_: Round, *messages: Message) -> None:
        round_.disturbed = self.cancelling.is_under_way
        self._rounds.append(round_)
        try:
            for prepared, values in messages:
                if prepared.name not in self._prepared:
                    self._pgconn.send_prepare(prepared.name, prepared.text)
                    self._prepared.add(prepared.name)
                self._pgconn.send_query_prepared(prepared.name, values)
                self._pgconn.pipeline_sync()
                round_.messages += 1
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
                self._rounds[0].results.append(self._result)
                self._result = None
                self._progress = self._loop.time()
                if self._rounds[0].is_over:
                    self._finish(self._rounds.popleft())
            elif self._result is None or self._result.status != ExecStatus.FATAL_ERROR:
                self._result = result

    def _finish(self, round_: Round) -> None:
        unflushed: psycopg.Error | None = None
        failure = failure_of(round_.results.pop()) if len(round_.results) > len(round_.answers) else None
        if round_.disturbed or (isinstance(failure, NOTHING_RAN) and round_.flushes < _MOST_FLUSHES):
            self._flush_again(round_, failure)
            return
        if failure is not None:  # not as itself: these bookings have been made
            unflushed = psycopg.OperationalError(f"bookings were made, and may not be on disk: {failure}")
        round_.deliver(unflushed)
        self._schedule()

    def _flush_again(self, round_: Round, failure: psycopg.Error | None) -> None:
        if isinstance(failure, InvalidSqlStatementName):
            self.forget()
        round_.messages = len(round_.results)
        round_.flushes += failure is not None
        self._put(round_, _FLUSHING)

    def _look(self) -> None:
        """See whether the server is getting on, and whether others get a connection."""
        self._leaving = self._leaving or self.cancelling.is_lost or self._wanted()
        waited = self._loop.time() - self._progress if self._rounds else 0.0
        patience_left = PATIENCE_SECONDS - waited
        self._watch = self._loop.call_later(patience_left if patience_left > 0 else PATIENCE_SECONDS, self._look)
        if patience_left > 0:
            return
        if waited >= LONGEST_ANSWER_SECONDS:
            self._lose(TimeoutError())
        elif self._in_vain:
            for round_ in self._rounds:  # nobody knows which message the cancel will find
                round_.disturbed = True
            self.cancelling.begin()

    @property
    def _in_vain(self) -> bool:
        """Whether it is a booking that the server is at, and it holds others up or nobody waits for it any more."""
        first = self._rounds[0]
        others = len(first.answers) > 1 or len(self._rounds) > 1 or bool(self._queue)
        return first.books and (others or first.answers[0].done())

    def _lose(self, error: Exception) -> None:
        if self._ended:
            return
        self._pgconn.finish()
        unanswered = [*(each for one in self._rounds for each in one.answers), *(answer for _, answer in self._queue)]
        self._rounds.clear()
        self._queue.clear()
        self._end()
        for answer in unanswered:
            if not answer.done():
                answer.set_exception(error)

    def _end(self) -> None:
        self._ended = True
        self._watch.cancel()
        self._loop.remove_reader(self._socket)
        if self._writing:
            self._loop.remove_writer(self._socket)
        with suppress(psycopg.OperationalError):  # it is lost, as whoever takes it in will see
            self._pgconn.exit_pipeline_mode()
        self._on_end(self)
