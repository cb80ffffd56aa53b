"""Which tenant an HTTP request is for. Plain ASGI; no web framework needed.

Stack order, outermost first: CORS, identity, tenant; then replies of the inner two carry CORS headers as well.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from plm_shared.trace_context import TraceContext, continued_context, new_root_context, reset_context, set_context
from plm_shared.traceparent import parse_traceparent

__all__ = [
    "CORE_CALLER_HEADER",
    "EXEMPT_PATHS",
    "InvalidCoreCallerError",
    "PlmTenantMiddleware",
    "cors_allowed_headers",
    "parse_core_caller",
]

CORE_CALLER_HEADER: Final = "X-Core-Caller"
EXEMPT_PATHS: Final = frozenset({"/v1/health", "/v1/health/live", "/v1/health/ready"})
"""Asked by load balancers, which have no tenant."""

_POLICY_VIOLATION: Final = 1008

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class InvalidCoreCallerError(ValueError):
    """The header is missing, empty, given twice, or no UUID."""


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def problem(self) -> dict[str, Any]:
        """Problem details (RFC 9457); ``message`` is the older name of ``detail``."""
        return {
            "type": f"urn:plm:problem:{self.code.lower()}",
            "title": "The tenant of the request is not established",
            "status": self.status,
            "detail": self.message,
            "code": self.code,
            "message": self.message,
        }


def parse_core_caller(value: str | None) -> uuid.UUID:
    """The tenant that the header names.

    Raises:
        InvalidCoreCallerError: it names none.
    """
    if value is None or not value.strip():
        raise InvalidCoreCallerError(f"{CORE_CALLER_HEADER} is missing; send your tenant's UUID")
    try:
        return uuid.UUID(value.strip())
    except ValueError:
        raise InvalidCoreCallerError(
            f"{CORE_CALLER_HEADER} must be a tenant's UUID, not {value!r:.80}; correct it"
        ) from None


def cors_allowed_headers(extra: Iterable[str] = ()) -> list[str]:
    """The request headers a browser may send, each once whatever its case, in order."""
    spelled: dict[str, str] = {}
    for name in ("Authorization", "Content-Type", CORE_CALLER_HEADER, *extra):
        spelled.setdefault(name.lower(), name)
    return list(spelled.values())


class PlmTenantMiddleware:
    """Binds a trace context for the request's tenant, continuing a valid inbound ``traceparent``.

    ``identity_tenant`` answers the tenant of the identity bound to this request, or None when none is bound:

    ===================  ==================  ==========================================
    identity             ``X-Core-Caller``   result
    ===================  ==================  ==========================================
    bound                absent              the identity's tenant
    bound                the same tenant     that tenant
    bound                another tenant      403 ``CORE_CALLER_MISMATCH``
    none                 present             the header's tenant
    none                 absent              400 ``MISSING_CORE_CALLER``
    any                  malformed           400 ``INVALID_CORE_CALLER``
    ===================  ==================  ==========================================

    A websocket is held to the same rules before its handshake: refused with the same answer where the server can send
    one, else with close code 1008 (RFC 6455, section 7.4.1) and the code as reason. It does not touch the database, so
    it never blocks the loop; ``tenant_scoped_session`` does.
    """

    def __init__(
        self,
        app: App,
        *,
        identity_tenant: Callable[[], uuid.UUID | str | None] = lambda: None,
        exempt_paths: frozenset[str] = EXEMPT_PATHS,
    ) -> None:
        self._app = app
        self._identity_tenant = identity_tenant
        self._exempt_paths = exempt_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] not in ("http", "websocket") or scope["path"] in self._exempt_paths:
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._tenant(_header(scope, b"x-core-caller"))
        except _Refusal as refusal:
            await (_reply if scope["type"] == "http" else _refuse_websocket)(scope, receive, send, refusal)
            return
        handle = set_context(_trace(tenant, _header(scope, b"traceparent")))
        try:
            await self._app(scope, receive, send)
        finally:
            reset_context(handle)

    def _tenant(self, values: list[str]) -> uuid.UUID:
        bound = self._identity_tenant()
        identity = uuid.UUID(str(bound)) if bound is not None else None
        given = [value for value in values if value.strip()]
        if not given:
            if identity is None:
                raise _Refusal(400, "MISSING_CORE_CALLER", f"{CORE_CALLER_HEADER} is missing; send your tenant's UUID")
            return identity
        if len(given) > 1:
            raise _Refusal(
                400, "INVALID_CORE_CALLER", f"{CORE_CALLER_HEADER} was sent {len(given)} times; send it once"
            )
        try:
            caller = parse_core_caller(given[0])
        except InvalidCoreCallerError as error:
            raise _Refusal(400, "INVALID_CORE_CALLER", str(error)) from error
        if identity not in (None, caller):
            raise _Refusal(
                403, "CORE_CALLER_MISMATCH", f"{CORE_CALLER_HEADER} names another tenant than your token; leave it out"
            )
        return caller


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _trace(tenant: uuid.UUID, traceparents: list[str]) -> TraceContext:
    inbound = parse_traceparent(traceparents[0]) if len(traceparents) == 1 else None
    return continued_context(inbound, tenant_id=str(tenant)) if inbound else new_root_context(tenant_id=str(tenant))


async def _reply(
    scope: Scope,  # noqa: ARG001 - the same face as _refuse_websocket
    receive: Receive,  # noqa: ARG001
    send: Send,
    refusal: _Refusal,
    kind: str = "http.response",
) -> None:
    body = json.dumps(refusal.problem()).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send, refusal: _Refusal) -> None:
    """Before the handshake: the HTTP answer where the server can send one (ASGI extension), else a close."""
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await _reply(scope, receive, send, refusal, kind="websocket.http.response")
    else:
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.code})
