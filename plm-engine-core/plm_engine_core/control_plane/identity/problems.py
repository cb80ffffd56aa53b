"""Refusals on the wire: problem details (RFC 9457), over HTTP and over a WebSocket's handshake."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Self

from plm_engine_core.control_plane.identity.audit import AuditError
from plm_engine_core.control_plane.identity.errors import IdentityProviderUnavailable, IdentityValidationError

_POLICY_VIOLATION: Final = 1008  # RFC 6455, section 7.4.1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the client is told instead of an answer."""

    status: int
    title: str
    code: str
    detail: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    retry_after_seconds: int | None = None

    @classmethod
    def unauthenticated(cls, error: IdentityValidationError) -> Self:
        """401; the text never repeats any part of the token, and ends in what to do."""
        return cls(
            status=401,
            title="Identity not established",
            code=error.code,
            detail=f"{error}; {error.remedy}",
            headers=((b"www-authenticate", b'Bearer realm="plm"'),),
        )

    @classmethod
    def provider_unavailable(cls, error: IdentityProviderUnavailable) -> Self:
        """503: whether the token is good cannot be said, so it is not."""
        return cls(
            status=503,
            title="Identity provider unavailable",
            code=error.code,
            detail=f"{error}; try again",
            retry_after_seconds=error.retry_after_seconds,
        )

    @classmethod
    def audit_unavailable(cls) -> Self:
        """503: nobody acts without a record."""
        return cls(
            status=503,
            title="Audit log unavailable",
            code=AuditError.code,
            detail="the request was refused because its audit record could not be written; try again",
            retry_after_seconds=1,
        )

    def body(self) -> bytes:
        """The JSON document; its three members after `code` are the older form of the same."""
        later = self.retry_after_seconds
        return json.dumps(
            {
                "type": f"urn:plm:problem:{self.code.lower()}",
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
                "code": self.code,
                "error_code": self.code,
                "message": self.detail,
                "technical_detail": None,
                **({"retry_after_ms": later * 1000} if later is not None else {}),
            }
        ).encode()


async def refuse(
    problem: Problem,
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Send the problem; a server that cannot answer a handshake with a body just closes it."""
    prefix = "http.response"
    if scope["type"] == "websocket":
        await receive()  # the handshake may be answered only after its `websocket.connect`
        prefix = "websocket.http.response"
        if prefix not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem.code})
            return
    body = problem.body()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *problem.headers,
    ]
    if problem.retry_after_seconds is not None:
        headers.append((b"retry-after", str(problem.retry_after_seconds).encode()))
    await send({"type": f"{prefix}.start", "status": problem.status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})
