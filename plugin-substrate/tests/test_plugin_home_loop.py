"""Work that is handed over to an event loop ends for who waits for it, however it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
from plugin_substrate.home_loop import HomeLoop


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
