"""A bound on request bodies, kept while they arrive."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plm_backend.problems import TOO_LARGE, problem

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class BodyLimitMiddleware:
    """Answers 413 as soon as a body is known, or turns out, to be larger than `max_bytes`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        detail = (
            f"the body has more than the {self._max_bytes} bytes this API takes; send less, or ask for a higher limit"
        )
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await problem(TOO_LARGE, "validation/body_too_large", detail)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # FastAPI's own class: while it reads a body it turns every other exception into a 400.
                raise HTTPException(TOO_LARGE, detail)
            return message

        await self._app(scope, limited, send)
