"""A private event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TIME_TO_FINISH = 10.0  # seconds that closing leaves to work which is done whoever goes away


class LoopThread:
    """Runs coroutines for other threads. It starts with the first one, and ends with `close`.

    Every method may be called from any thread of the process that made it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False  # for who asks for something
        self._ended = False  # for everybody
        self._under_way: dict[asyncio.Task[Any], Callable[[], Coroutine[Any, Any, Any]]] = {}
        self._late: list[concurrent.futures.Future[None]] = []

    def run(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        unheard: Callable[[T], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """Do `work` in the thread and wait for it. Who is interrupted meanwhile takes the work back.

        With `unheard` it is done all the same, and that is done with what it returned to nobody.

        Raises:
            RuntimeError: it is called where an event loop runs, which it would block; or as for `submit`; or the
                thread was closed while the work was under way.
        """
        if _inside_a_loop():
            raise RuntimeError(f"{self._name} waits, and would block the event loop that runs here; await instead")
        return self.block(work, unheard=unheard)

    def block(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        unheard: Callable[[T], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """As `run`, also where an event loop runs, which stands still meanwhile: for what is short and comes once.

        Raises:
            RuntimeError: it is called in the thread itself, which would wait for ever; or as for `run`.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{self._name} would wait for itself here; do this in another thread")
        handed = _HandedOver(self, work, unheard)
        try:
            self.submit(handed)
            return self._told(handed.answer)
        except BaseException:
            handed.take_back()  # also where the interrupt came before there was anything to wait for
            raise

    async def away(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        unheard: Callable[[T], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """The same from another event loop; who is cancelled meanwhile takes the work back."""
        loop, answered = asyncio.get_running_loop(), asyncio.Event()
        handed = _HandedOver(self, work, unheard)

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # the loop of who asked is closed
                loop.call_soon_threadsafe(answered.set)

        try:
            self.submit(handed)
            handed.answer.add_done_callback(tell)
            await answered.wait()
            return self._told(handed.answer)
        except BaseException:
            handed.take_back()
            raise

    def _told(self, answer: concurrent.futures.Future[T]) -> T:
        try:
            return answer.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError(
                f"{self._name} was closed while this call was under way; read what became of it"
            ) from None

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Have `work` done in the thread, without waiting.

        Raises:
            RuntimeError: it is closed; or this process was forked from the one that made it.
        """
        self._refuse_fork()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed; make a new one")
            return self._begin(work)

    def finish(self, unheard: _HandedOver[None]) -> None:
        """As `submit`, also while the thread is being closed: what is left to do with an answer that nobody heard.

        Raises:
            RuntimeError: as for `submit`, once closing waits for nothing more.
        """
        self._refuse_fork()
        with self._lock:
            if self._ended:
                raise RuntimeError(f"{self._name} is closed; make a new one")
            begun = self._begin(unheard)
            if self._closed:
                self._late.append(begun)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what is under way, do `last`, end the thread. Closing twice, or in a forked process, does nothing.

        Work that is done whoever goes away is finished first, in ten seconds at most; who waits for it is told that the
        thread was closed.
        """
        if os.getpid() != self._pid:
            return
        if _inside_a_loop():
            raise RuntimeError(f"closing {self._name} waits, and would block the event loop that runs here")
        with self._lock:
            already, self._closed = self._closed, True
            loop, thread = self._loop, self._thread
        if already or loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._wind_up(last), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def abandon(self) -> bool:
        """End the thread without waiting for it, when nobody can use it any more; whether it still ran."""
        if os.getpid() != self._pid or self._closed:
            return False
        self._closed = self._ended = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        return self._loop is not None

    async def _tracked(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._under_way[task] = work
        try:
            return await work()
        finally:
            del self._under_way[task]

    async def _wind_up(self, last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        for task, work in self._under_way.items():
            if not (isinstance(work, _HandedOver) and work.finishes_unheard()):
                task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_TIME_TO_FINISH):
                while waited_for := self._unfinished():
                    await asyncio.wait(waited_for)
        with self._lock:
            self._ended = True
        if left := list(self._under_way):
            logger.warning("%s is closed; calls of it that were not finished: %d", self._name, len(left))
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if last is not None:
            await last()

    def _unfinished(self) -> set[asyncio.Future[Any]]:
        """What closing still waits for; when there is nothing, nothing more can come."""
        with self._lock:
            late = {asyncio.wrap_future(begun) for begun in self._late if not begun.done()}
            unfinished = late | set(self._under_way)
            self._ended = not unfinished
            return unfinished

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(f"{self._name} was made before this process was forked; make a new one here")

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        if self._loop is None:
            self._start()
        loop = self._loop
        assert loop is not None  # noqa: S101  # started above
        return asyncio.run_coroutine_threadsafe(self._tracked(work), loop)

    def _start(self) -> None:
        loop = asyncio.new_event_loop()

        def live() -> None:
            try:
                loop.run_forever()
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()

        thread = threading.Thread(target=live, name=self._name, daemon=True)
        thread.start()
        self._thread, self._loop = thread, loop


class _HandedOver(Generic[T]):
    """Work and its answer. Its caller may go away at any moment: before the work has begun, and after it has ended."""

    def __init__(
        self,
        thread: LoopThread,
        work: Callable[[], Coroutine[Any, Any, T]],
        unheard: Callable[[T], Coroutine[Any, Any, None]] | None,
    ) -> None:
        self.answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._thread = thread
        self._work = work
        self._unheard = unheard
        self._lock = threading.Lock()
        self._at: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    async def __call__(self) -> None:
        with self._lock:
            if self.answer.cancelled() and self._unheard is None:
                return
            self._at = asyncio.get_running_loop(), cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            result = await self._work()
        except asyncio.CancelledError:
            self.answer.cancel()
            raise
        except BaseException as error:  # noqa: BLE001  # it is the caller's, and must not end the thread
            try:
                self.answer.set_exception(error)
            except concurrent.futures.InvalidStateError:  # taken back
                logger.warning("a call that was taken back failed, and nobody is told", exc_info=error)
        else:
            try:
                self.answer.set_result(result)
            except concurrent.futures.InvalidStateError:
                if self._unheard is not None:
                    await self._do_unheard(self._unheard, result)

    async def _do_unheard(self, unheard: Callable[[T], Coroutine[Any, Any, None]], result: T) -> None:
        try:
            await unheard(result)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # nobody hears it, and it must not end the thread
            logger.warning("what a call that was taken back left to do failed", exc_info=error)

    def finishes_unheard(self) -> bool:
        """Whether this is done whoever goes away; then its caller is told no more of it."""
        if self._unheard is not None:
            self.answer.cancel()
        return self._unheard is not None

    def take_back(self) -> None:
        with self._lock:
            in_time, at = self.answer.cancel(), self._at
        unheard, answer = self._unheard, self.answer
        if unheard is None:
            if in_time and at is not None and not at[0].is_closed():
                at[0].call_soon_threadsafe(at[1].cancel)
        elif not in_time and answer.exception(0) is None:
            after = _HandedOver(self._thread, lambda: unheard(answer.result(0)), _nothing)
            after.answer.cancel()  # nobody waits for it
            with suppress(RuntimeError):  # the thread is closed
                self._thread.finish(after)


async def _nothing(_: None) -> None:
    """What was left to do is done."""


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
