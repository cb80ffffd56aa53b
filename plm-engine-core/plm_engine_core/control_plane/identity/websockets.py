"""A WebSocket ends with its token: the handshake proves who is there once, and may be hours ago."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from plm_engine_core.control_plane.identity.errors import IdentityExpiredError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

EXPIRED_CLOSE: Final = 4401
"""Close code (of the private range, RFC 6455, section 7.4.2) of a connection whose token expired."""


def closing_at(expires_at: datetime, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send` of a WebSocket that is closed once `expires_at` has passed.

    The application is told as of any other disconnect, by what it receives next; what it sends after that is dropped.
    """
    over = False

    def left() -> float:
        return (expires_at - datetime.now(UTC)).total_seconds()

    async def end() -> Message:
        nonlocal over
        if not over:
            over = True
            await send({"type": "websocket.close", "code": EXPIRED_CLOSE, "reason": IdentityExpiredError.code})
        return {"type": "websocket.disconnect", "code": EXPIRED_CLOSE, "reason": IdentityExpiredError.code}

    async def receive_until() -> Message:
        if over or left() <= 0:
            return await end()
        try:
            return await asyncio.wait_for(receive(), left())
        except TimeoutError:
            return await end()

    async def send_until(message: Message) -> None:
        if over or left() <= 0:
            await end()
            return
        await send(message)

    return receive_until, send_until
