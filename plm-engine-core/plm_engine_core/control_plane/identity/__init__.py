"""Who is calling: tokens, the door that checks them, the platform's own identity, and the audit log."""

from __future__ import annotations

from plm_engine_core.control_plane.identity.audit import (
    AuditError,
    AuditEvent,
    AuditRecord,
    AuditSink,
    AuditTenantUnknown,
    AuditUnavailable,
    InMemoryAuditSink,
    PostgresAuditSink,
)
from plm_engine_core.control_plane.identity.context import (
    ActorKind,
    IdentityContext,
    current_identity,
    get_current_identity,
    identity_bound,
    make_test_identity,
    require_identity,
)
from plm_engine_core.control_plane.identity.errors import (
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityMissingError,
    IdentityProviderConfigError,
    IdentityValidationError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.middleware import IdentityMiddleware
from plm_engine_core.control_plane.identity.provider import Hs256JwtIdentityProvider, IdentityProvider
from plm_engine_core.control_plane.identity.system import with_system_identity

__all__ = [
    "ActorKind",
    "AuditError",
    "AuditEvent",
    "AuditRecord",
    "AuditSink",
    "AuditTenantUnknown",
    "AuditUnavailable",
    "Hs256JwtIdentityProvider",
    "IdentityContext",
    "IdentityExpiredError",
    "IdentityInvalidSignatureError",
    "IdentityMalformedError",
    "IdentityMiddleware",
    "IdentityMissingError",
    "IdentityProvider",
    "IdentityProviderConfigError",
    "IdentityValidationError",
    "InMemoryAuditSink",
    "PostgresAuditSink",
    "RejectReason",
    "current_identity",
    "get_current_identity",
    "identity_bound",
    "make_test_identity",
    "require_identity",
    "with_system_identity",
]
