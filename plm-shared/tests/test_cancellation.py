"""Who cancels a task need not know which library it waits in: one cancel ends it, however that library takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from plm_shared.cancellation import kept_cancel


class ConnectionLost(Exception):
    """What a driver raises."""


async def _raises_its_own() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise ConnectionLost from None


async def _goes_on() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return


async def _raises_it() -> None:
    await asyncio.Event().wait()


def _cancelled_once(work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """The task, ended, after one cancel while it waits in `work`."""

    async def sweep() -> None:
        while True:
            try:
                with kept_cancel():
                    await work()
            except ConnectionLost:
                await asyncio.sleep(0)

    async def scenario() -> asyncio.Task[None]:
        task = asyncio.create_task(sweep())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.done(), "the cancel was lost"
        return task

    return asyncio.run(scenario())


@pytest.mark.parametrize("work", [_raises_its_own, _goes_on, _raises_it])
def test_one_cancel_ends_a_task_whatever_the_library_makes_of_it(work: Callable[[], Awaitable[None]]) -> None:
    assert _cancelled_once(work).cancelled()


def test_the_error_that_took_the_place_of_a_cancel_is_its_cause_and_its_words_are_kept() -> None:
    async def scenario() -> None:
        task = asyncio.create_task(_kept(_raises_its_own))
        await asyncio.sleep(0)
        task.cancel("by a scope")
        with pytest.raises(asyncio.CancelledError, match="by a scope") as caught:
            await task
        assert isinstance(caught.value.__cause__, ConnectionLost)

    asyncio.run(scenario())


def test_what_nobody_cancelled_ends_as_it_ends() -> None:
    async def lost() -> None:
        raise ConnectionLost

    async def nothing() -> None:
        pass

    asyncio.run(_kept(nothing))
    with pytest.raises(ConnectionLost):
        asyncio.run(_kept(lost))


def test_a_task_that_was_cancelled_before_tidies_up_as_ever() -> None:
    async def lost() -> None:
        raise ConnectionLost

    async def tidies() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await _kept(lost)
            except ConnectionLost:
                return "tidied up"
        return "never cancelled"

    async def scenario() -> str:
        task = asyncio.create_task(tidies())
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(scenario()) == "tidied up"


def test_a_time_limit_within_is_no_cancel() -> None:
    async def limited() -> None:
        async with asyncio.timeout(0):
            await _raises_its_own()

    with pytest.raises(ConnectionLost):
        asyncio.run(_kept(limited))


async def _kept(work: Callable[[], Awaitable[None]]) -> None:
    with kept_cancel():
        await work()
