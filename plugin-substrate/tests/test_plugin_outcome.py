"""What something ends with is heard by all who wait and listen, in order, once."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from plugin_substrate.outcome import Outcome


async def test_who_waits_goes_on_after_those_who_listen_and_they_hear_in_the_order_in_which_they_came() -> None:
    outcome: Outcome[int] = Outcome()
    heard: list[Any] = []

    async def wait() -> None:
        heard.append(await outcome.outcome())

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    outcome.when_done(lambda: heard.append("first"))
    outcome.when_done(lambda: heard.append("second"))
    outcome.finish(7)
    assert heard == ["first", "second"]
    await waiting
    assert heard == ["first", "second", 7]
    outcome.when_done(lambda: heard.append("late"))
    assert heard[-1] == "late"
    assert await outcome.outcome() == outcome.result() == 7


async def test_what_is_brought_first_counts() -> None:
    outcome: Outcome[int] = Outcome()
    assert (outcome.done, outcome.error) == (False, None)
    with pytest.raises(RuntimeError, match="has not ended"):
        outcome.result()
    outcome.finish(1)
    outcome.finish(2)
    outcome.fail(ValueError("too late"))
    assert (outcome.done, outcome.error, outcome.result()) == (True, None, 1)


async def test_a_value_of_none_is_a_value() -> None:
    outcome: Outcome[None] = Outcome()
    outcome.finish(None)
    assert outcome.done
    assert await outcome.outcome() is None


async def test_an_error_is_raised_to_each_who_asks_and_kept_by_nobody_else() -> None:
    outcome: Outcome[int] = Outcome()
    outcome.fail(ValueError("as it was brought"))
    for _ in range(2):
        with pytest.raises(ValueError, match="as it was brought"):
            await outcome.outcome()
    kept = weakref.ref(outcome)
    del outcome
    gc.collect()
    assert kept() is None


async def test_who_stops_waiting_changes_nothing_for_the_others() -> None:
    outcome: Outcome[int] = Outcome()
    one, two = (asyncio.create_task(outcome.outcome()) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.wait({one})
    assert not outcome.done
    outcome.finish(7)
    assert await two == 7
    assert one.cancelled()


async def test_waiting_ends_with_it_or_with_the_time_that_was_given() -> None:
    outcome: Outcome[int] = Outcome()
    assert not await outcome.wait(0)
    assert not await outcome.wait(0.001)
    waiting = asyncio.create_task(outcome.wait(30))
    await asyncio.sleep(0)
    outcome.fail(ValueError("it has ended all the same"))
    assert await waiting
    assert await outcome.wait()


async def test_a_listener_that_fails_is_told_of_and_the_others_hear() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    outcome: Outcome[int] = Outcome()
    heard: list[str] = []

    def fail() -> None:
        raise ValueError("its own")

    outcome.when_done(fail)
    outcome.when_done(lambda: heard.append("heard"))
    outcome.finish(7)
    assert heard == ["heard"]
    assert [str(context["exception"]) for context in told] == ["its own"]
    assert outcome.result() == 7
