"""The door: no request passes without an established identity and its audit record."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from plm_engine_core.control_plane.identity.audit import (
    AuditError,
    AuditSink,
    AuditTenantUnknown,
    Surface,
    bind_record,
)
from plm_engine_core.control_plane.identity.context import IdentityContext, identity_bound
from plm_engine_core.control_plane.identity.errors import (
    IdentityMalformedError,
    IdentityMissingError,
    IdentityProviderUnavailable,
    IdentityValidationError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.metrics import IdentityMetrics
from plm_engine_core.control_plane.identity.problems import Problem, refuse
from plm_engine_core.control_plane.identity.provider import IdentityProvider
from plm_engine_core.control_plane.identity.refusals import Refusals
from plm_engine_core.control_plane.identity.websockets import Receive, Send, closing_at

Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

EXEMPT_PATHS: Final = frozenset({"/v1/health", "/v1/health/live", "/v1/health/ready"})
"""Answered without identity: they carry no tenant's data, and their callers (probes) have no token."""

_log = logging.getLogger(__name__)


class IdentityMiddleware:
    """Plain ASGI, for HTTP and WebSocket: validates the bearer token, binds the identity, writes the audit record.

    A refusal is 401 with problem details (RFC 9457) and never reaches the application. When the audit record cannot
    be written the answer is 503, unless `audit_required` is false; then the failure is logged and the request goes on.
    It is 503 as well while the provider cannot be asked. A WebSocket is closed with 4401 when its token expires.
    Stands inside CORS (so that refusals carry its headers) and outside everything that needs a tenant.
    """

    def __init__(
        self,
        app: AsgiApp,
        *,
        provider: IdentityProvider,
        audit: AuditSink,
        audit_required: bool = True,
        metrics: IdentityMetrics | None = None,
    ) -> None:
        self._app = app
        self._provider = provider
        self._audit = audit
        self._audit_required = audit_required
        self._refusals = Refusals(audit, provider=provider.name)
        self._metrics = metrics or IdentityMetrics(provider.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in {"http", "websocket"} or _exempt(scope):
            await self._app(scope, receive, send)
            return
        answer = await self._identify(scope)
        if isinstance(answer, Problem):
            await refuse(answer, scope, receive, send)
            return
        if scope["type"] == "websocket":
            receive, send = closing_at(answer.expires_at, receive, send)
        with identity_bound(answer):
            await self._app(scope, receive, send)

    async def _identify(self, scope: Scope) -> IdentityContext | Problem:
        try:
            identity = await self._validated(_bearer_token(scope.get("headers", ())))
        except IdentityValidationError as error:
            return await self._refused(error, scope)
        except IdentityProviderUnavailable as error:
            self._metrics.refused(None)
            return Problem.provider_unavailable(error)
        try:
            await self._audit.write(bind_record(identity, provider=self._provider.name, surface=Surface(scope["type"])))
        except AuditTenantUnknown:
            return await self._refused(
                IdentityMalformedError("the token's tenant does not exist", reason=RejectReason.UNKNOWN_TENANT), scope
            )
        except AuditError:
            _log.exception("identity.bind of tenant %s is not in the audit log", identity.tenant_id)
            if self._audit_required:
                self._metrics.refused(None)
                return Problem.audit_unavailable()
        self._metrics.bound(identity)
        return identity

    async def _validated(self, token: str) -> IdentityContext:
        started = time.perf_counter()
        try:
            return await self._provider.identify(token)
        finally:
            self._metrics.validated(time.perf_counter() - started)

    async def _refused(self, error: IdentityValidationError, scope: Scope) -> Problem:
        """The refusal, recorded with the tenant that a signature proved: a forger must not write into anybody's log."""
        self._metrics.refused(error)
        if not isinstance(error, IdentityMissingError):
            client = str((scope.get("client") or ("",))[0])
            await self._refusals.record(error, surface=Surface(scope["type"]), client=client)
        return Problem.unauthenticated(error)


def _exempt(scope: Scope) -> bool:
    return scope["type"] == "http" and (scope["path"].rstrip("/") or "/") in EXEMPT_PATHS


def _bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The one bearer token of a request; the scheme's case does not matter (RFC 9110, section 11.1)."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if not values:
        raise IdentityMissingError
    if len(values) > 1:
        raise IdentityMalformedError(
            "the request has several Authorization headers", reason=RejectReason.MALFORMED_TOKEN
        )
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not token.strip(" "):
        raise IdentityMissingError
    return token.strip(" ")
