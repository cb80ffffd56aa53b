"""What something ends with, for those who wait and those who listen.

A future does the same with one more step of the event loop between the end and whoever hears of it, and a task that is
cancelled while it awaits a future takes that with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Outcome(Generic[T]):
    """A value or an error, brought once. Belongs to one event loop.

    Who listens is called in the very step that brings it, in the order in which they came, and before anybody who waits
    goes on. Who stops waiting changes nothing. An error that nobody asks for is forgotten without a word.
    """

    def __init__(self) -> None:
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], object]] = []
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self._done

    @property
    def error(self) -> BaseException | None:
        """The error that it is; None for a value, and while it is not there."""
        return self._error

    def result(self) -> T:
        """Return the value, or raise the error; a RuntimeError while it is not there."""
        error = self._error
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # the traceback leads here
        if not self._done:
            raise RuntimeError("it has not ended yet")
        return cast("T", self._value)

    def finish(self, value: T) -> None:
        """Bring a value, unless something was brought before."""
        if not self._done:
            self._value = value
            self._end()

    def fail(self, error: BaseException) -> None:
        """Bring an error, unless something was brought before."""
        if not self._done:
            self._error = error
            self._end()

    def when_done(self, listener: Callable[[], object]) -> None:
        """Call ``listener`` once it is there, at once if it is; what it raises goes to the loop's exception handler."""
        if self._done:
            _call(listener)
        else:
            self._listeners.append(listener)

    async def outcome(self) -> T:
        """Wait for it, and return the value or raise the error."""
        if not self._done:
            await self._arrival()
        return self.result()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is there, for no longer than that if it is given; tells whether it is."""
        if not self._done:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._arrival()
        return self._done

    def _arrival(self) -> asyncio.Future[None]:
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(arrival)
        return arrival

    def _end(self) -> None:
        self._done = True
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            _call(listener)
        waiting, self._waiting = self._waiting, []
        for arrival in waiting:
            if not arrival.done():
                arrival.set_result(None)


def _call(listener: Callable[[], Any]) -> None:
    try:
        listener()
    except Exception as error:  # noqa: BLE001 - one listener's failure must not keep the others from hearing
        asyncio.get_running_loop().call_exception_handler({
            "message": "who listened for the end of something failed", "exception": error,
        })  # fmt: skip
