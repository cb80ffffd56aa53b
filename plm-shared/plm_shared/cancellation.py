"""A cancel that a library loses is still one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_cancel"]


@contextmanager
def kept_cancel() -> Iterator[None]:
    """Raise `asyncio.CancelledError` at the end of the block when the task was cancelled within, whatever came of it.

    A driver that is cancelled while it gives up on its connection may raise the connection's error in place of the
    cancel, and a pool that is cancelled while it looks at a connection may count that connection as a broken one and go
    on. Whoever then waits for the task waits for ever, or until it is cancelled once more. A cancel from before the
    block, under which its code tidies up, is left alone; one that is taken back (`asyncio.Task.uncancel`), as
    `asyncio.timeout` does with its own, does not count.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine runs in one
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError(*_words_of(error)) from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


def _words_of(error: BaseException | None) -> tuple[object, ...]:
    """Those of the cancel that `error` took the place of: libraries know cancels of their own by them."""
    while error is not None and not isinstance(error, asyncio.CancelledError):
        error = error.__context__
    return error.args if error is not None else ()
