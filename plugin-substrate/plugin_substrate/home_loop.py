"""One event loop owns the workers; asynchronous callers run on it, synchronous ones hand their work over to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, NamedTuple, TypeVar

from plugin_substrate.bell import keep_bell, take_bell
from plugin_substrate.outcome import Outcome

T = TypeVar("T")

_ABANDONED = "the event loop of this PluginManager was closed before unload_all(); make a new manager"


class Begun(NamedTuple, Generic[T]):
    """Work that is on its way without a task: what it will end with, and how to take it back."""

    outcome: Outcome[T]
    take_back: Callable[[], object]


class HomeLoop:
    """The loop of the first asynchronous caller, or a private one in a thread when only synchronous callers exist."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def adopt(self) -> asyncio.AbstractEventLoop:
        """Make the running loop the owner; a RuntimeError when another one already is."""
        running = asyncio.get_running_loop()
        with self._lock:
            if self._loop is None:
                self._loop = running
            elif self._loop.is_closed():
                raise RuntimeError(_ABANDONED)
            elif self._loop is not running:
                raise RuntimeError("this PluginManager belongs to another event loop; unload everything there first")
        return running

    def run(
        self, work: Callable[[], Coroutine[Any, Any, T]], at_once: Callable[[], Begun[T] | None] | None = None
    ) -> T:
        """Run ``work`` on the owner and wait for it; a RuntimeError when called from the owner's own thread.

        ``at_once`` may do the same without a task, or return None to have ``work`` done. It is asked only where the
        loop is a private one: others cancel their tasks when they end, and so let go of who waits for them.
        """
        with self._lock:
            if self._loop is None:
                self._start_private_loop()
            loop = self._loop
            own = self._thread is not None
        return self._hand_over(loop, work, at_once if own else None)

    def run_leftover(self, loop: asyncio.AbstractEventLoop | None, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Like `run`, for work on what belongs to ``loop``; nothing once that was released, which ended all of it."""
        with self._lock:
            owned = loop is not None and loop is self._loop
        if owned:
            self._hand_over(loop, work)

    def _hand_over(
        self,
        loop: asyncio.AbstractEventLoop | None,
        work: Callable[[], Coroutine[Any, Any, T]],
        at_once: Callable[[], Begun[T] | None] | None = None,
    ) -> T:
        if loop is None or _is_running_here(loop):
            raise RuntimeError("inside the event loop use the asynchronous form of this method")
        if loop.is_closed():
            raise RuntimeError(_ABANDONED)
        return _HandedOver(loop, work, at_once).result()

    def release(self) -> None:
        """Forget the owner, for when nothing is left that belongs to it."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if thread is not None and loop is not None and thread is not threading.current_thread():
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _start_private_loop(self) -> None:
        loop = asyncio.new_event_loop()

        def live() -> None:
            try:
                loop.run_forever()
            finally:
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()

        self._loop = loop
        self._thread = threading.Thread(target=live, name="plugin-manager", daemon=True)
        self._thread.start()


class _HandedOver(Generic[T]):
    """Work that another thread's event loop does while this one waits for its bell.

    `asyncio.run_coroutine_threadsafe` does the same with a condition, a second future and two more trips to the loop,
    which is more than a call of a plugin costs. The bell is rung in the last step of the work, not in the round after
    it: everything that is written here before that may be read after it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Callable[[], Coroutine[Any, Any, T]],
        at_once: Callable[[], Begun[T] | None] | None,
    ) -> None:
        self._loop = loop
        self._work = work
        self._at_once = at_once
        self._take_back: Callable[[], object] | None = None
        self._outcome: list[T] = []
        self._error: BaseException = asyncio.CancelledError()  # when it was ended before it began
        self._given_up = False
        self._ended = False
        self._bell = take_bell()

    def result(self) -> T:
        """Hand the work over and wait for its end; who is interrupted meanwhile takes it back."""
        try:
            self._loop.call_soon_threadsafe(self._start)  # wakes the loop: a signal may be heard when it runs already
            self._bell.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(self._give_up)
            raise
        keep_bell(self._bell)
        if self._outcome:
            return self._outcome[0]
        error = self._error
        del self._error  # its traceback leads here
        raise error

    def _start(self) -> None:
        if self._given_up or (self._at_once is not None and self._is_begun(self._at_once)):
            return
        task = self._loop.create_task(self._run())
        task.add_done_callback(self._see_to_the_end)
        self._take_back = task.cancel

    def _is_begun(self, at_once: Callable[[], Begun[T] | None]) -> bool:
        try:
            begun = at_once()
        except BaseException as error:
            self._error = error
            self._end()
            if not isinstance(error, Exception):
                raise
            return True
        if begun is None:
            return False
        self._take_back = begun.take_back
        begun.outcome.when_done(lambda: self._take_over(begun.outcome))
        return True

    def _take_over(self, outcome: Outcome[T]) -> None:
        """Pass on how work without a task has ended."""
        try:
            self._outcome.append(outcome.result())
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            self._error = error
        self._end()

    async def _run(self) -> None:
        try:
            self._outcome.append(await self._work())
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise  # the loop has to know too
        self._end()

    def _see_to_the_end(self, task: asyncio.Task[None]) -> None:
        """Let go of who waits for a task that was ended before its last step."""
        if task.cancelled() or task.exception() is not None:
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._bell.ring()

    def _give_up(self) -> None:
        self._given_up = True
        if self._take_back is not None:
            self._take_back()


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
