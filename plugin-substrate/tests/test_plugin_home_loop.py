"""Work that is handed over to an event loop ends for who waits for it, however it ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
from plugin_substrate.home_loop import Begun, HomeLoop
from plugin_substrate.outcome import Outcome


@pytest.fixture
def home() -> HomeLoop:
    return HomeLoop()


async def number() -> int:
    await asyncio.sleep(0)
    return threading.get_ident()


def test_the_value_comes_from_the_loops_thread(home: HomeLoop) -> None:
    assert home.run(number) not in (0, threading.get_ident())
    home.release()


def test_an_error_comes_whole_and_is_kept_by_nobody(home: HomeLoop) -> None:
    class FailureError(Exception):
        pass

    async def fail() -> None:
        raise FailureError("as it was raised")

    with pytest.raises(FailureError, match="as it was raised") as caught:
        home.run(fail)
    home.release()
    kept = weakref.ref(caught.value)
    del caught
    gc.collect()
    assert kept() is None


async def test_work_that_is_cancelled_before_its_first_step_does_not_leave_its_caller_waiting(home: HomeLoop) -> None:
    """As a loop does that ends while somebody hands work over to it."""
    loop = home.adopt()

    def cancelled_at_once(
        loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        task.cancel()
        return task

    heard: asyncio.Future[BaseException] = loop.create_future()

    def wait() -> None:
        try:
            home.run(number)
        except BaseException as error:  # noqa: BLE001 - whichever it is
            loop.call_soon_threadsafe(heard.set_result, error)

    loop.set_task_factory(cancelled_at_once)
    threading.Thread(target=wait, daemon=True).start()
    end = loop.call_later(30, heard.set_result, TimeoutError())
    try:
        assert isinstance(await heard, asyncio.CancelledError)
    finally:
        end.cancel()
        loop.set_task_factory(None)


async def test_who_is_interrupted_while_still_handing_over_takes_the_work_back(
    home: HomeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waking the loop is a system call: a signal may be heard in it, when the work has begun already."""
    loop = home.adopt()
    hand_over = loop.call_soon_threadsafe
    begun = threading.Event()
    ended: asyncio.Future[str] = loop.create_future()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set_result("taken back")

    def interrupted(callback: Any, *args: Any) -> asyncio.Handle:
        monkeypatch.undo()
        hand_over(callback, *args)
        assert begun.wait(30)
        raise KeyboardInterrupt

    def wait() -> None:
        with pytest.raises(KeyboardInterrupt):
            home.run(work)

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    async with asyncio.timeout(30):
        assert await ended == "taken back"
    await asyncio.to_thread(waiting.join)


async def test_many_threads_at_once_each_get_their_own(home: HomeLoop) -> None:
    home.adopt()

    async def same(value: int) -> int:
        await asyncio.sleep(0)
        return value

    results = await asyncio.gather(
        *(asyncio.to_thread(home.run, lambda value=value: same(value)) for value in range(200))  # type: ignore[misc]
    )
    assert results == list(range(200))


class Bench:
    """Work that begins without a task."""

    def __init__(self) -> None:
        self.taken_back = threading.Event()
        self.begun = threading.Event()

    def begin(self) -> Begun[int]:
        self.loop = asyncio.get_running_loop()
        self.outcome: Outcome[int] = Outcome()
        self.begun.set()
        return Begun(self.outcome, self.taken_back.set)

    def end(self, how: Any) -> None:
        self.loop.call_soon_threadsafe(how)


async def never() -> int:
    raise AssertionError("it had begun already")


def test_work_that_begins_at_once_needs_no_task_and_its_value_arrives(home: HomeLoop) -> None:
    bench = Bench()

    def finish() -> None:
        assert bench.begun.wait(30)
        bench.end(lambda: bench.outcome.finish(7))

    thread = threading.Thread(target=finish)
    thread.start()
    assert home.run(never, bench.begin) == 7
    thread.join()
    home.release()


@pytest.mark.parametrize("error", [ValueError("as it was raised"), asyncio.CancelledError("ended")])
def test_work_that_began_at_once_fails_as_other_work_does(home: HomeLoop, error: BaseException) -> None:
    def begin() -> Begun[int]:
        outcome: Outcome[int] = Outcome()
        outcome.fail(error)
        return Begun(outcome, lambda: None)

    def refuse() -> Begun[int]:
        raise error

    with pytest.raises(type(error)):
        home.run(never, begin)
    if isinstance(error, Exception):
        with pytest.raises(type(error), match="as it was raised"):
            home.run(never, refuse)
    home.release()


def test_work_that_cannot_begin_at_once_is_done_in_a_task(home: HomeLoop) -> None:
    assert home.run(number, lambda: None) not in (0, threading.get_ident())
    home.release()


async def test_a_loop_that_is_not_our_own_does_all_work_in_tasks_as_it_ends_those_when_it_ends(home: HomeLoop) -> None:
    home.adopt()
    assert await asyncio.to_thread(home.run, number, Bench().begin) == threading.get_ident()


def test_who_is_interrupted_takes_back_what_began_at_once(home: HomeLoop) -> None:
    bench, main = Bench(), threading.get_ident()

    def interrupt() -> None:
        assert bench.begun.wait(30)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        home.run(never, bench.begin)
    thread.join()
    assert bench.taken_back.wait(30)
    home.release()
