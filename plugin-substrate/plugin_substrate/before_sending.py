"""What may keep a call from being sent: its turn that does not come in time, a refusal, the end of its worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from plugin_substrate.errors import CallNotStartedError, PluginTimeoutError, WorkerDiedError
from plugin_substrate.interface import CallContext

T = TypeVar("T")


def not_sent(call_id: str) -> WorkerDiedError:
    """Return the error of a call whose worker ended before it was sent."""
    return WorkerDiedError(f"call {call_id} was not sent: its worker had ended", outcome_known=True)


async def in_time(context: CallContext, waiting: Coroutine[Any, Any, T]) -> T:
    """Await what comes before a call is sent, for no longer than the call itself may take."""
    if context.deadline is None:
        return await waiting
    seconds = max(0.0, context.deadline - time.time())
    try:
        async with asyncio.timeout(seconds):
            return await waiting
    except TimeoutError as error:
        message = f"call {context.call_id} was not sent: it waited for its turn until its deadline, {seconds:.3f} s"
        raise PluginTimeoutError(message, timeout_seconds=seconds) from error


async def ask_before(before_start: Callable[[], Awaitable[bool]], call_id: str) -> None:
    """Ask the caller for the last time; a `CallNotStartedError` where the answer is no or an exception."""
    try:
        allowed = await before_start()
    except Exception as error:
        raise CallNotStartedError(f"call {call_id} was not sent: {type(error).__name__}: {error}") from error
    if not allowed:
        raise CallNotStartedError(f"call {call_id} was not sent: it is no longer allowed")
